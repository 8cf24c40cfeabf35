"""What follows from a recipe on this machine and data: `derived` in run_config.yaml, and the first printed lines."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from .. import __version__
from ..data.transform import ImageSpec
from ..errors import without_secrets
from ..files import local_path
from ..keys.finetune_keys import FinetuneRecipe
from ..keys.run_keys import PretrainRecipe
from ..run_folder import RunFolder
from .devices import describe_hardware


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
    spec: ImageSpec,
    device: torch.device,
    content: str,
    scored: str,
    stored: Path | None,
) -> None:
    """Print three lines, and write run_config.yaml unless it is a dry run. Only the main process calls it.

    Args:
        recipe: the run's recipe.
        facts: the result of `derive_facts`.
        spec: size, channels and dtype of the images.
        device: device of this process.
        content: the patches or classes as text, such as "14 x 14 patches".
        scored: the evaluations as text, such as "evaluation on 64 held-out images".
        stored: the checkpoint that the run continues from, or None.

    Raises:
        UserError: if run_config.yaml can't be written.
    """
    height, width = spec.size
    trained = f", {facts['trained_parameters'] / 1e6:.1f} M trained" if "trained_parameters" in facts else ""
    masks = f", each with {spec.masks} masks" if spec.masks > 1 else ""
    strategy = f"{facts['strategy']}, " if "strategy" in facts else ""
    nodata = "" if spec.nodata is None else f" (nodata {spec.nodata:g})"
    start = f"continuing from {stored}" if stored else f"from {recipe.model or 'scratch'}"
    print(
        f"{recipe.recipe or recipe.command}: {facts['training_images']:,} images of {without_secrets(recipe.dataset)}, "
        f"{spec.num_channels} x {height} x {width} {spec.dtype}{nodata}, {content}, "
        f"{facts['parameters'] / 1e6:.1f} M parameters{trained}\n"
        f"{facts['total_steps']:,} steps of {recipe.images_per_step} images{masks} = {facts['processes']} "
        f"{'process' if facts['processes'] == 1 else 'processes'} x {facts['grad_accum_steps']} x "
        f"{facts['per_device_batch_size']} ({strategy}{device}, precision {facts['mixed_precision']}), "
        f"lr {recipe.lr:.3g}; {scored}\n"
        f"{start}, into {recipe.output_dir}",
        flush=True,
    )
    if not recipe.dry_run:
        RunFolder(str(recipe.output_dir)).write_config(recipe.to_dict(), facts)
