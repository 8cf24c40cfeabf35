"""What a recipe came to on this machine and this data: `derived` in run_config.yaml, and three lines for people."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from .. import __version__
from ..data.transform import ImageSpec
from ..keys.run_keys import RunRecipe


@dataclass(kw_only=True)
class RunFacts:
    """What was derived from a recipe.

    Args:
        hardware: GPUs by number and name, or the CPU's name.
        processes: that train together.
        strategy: how they do; None for fine-tuning, which has one.
        mixed_precision: "no", "bf16" or "fp16".
        per_device_batch_size: images at once on a device.
        grad_accum_steps: micro-batches that make a step of one process.
        lr: the highest learning rate.
        total_steps: optimizer steps.
        warmup_steps: those of the warm-up.
        training_images: images of an epoch.
        evaluation_images: images of an evaluation.
        evaluated_on: what those are.
        classes: names of the labels, in fine-tuning.
        parameters: numbers in the model.
        trained_parameters: those that are trained, where some may be frozen.
    """

    version: str = __version__
    torch: str = str(torch.__version__)
    hardware: str
    processes: int
    strategy: str | None = None
    mixed_precision: str
    per_device_batch_size: int
    grad_accum_steps: int
    lr: float
    total_steps: int
    warmup_steps: int
    training_images: int
    evaluation_images: int
    evaluated_on: str
    classes: list[str] | None = None
    parameters: int
    trained_parameters: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """The facts that there are, for run_config.yaml."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def describe_run(
    command: str,
    recipe: RunRecipe,
    facts: RunFacts,
    spec: ImageSpec,
    device: torch.device,
    content: str,
    scored: str,
    start: str,
) -> str:
    """Three lines: data and model; steps; where the run starts and where it writes.

    Args:
        command: what a run without a named recipe is called.
        recipe: of the run.
        facts: what was derived from it.
        spec: what becomes of an image.
        device: of this process.
        content: what an image has: patches or classes.
        scored: what evaluations are on.
        start: where the weights are from.
    """
    height, width = spec.size
    trained = "" if facts.trained_parameters is None else f", {facts.trained_parameters / 1e6:.1f} M trained"
    masks = f", each with {spec.masks} masks" if spec.masks > 1 else ""
    strategy = f"{facts.strategy}, " if facts.strategy else ""
    return (
        f"{recipe.recipe or command}: {facts.training_images:,} images of {recipe.dataset}, "
        f"{spec.num_channels} x {height} x {width} {spec.dtype}, {content}, "
        f"{facts.parameters / 1e6:.1f} M parameters{trained}\n"
        f"{facts.total_steps:,} steps of {recipe.images_per_step} images{masks} = {facts.processes} "
        f"{'process' if facts.processes == 1 else 'processes'} x {facts.grad_accum_steps} x "
        f"{facts.per_device_batch_size} ({strategy}{device}, precision {facts.mixed_precision}), "
        f"lr {recipe.lr:.3g}; {scored}\n"
        f"{start}, into {recipe.output_dir}"
    )
