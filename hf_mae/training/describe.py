"""What follows from a recipe on this machine and data: `derived` in run_config.yaml, and lines about the run."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from .. import __version__
from ..files import local_path
from ..keys.finetune_keys import FinetuneRecipe
from ..keys.run_keys import PretrainRecipe
from ..run_folder import RunFolder
from .devices import describe_hardware

logger = logging.getLogger(__name__)


@dataclass
class RunSetup:
    """What a recipe runs with: the machine, the data and the model."""

    device: torch.device  # of this process
    ranks: int  # processes that train together
    precision: str  # "no", "bf16" or "fp16"
    total_steps: int  # optimizer steps of the run
    warmup_steps: int
    training_images: int  # in an epoch
    evaluation_images: int
    evaluated_on: str  # description of the evaluation images
    model: PreTrainedModel  # to be trained
    strategy: str | None = None  # how the processes train together; None in fine-tuning, which has only DDP
    classes: list[str] | None = None  # their names; None in pretraining


def derive_facts(recipe: PretrainRecipe | FinetuneRecipe, setup: RunSetup) -> dict[str, Any]:
    """The facts derived from a recipe, as run_config.yaml has them. Every process must call it.

    In fine-tuning, trained parameters are also counted separately, because the recipe may freeze some.
    """
    per_device_batch_size, grad_accum_steps = recipe.micro_batch(setup.ranks)
    trained = None if setup.classes is None else setup.model.num_parameters(only_trainable=True)
    places = {key: getattr(recipe, key) for key in ("dataset", "eval_dataset", "model")}
    facts = {
        "version": __version__,
        "torch": str(torch.__version__),
        "hardware": describe_hardware(setup.device),
        "processes": setup.ranks,
        "strategy": setup.strategy,
        "mixed_precision": setup.precision,
        "per_device_batch_size": per_device_batch_size,
        "grad_accum_steps": grad_accum_steps,
        "lr": recipe.lr,
        "total_steps": setup.total_steps,
        "warmup_steps": setup.warmup_steps,
        "training_images": setup.training_images,
        "evaluation_images": setup.evaluation_images,
        "evaluated_on": setup.evaluated_on,
        # A card can't tell a relative path such as my/images from a Hub id.
        "local_keys": [key for key, place in places.items() if place and os.path.exists(local_path(place))] or None,
        "classes": setup.classes,
        "parameters": setup.model.num_parameters(),
        "trained_parameters": trained,
    }
    return {name: value for name, value in facts.items() if value is not None}


def announce(
    recipe: PretrainRecipe | FinetuneRecipe,
    facts: dict[str, Any],
    grid_size: tuple[int, int],
    device: torch.device,
    stored: Path | None,
) -> None:
    """Print two lines about the run, and write run_config.yaml unless it is a dry run. Only the main process calls it.

    Args:
        recipe: the run's recipe.
        facts: the result of `derive_facts`.
        grid_size: (height, width) of the model's images in patches.
        device: device of this process.
        stored: the checkpoint that the run continues from, or None.

    Raises:
        UserError: if run_config.yaml can't be written.
    """
    trained = f", {facts['trained_parameters'] / 1e6:.1f} M trained" if "trained_parameters" in facts else ""
    masks = f", each with {recipe.masks_per_image} masks" if recipe.masks_per_image > 1 else ""
    strategy = f"{facts['strategy']}, " if "strategy" in facts else ""
    start = f"continuing from {stored}" if stored else f"from {recipe.model or 'scratch'}"
    print(
        f"{recipe.recipe or recipe.command}: {grid_size[0]} x {grid_size[1]} patches, "
        f"{facts['parameters'] / 1e6:.1f} M parameters{trained}, {start}, into {recipe.output_dir}\n"
        f"{facts['total_steps']:,} steps of {recipe.images_per_step} images{masks} = {facts['processes']} "
        f"{'process' if facts['processes'] == 1 else 'processes'} x {facts['grad_accum_steps']} x "
        f"{facts['per_device_batch_size']} ({strategy}{device}, precision {facts['mixed_precision']}), "
        f"lr {recipe.lr:.3g}",
        flush=True,
    )
    if not recipe.dry_run:
        RunFolder(str(recipe.output_dir)).write_config(recipe.to_dict(), facts)


def warn_if_batch_is_larger(recipe: PretrainRecipe | FinetuneRecipe, images: int, effect: str) -> None:
    """Warn if a step takes more images than there are to train on; `effect` says what happens then."""
    if recipe.images_per_step > images:
        logger.warning(
            "a step of %d images is larger than the training set of %d: %s; pass --total_batch_size %d or less",
            *(recipe.images_per_step, images, effect, images * recipe.masks_per_image),
        )
