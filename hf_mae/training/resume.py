"""Whether a run may write into a folder, and which checkpoint it continues from."""

import json
import os
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, one_line
from ..keys import names_where
from ..keys.run_keys import PretrainRecipe, RunRecipe
from ..run_folder import RunFolder
from .checkpoint import find_checkpoint
from .state import RunState


def check_folder(recipe: RunRecipe, output_dir: Path) -> None:
    """Raise a CheckpointError if a run can't or may not write into a folder: it may hold a run that isn't resumed."""
    try:
        str(output_dir).encode()  # safetensors can't write to any other
        there = next(path for path in (output_dir.absolute(), *output_dir.absolute().parents) if path.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            raise OSError(f"{there} can't be written to" if there.is_dir() else f"{there} is not a folder")
    except (OSError, UnicodeError) as error:
        raise CheckpointError(f"{output_dir} can't be used ({one_line(error)}); choose another --output_dir") from error
    folder = RunFolder(output_dir)
    for path in folder.misplaced(recipe.save_steps or 1):
        what, wanted = ("folder", "file") if path.is_dir() else ("file", "folder")
        raise CheckpointError(f"{path} is a {what} where the run needs a {wanted}; move it away")
    fresh = recipe.resume == "none" and not recipe.dry_run
    if fresh and (folder.checkpoints() or any(event["step"] > 0 for event in folder.events())):
        raise CheckpointError(
            f"{output_dir} holds another run; continue it with --resume auto, or choose another --output_dir"
        )


def check_same_recipe(old: dict[str, Any], recipe: RunRecipe, where: Path, free: set[str]) -> None:
    """Raise a CheckpointError that names the first key, except the `free` ones, that a resume would change.

    Args:
        old: stored keys of the run.
        recipe: recipe to resume it with.
        where: checkpoint or folder that holds the old keys.
        free: names of keys that may differ.
    """
    new = json.loads(json.dumps(recipe.to_dict()))
    for key in sorted((old.keys() | new.keys()) - free):
        if old.get(key) != new.get(key):
            raise CheckpointError(
                f"{where} belongs to a run with {key} {old.get(key)}, not {new.get(key)}; use the same recipe, or "
                "start another run from its weights with --model and another --output_dir"
            )


def find_stored(recipe: PretrainRecipe, output_dir: Path) -> tuple[Path | None, RunState | None]:
    """The checkpoint that a run continues from, and its state; None and None for a new run.

    Raises:
        CheckpointError: if the folder holds another run, or one that can't be continued.
    """
    check_folder(recipe, output_dir)
    checkpoint = None if recipe.resume == "none" else find_checkpoint(output_dir, recipe.resume)
    if checkpoint is None:
        return None, None
    state = RunState.read(checkpoint)
    # The data may have moved: its fingerprint is compared later.
    free = names_where(recipe, free=True) | names_where(recipe, place=True)
    check_same_recipe(state.recipe, recipe, checkpoint, free)
    return checkpoint, state
