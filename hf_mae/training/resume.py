"""Whether a run may write into a folder, and which checkpoint it continues from."""

import json
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files import read_json
from ..keys import names_where
from ..keys.run_keys import PretrainRecipe, RunRecipe
from ..run_folder import RunFolder
from .checkpoint import find_checkpoint


def check_folder(recipe: RunRecipe, output_dir: Path) -> None:
    """See to it that a run may write into a folder.

    Raises:
        CheckpointError: if it holds a run that this one is not to go on with.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise CheckpointError(f"{output_dir} is no folder; choose another --output_dir")
    if recipe.resume == "none":
        folder = RunFolder(output_dir)
        took_steps = any(event["step"] > 0 for event in folder.events())
        if (took_steps or folder.checkpoints()) and not recipe.dry_run:
            raise CheckpointError(
                f"{output_dir} holds another run; go on with it by --resume auto, or choose another --output_dir"
            )


def check_same_recipe(old: dict[str, Any], recipe: RunRecipe, where: Path, free: set[str]) -> None:
    """See to it that a run goes on with the recipe that it has.

    Args:
        old: keys of the run, as they come back from a file.
        recipe: what was asked for now.
        where: whose keys they are, for people.
        free: keys that may differ.

    Raises:
        CheckpointError: naming the first key that differs.
    """
    new = json.loads(json.dumps(recipe.to_dict()))
    for key in sorted((old.keys() | new.keys()) - free):
        if old.get(key) != new.get(key):
            raise CheckpointError(
                f"{where} is of a run with {key} {old.get(key)}, not {new.get(key)}; go on with the same recipe, or "
                "start another run from its weights with --model and another --output_dir"
            )


def find_stored(recipe: PretrainRecipe, output_dir: Path) -> Path | None:
    """The checkpoint that the run goes on from; None for a new run.

    Raises:
        CheckpointError: if the folder holds a run that this one is not to go on with, or can't.
    """
    check_folder(recipe, output_dir)
    stored = None if recipe.resume == "none" else find_checkpoint(output_dir, recipe.resume)
    if stored:
        # A fingerprint of the data tells whether another place holds the same.
        free = names_where(recipe, free=True) | names_where(recipe, place=True)
        check_same_recipe(read_state(stored)[0]["recipe"], recipe, stored, free)
    return stored


def read_state(checkpoint: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a checkpoint says of the run (trainer.json) and of its data (data.json).

    Raises:
        CheckpointError: if it is a model's folder rather than a checkpoint.
    """
    try:
        trainer, data = (read_json(checkpoint / name) for name in ("trainer.json", "data.json"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{error.filename} is missing; name a folder checkpoint-STEP of a run") from error
    except ValueError as error:
        raise CheckpointError(f"the state in {checkpoint} is no JSON ({error}); name another checkpoint") from error
    return trainer, data
