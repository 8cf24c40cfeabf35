"""Weights in other packages' formats."""

import argparse
import pickle
from pathlib import Path
from typing import Any

import torch

# What the original's own checkpoints hold besides tensors and plain values: the options that they were trained with.
_ALLOWED: list[Any] = [argparse.Namespace]


class ConvertError(ValueError):
    """A file that can't be converted; one line with the remedy."""


def read_pth(path: str | Path) -> Any:
    """What a `.pth` file holds, on the host. Nothing in it is run, whatever it says.

    Args:
        path: of a file that `torch.save` wrote, in its newer or older form.

    Raises:
        ConvertError: if it isn't one, or asks for code other than tensors, plain values and `argparse.Namespace`.
    """
    try:
        with torch.serialization.safe_globals(_ALLOWED):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ConvertError(f"{path} is not there; check the name") from error
    except pickle.UnpicklingError as error:
        raise ConvertError(
            f"{path} is refused: it holds {_what_else(path)}, which could run code; ask for a file "
            "with its tensors alone"
        ) from error
    except (RuntimeError, EOFError, ValueError, OSError, KeyError) as error:
        message = " ".join(str(error).split())[:200]
        raise ConvertError(f"{path} is no whole .pth file ({message}); fetch it again") from error


def _what_else(path: str | Path) -> str:
    """Names of the code that a file asks for; only zip files can be asked without running them."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (ValueError, RuntimeError):
        names = []
    return ", ".join(sorted(names)) or "more than tensors and plain values"
