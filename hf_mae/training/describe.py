"""What follows from a recipe on this machine and data: `derived` in run_config.yaml, and three printed lines."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from .. import __version__
from ..data.transform import ImageSpec
from ..keys.finetune_keys import FinetuneRecipe
from ..keys.run_keys import PretrainRecipe
from ..run_folder import RunFolder
from .devices import describe_hardware


def derive_facts(
    recipe: PretrainRecipe | FinetuneRecipe,
    device: torch.device,
    processes: int,
    precision: str,
    steps: tuple[int, int],
    images: tuple[int, int],
    evaluated_on: str,
    model: PreTrainedModel,
    strategy: str | None = None,
    classes: list[str] | None = None,
) -> dict[str, Any]:
    """The facts derived from a recipe. Every process must call it.

    Args:
        recipe: the run's recipe.
        device: device of this process.
        processes: number of processes that train together.
        precision: "no", "bf16" or "fp16".
        steps: number of steps in the run, and in its warm-up.
        images: number of images in an epoch, and in an evaluation.
        evaluated_on: description of the evaluation images.
        model: the model to train.
        strategy: how the processes train together; fine-tuning has only one.
        classes: names of the classes, in fine-tuning; trained parameters are then counted separately.
    """
    micro_batch, grad_accum_steps = recipe.micro_batch(processes)
    places = {key: getattr(recipe, key) for key in ("dataset", "eval_dataset", "model")}
    facts = {
        "version": __version__,
        "torch": str(torch.__version__),
        "hardware": describe_hardware(device),
        "processes": processes,
        "strategy": strategy,
        "mixed_precision": precision,
        "per_device_batch_size": micro_batch,
        "grad_accum_steps": grad_accum_steps,
        "lr": recipe.lr,
        "total_steps": steps[0],
        "warmup_steps": steps[1],
        "training_images": images[0],
        "evaluation_images": images[1],
        "evaluated_on": evaluated_on,
        # A card can't tell a relative path such as my/images from a Hub id.
        "local_keys": [key for key, place in places.items() if place and Path(place).expanduser().exists()] or None,
        "classes": classes,
        "parameters": model.num_parameters(),
        "trained_parameters": None if classes is None else model.num_parameters(only_trainable=True),
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
        content: number of patches or classes, as text.
        scored: description of the evaluations, as text.
        stored: the checkpoint that the run continues from, if any.
    """
    height, width = spec.size
    trained = f", {facts['trained_parameters'] / 1e6:.1f} M trained" if "trained_parameters" in facts else ""
    masks = f", each with {spec.masks} masks" if spec.masks > 1 else ""
    strategy = f"{facts['strategy']}, " if "strategy" in facts else ""
    start = f"continuing from {stored}" if stored else f"from {recipe.model or 'scratch'}"
    print(
        f"{recipe.recipe or recipe.command}: {facts['training_images']:,} images of {recipe.dataset}, "
        f"{spec.num_channels} x {height} x {width} {spec.dtype}, {content}, "
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
