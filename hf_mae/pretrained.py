"""Load a pretrained model with its image processor, or report in one line why it can't be loaded."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from .errors import UserError, one_line
from .files import WEIGHT_ENDINGS, missing_path
from .image_processing_base_mae import check_settings
from .image_processing_mae import MAEImageProcessor
from .modeling_mae import MAEPreTrainedModel

Model = TypeVar("Model", bound=MAEPreTrainedModel)


@contextmanager
def loading(failure: str, remedy: str | None = None) -> Iterator[None]:
    """Report any error from loading a missing, broken or hostile model as a one-line UserError.

    Args:
        failure: how the line begins, e.g. "--model outputs/mine can't be loaded".
        remedy: how it ends; None if the original error already says what to do.
    """
    try:
        yield
    except (UserError, ModuleNotFoundError):  # the command line names the extra of a package
        raise
    except Exception as error:  # for a broken file, transformers may raise almost any kind
        why = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"{failure} ({why}); {remedy}" if remedy else f"{failure}: {why}") from error


def model_failure(model: str) -> str:
    """The beginning of a message for `loading` about a model that a user named.

    Raises:
        UserError: if the name is a local path that doesn't exist; the network isn't tried then.
    """
    failure = f"--model {model} can't be loaded"
    if os.path.isdir(model):
        return failure
    if missing := missing_path(model, WEIGHT_ENDINGS):
        raise UserError(f"{failure}: {missing}")
    return f"{failure}: no local folder has this name, and reading it from the Hub failed"


def load_with_processor(kind: type[Model], path: str, **overrides: Any) -> tuple[Model, MAEImageProcessor]:
    """Load a model of a class, in evaluation mode, and its image processor from a folder or Hub id.

    `overrides` are keys of its configuration. Raises a UserError if there is no model, or weights of its class are
    missing.
    """
    with loading(model_failure(path)):
        # Always float32, whatever precision it was saved in, so that a model's figures are the same everywhere.
        loaded: Any = kind.from_pretrained(
            path, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **overrides
        )
        processor = MAEImageProcessor.from_pretrained(path)
        check_settings(vars(processor))
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        if missing[0].startswith("classifier."):
            raise UserError(f"--model {path} has no classifier; train one with hf-mae finetune --model {path}")
        what = "it has an encoder only" if missing[0].startswith("decoder.") else "it is not a model of hf_mae"
        raise UserError(f"--model {path} has no weights for {missing[0]}; {what}")
    return model.eval(), processor
