"""Read weights from files that may be hostile: no code in them is run."""

import argparse
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import UserError, one_line


def read_pth(path: Path) -> Any:
    """Read a `.pth` file of `torch.save`, in its newer or older form, without running code in it.

    Raises:
        UserError: if it isn't one, or holds anything but tensors, plain values and `argparse.Namespace`.
    """
    try:
        # The original's own checkpoints hold the options that they were trained with.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; check the name") from error
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is refused: it holds {_what_else(path)}, which could run code; ask for a file "
            "that holds only tensors"
        ) from error
    except (RuntimeError, EOFError, ValueError, OSError, KeyError) as error:
        raise UserError(f"{path} is not a complete .pth file ({one_line(error)}); fetch it again") from error


def _what_else(path: Path) -> str:
    """Names of the code that a file would run. Only files in the newer form, a zip file, can be searched safely."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (ValueError, RuntimeError):
        names = []
    return ", ".join(sorted(names)) or "more than tensors and plain values"


def read_weights(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors of a `.safetensors` or `.pth` file as float32, and its metadata.

    In a `.pth` file with an entry `model`, that entry holds the tensors, and the entry `args` the metadata.

    Raises:
        UserError: if the file can't be read, or holds something else.
    """
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                weights, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            message = f"{path} is not a complete .safetensors file ({one_line(error)}); fetch it again"
            raise UserError(message) from error
    else:
        content = read_pth(path)
        weights = content.get("model", content) if isinstance(content, dict) else content
        options = content.get("args") if weights is not content else None
        metadata = vars(options) if isinstance(options, argparse.Namespace) else {}
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise UserError(f"{path} doesn't hold tensors by name; give a file of a model's weights")
    return {key: value.detach().float().contiguous() for key, value in weights.items()}, metadata
