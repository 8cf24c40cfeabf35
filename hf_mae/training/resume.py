"""Which folder a run may write to, and which checkpoint it continues from."""

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

# Keys of the run's length. The learning rate of every step depends on it.
LENGTH = ("epochs", "total_steps")


def check_folder(recipe: RunRecipe, output_dir: Path) -> None:
    """Check that a run may write to a folder.

    Raises:
        CheckpointError: if the folder can't be written, something in it is in the way, or it holds another run.
    """
    try:
        str(output_dir).encode()  # safetensors takes only paths in UTF-8
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
    """Check that a resume doesn't change the recipe.

    Args:
        old: stored keys of the run.
        recipe: recipe to resume it with.
        where: checkpoint or folder that holds the old keys.
        free: names of keys that may differ.

    Raises:
        CheckpointError: for the first key that differs.
    """
    new = json.loads(json.dumps(recipe.to_dict()))
    for key in sorted((old.keys() | new.keys()) - free):
        if old.get(key) != new.get(key):
            fixed = "the length of a run can't change, because its learning rates follow from it; "
            raise CheckpointError(
                f"{where} belongs to a run with {key} {old.get(key)}, not {new.get(key)}; "
                f"{fixed if key in LENGTH else ''}use the same recipe, or start another run from its weights with "
                "--model and another --output_dir"
            )


def check_step(checkpoint: Path | None, step: int, total_steps: int) -> None:
    """Raise a CheckpointError if a checkpoint is past the end of the run that would continue from it."""
    if step > total_steps:
        raise CheckpointError(
            f"{checkpoint} is at step {step}, but the run ends at step {total_steps}; use the recipe and the data of "
            "its run"
        )


def find_stored(recipe: PretrainRecipe, output_dir: Path) -> tuple[Path | None, RunState | None]:
    """The checkpoint that a run continues from, and its state; None and None for a new run.

    Raises:
        CheckpointError: if `check_folder` or `check_same_recipe` refuses, or if no checkpoint can be read.
    """
    check_folder(recipe, output_dir)
    checkpoint = None if recipe.resume == "none" else find_checkpoint(output_dir, recipe.resume)
    if checkpoint is None:
        return None, None
    state = RunState.read(checkpoint)
    # The data may be in another place: `start_state` compares its fingerprint.
    free = names_where(recipe, free=True) | names_where(recipe, place=True)
    check_same_recipe(state.recipe, recipe, checkpoint, free)
    return checkpoint, state
