"""A pretrained model with its image processor."""

from typing import Any, TypeVar

import torch

from .data.sources import DataError
from .image_processing_mae import MAEImageProcessor
from .modeling_mae import MAEPreTrainedModel

Model = TypeVar("Model", bound=MAEPreTrainedModel)


def load_with_processor(kind: type[Model], path: str, **overrides: Any) -> tuple[Model, MAEImageProcessor]:
    """A pretrained model in evaluation mode, and its image processor.

    Args:
        kind: class of the model.
        path: folder or Hub id.
        overrides: of its configuration.

    Raises:
        DataError: if there is no model, or not all weights of this class.
    """
    try:
        # Whatever precision it was saved in: figures of one model are to be the same everywhere.
        loaded: Any = kind.from_pretrained(
            path, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **overrides
        )
        processor = MAEImageProcessor.from_pretrained(path)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"--model {path} can't be loaded: {' '.join(str(error).split())[:300]}") from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        if missing[0].startswith("classifier."):
            raise DataError(f"--model {path} has no classifier; make one by hf-mae finetune --model {path}")
        what = "it has an encoder only" if missing[0].startswith("decoder.") else "it is not a model of hf_mae"
        raise DataError(f"--model {path} has no weights for {missing[0]}; {what}")
    return model.eval(), processor
