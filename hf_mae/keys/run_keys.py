"""The keys of a training run and of `hf-mae pretrain`, and what follows from them."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from ..errors import UserError, without_secrets
from ..optim.batch import micro_batch
from ..optim.schedule import read_points, scaled_lr, steps_of
from . import (
    checkpoint_key,
    data_key,
    evaluation_key,
    hardware_key,
    inherit,
    key,
    log_key,
    masking_key,
    model_key,
    optimization_key,
    read_size,
)
from .data_keys import NodataKeys, SplitKeys
from .model_keys import MODEL_KEYS, ModelKeys

T = TypeVar("T")

# Default intervals of a run: key -> the run's number of steps is divided by this, and how the help says so.
INTERVALS = {
    "eval_steps": (10, "a tenth of the run"),
    "save_steps": (10, "a tenth of the run"),
    "quality_steps": (5, "a fifth of the run"),
}


@dataclass
class RunRecipe(SplitKeys):
    """The keys of every training run, and what follows from them; the defaults are pretraining's."""

    command: ClassVar[str]
    masks_per_image = 1  # a key of pretraining only

    recipe: str | None = key(
        None,
        "recipe with values for these keys: its name, such as quickstart, or a YAML file",
        free=True,
        card=False,
        metavar="NAME|FILE",
    )
    dataset: str = inherit(SplitKeys, "dataset", "digits")
    split: str = inherit(SplitKeys, "split", "train", "split of the data to train on")
    max_samples: int | None = inherit(SplitKeys, "max_samples", None, "train on at most this many images")
    max_eval_samples: int | None = inherit(SplitKeys, "max_eval_samples", 2048)
    crop_scale: list[float] = data_key(
        [0.2, 1.0], "smallest and largest area of a random crop, as fractions of the image"
    )
    flip: bool = data_key(True, "mirror half of the training images")
    total_batch_size: int = optimization_key(4096, "images per optimizer step, over all processes")
    per_device_batch_size: int | None = hardware_key(
        None, "images per device at once", "the largest that fits the step, up to 64"
    )
    epochs: float | None = optimization_key(800, "passes over the data; total_steps takes precedence")
    total_steps: int | None = optimization_key(None, "optimizer steps of the run", "from epochs")
    warmup_epochs: float = optimization_key(
        40, "linear warm-up in epochs, at most a tenth of the run; warmup_steps takes precedence"
    )
    warmup_steps: int | None = optimization_key(None, "linear warm-up in optimizer steps", "from warmup_epochs")
    blr: float = optimization_key(1.5e-4, "base learning rate per 256 images: lr = blr * total_batch_size / 256")
    min_lr: float = optimization_key(0.0, "learning rate at the end of the cosine schedule")
    weight_decay: float = optimization_key(0.05, "AdamW's weight decay, except for biases and norms")
    adam_beta1: float = optimization_key(0.9, "AdamW's decay of the gradient's running mean")
    adam_beta2: float = optimization_key(0.95, "AdamW's decay of the squared gradient's running mean")
    clip_grad: float | None = optimization_key(None, "clip the gradient to this norm", "no clipping")
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = hardware_key(
        "auto", "precision of the forward pass; auto uses bf16 on GPUs that have it"
    )
    gradient_checkpointing: bool = hardware_key(False, "save memory by computing activations twice")
    compile: bool = hardware_key(False, "compile the model with torch.compile")
    attn_implementation: str = hardware_key("sdpa", "attention kernel, such as eager, sdpa or flash_attention_2")
    deterministic: bool = hardware_key(False, "make runs on a GPU reproducible bit for bit; slower")
    output_dir: str | None = checkpoint_key(
        None,
        "folder for the model, its checkpoints and its log; created if missing",
        "outputs/ and the recipe's name",
        card=False,
        metavar="DIR",
    )
    resume: str = checkpoint_key(
        "none",
        "checkpoint to continue from: auto takes the newest complete one, if any",
        card=False,
        metavar="auto|none|DIR",
    )
    seed: int = optimization_key(0, "random seed of weights, order, crops, flips and masks")
    num_workers: int = hardware_key(2, "loader processes for each training process")
    log_steps: int = log_key(20, "optimizer steps between two lines of the log")
    eval_steps: int | None = evaluation_key(None, "optimizer steps between two evaluations", INTERVALS["eval_steps"][1])
    save_steps: int | None = checkpoint_key(None, "optimizer steps between two checkpoints", INTERVALS["save_steps"][1])
    keep_checkpoints: int = checkpoint_key(2, "number of newest checkpoints to keep, 2 or more")
    log_with: str | None = log_key(
        None, "trackers: tensorboard, wandb, trackio or all", "none", card=False, metavar="NAME"
    )
    dry_run: bool = log_key(False, "describe the run and stop before the first step", card=False)

    @property
    def lr(self) -> float:
        """The highest learning rate."""
        return scaled_lr(self.blr, self.total_batch_size)

    @property
    def images_per_step(self) -> int:
        """Images that an optimizer step decodes, over all processes."""
        return self.total_batch_size // self.masks_per_image

    def steps(self, num_samples: int) -> tuple[int, int]:
        """Optimizer steps of the run and of its warm-up, with `num_samples` training images in an epoch.

        Raises a UserError if neither steps nor epochs are given.
        """
        if self.total_steps is None and self.epochs is None:
            raise UserError("neither total_steps nor epochs is given; pass e.g. --epochs 800")
        total = self.total_steps or max(1, round(steps_of(self.epochs or 0, num_samples, self.images_per_step)))
        if self.warmup_steps is not None:
            return total, self.warmup_steps
        return total, min(round(steps_of(self.warmup_epochs, num_samples, self.images_per_step)), total // 10)

    def interval(self, name: str, total_steps: int) -> int:
        """Optimizer steps from one event to the next in a run of `total_steps`; 0 for none.

        `name` is a key of `INTERVALS`. If it isn't given, the interval is a fraction of the run.
        """
        given: int | None = getattr(self, name)
        return max(1, total_steps // INTERVALS[name][0]) if given is None else given

    def micro_batch(self, ranks: int) -> tuple[int, int]:
        """Images at once on a device, and the number of such micro-batches in a step of each of `ranks` processes.

        Raises a UserError if they don't make up the total; it names the sizes that do.
        """
        return micro_batch(self.total_batch_size, self.per_device_batch_size, ranks, masks=self.masks_per_image)

    def to_dict(self) -> dict[str, Any]:
        """All keys, flat, as a recipe file has them; URLs without secrets."""
        return without_secrets(asdict(self))

    def __post_init__(self) -> None:
        if self.output_dir is None:
            self.output_dir = f"outputs/{Path(self.recipe).stem if self.recipe else self.command}"
        super().__post_init__()

    def check(self) -> None:
        super().check()
        self.check_least(
            total_batch_size=1, per_device_batch_size=1, log_steps=1, keep_checkpoints=2, save_steps=1, eval_steps=1,
            max_samples=1, max_eval_samples=1,
        )  # fmt: skip
        self.check_range("epochs", low=1e-9, high=10**6)
        self.check_range("total_steps", low=1, high=10**9)
        self.check_seed()
        if self.num_workers < 0:
            raise UserError(f"num_workers {self.num_workers} is negative; 0 loads in the training process")
        self.check_range("blr", "min_lr", "weight_decay", "warmup_epochs", "warmup_steps")
        self.check_range("clip_grad", low=1e-9)
        self.check_range("adam_beta1", high=0.9999)
        self.check_range("adam_beta2", high=0.999999)
        if len(self.crop_scale) not in (1, 2) or not 0 < self.crop_scale[0] <= self.crop_scale[-1] <= 1:
            raise UserError(f"crop_scale {self.crop_scale} is not 0 < smallest <= largest <= 1; the paper has 0.2 1.0")


@dataclass
class PretrainRunKeys(NodataKeys, RunRecipe):
    """The keys that only pretraining has, except those of the model's configuration."""

    model: str | None = model_key(None, "folder or Hub id of a model to start from", "from scratch", metavar="DIR|ID")
    masks_per_image: int = masking_key(1, "masks per decoded image in a step; total_batch_size counts every mask")
    image_size_schedule: list[str] | None = data_key(
        None, "image sizes by fraction of the run, such as 0:128 0.5:160 0.8:224", metavar="FRACTION:SIZE"
    )
    mask_ratio_schedule: list[str] | None = masking_key(
        None, "mask ratios by fraction of the run, such as 0:0.6 0.5:0.75", metavar="FRACTION:RATIO"
    )
    streaming: bool | None = data_key(None, "read the data in place, block by block", "true for remote data")
    allow_data_change: bool = checkpoint_key(False, "resume even if the data differs from the checkpoint's")
    max_bad_fraction: float = data_key(0.01, "stop when a larger fraction of the images can't be decoded", free=True)
    eval_crop_pct: float = evaluation_key(
        0.875, "fraction of the resized side that the evaluation crop keeps, e.g. 224 of 256", free=False
    )
    image_mean: list[float] | None = data_key(
        None, "mean of each channel, for pixels in [0, 1]", "ImageNet's for 8-bit RGB, otherwise measured"
    )
    image_std: list[float] | None = data_key(
        None, "standard deviation of each channel, for pixels in [0, 1]", "ImageNet's for 8-bit RGB, otherwise measured"
    )
    quality_steps: int | None = evaluation_key(
        None,
        "optimizer steps between two measurements of kNN accuracy, linear accuracy and RankMe; 0 for none",
        INTERVALS["quality_steps"][1],
    )
    quality_samples: int = evaluation_key(
        2000, "training images for kNN, linear accuracy and RankMe; half as many are classified"
    )
    push_to_hub: str | None = checkpoint_key(
        None, "Hub repository that receives each checkpoint and the final model", card=False, metavar="USER/NAME"
    )
    hub_private_repo: bool = checkpoint_key(False, "require that the Hub repository is private", card=False)
    model_size: Literal["tiny", "small", "base", "large", "huge"] = model_key(
        "base", "encoder size of a new model, as in ViT-Base: sets width, blocks, heads and, for huge, patches of 14"
    )


@dataclass
class PretrainRecipe(ModelKeys, PretrainRunKeys):
    """All keys of `hf-mae pretrain`. This order of the bases lists `model_size` before the keys that it sets."""

    command: ClassVar[str] = "pretrain"

    @property
    def image_sizes(self) -> list[tuple[float, Any]]:
        """(fraction of the run, image size) as `image_size_schedule` says; empty without one."""
        return _points("image_size_schedule", self.image_size_schedule, read_size)

    @property
    def mask_ratios(self) -> list[tuple[float, float]]:
        """(fraction of the run, mask ratio) as `mask_ratio_schedule` says; empty without one."""
        return _points("mask_ratio_schedule", self.mask_ratio_schedule, float)

    def to_dict(self) -> dict[str, Any]:
        """All keys, flat, as a recipe file has them; those of the model only if they were given."""
        return {name: value for name, value in super().to_dict().items() if value is not None or name not in MODEL_KEYS}

    def check(self) -> None:
        super().check()
        self.check_range("eval_crop_pct", low=0.1, high=1)
        self.check_range("image_mean", low=-1e30, high=1e30)
        self.check_range("image_std", low=1e-30, high=1e30)
        _ = self.image_sizes, self.mask_ratios  # raise if they can't be read
        self.check_range("masks_per_image", low=1)
        if self.total_batch_size % self.masks_per_image:
            raise UserError(
                f"total_batch_size {self.total_batch_size} is not a multiple of masks_per_image "
                f"{self.masks_per_image}; it counts an image once for each of its masks"
            )
        self.check_range("max_bad_fraction", high=1)
        self.check_range("quality_steps")
        self.check_range("quality_samples", low=2)


def _points(name: str, words: list[str] | None, read: Callable[[str], T]) -> list[tuple[float, T]]:
    try:
        return read_points(words, read) if words is not None else []
    except ValueError as error:
        raise UserError(f"{name} {error}") from error
