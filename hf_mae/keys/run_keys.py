"""The keys of `hf-mae pretrain`: names, defaults, groups and help."""

from dataclasses import dataclass
from typing import Literal

from ..keys import key
from .model_keys import ModelKeys


@dataclass
class RunKeys:
    """The keys that every training run has; the defaults are pretraining's."""

    recipe: str | None = key(
        None, "recipe to start from: a name of the package, or a YAML file", free=True, metavar="NAME|FILE"
    )
    dataset: str = key("digits", "Hub id, folder or URL of images, parquet or tar shards", group="data")
    dataset_config: str | None = key(None, "configuration name of a Hub data set", group="data", metavar="NAME")
    dataset_revision: str | None = key(None, "branch, tag or commit of a Hub data set", group="data", metavar="NAME")
    split: str = key("train", "split to train on", group="data", metavar="NAME")
    eval_dataset: str | None = key(None, "data set to evaluate on", group="data", shown="the training one")
    eval_split: str | None = key(
        None, "split to evaluate on", group="data", metavar="NAME", shown="found by name, or a held-out part"
    )
    image_column: str | None = key(None, "column of the images", group="data", metavar="NAME", shown="found by type")
    label_column: str | None = key(
        None, "column of the labels", group="data", metavar="NAME", shown="found by type or name"
    )
    max_samples: int | None = key(None, "maximum number of training images", group="data", shown="all")
    max_eval_samples: int | None = key(2048, "maximum number of evaluation images", group="evaluation", free=True)
    crop_scale: list[float] = key(
        [0.2, 1.0], "smallest and largest area of a random crop, as fractions of the image", group="data"
    )
    flip: bool = key(True, "mirror half of the training images", group="data")
    model: str | None = key(
        None, "folder or Hub id of a model to start from", group="model", metavar="DIR|ID", shown="from scratch"
    )
    total_batch_size: int = key(4096, "images per optimizer step, over all processes", group="optimization")
    per_device_batch_size: int | None = key(
        None, "images per device at once", group="hardware", free=True, shown="the largest that fits the step, up to 64"
    )
    epochs: float | None = key(800, "passes over the data; total_steps takes precedence", group="optimization")
    total_steps: int | None = key(None, "optimizer steps of the run", group="optimization", shown="from epochs")
    warmup_epochs: float = key(
        40, "linear warm-up in epochs, at most a tenth of the run; warmup_steps takes precedence", group="optimization"
    )
    warmup_steps: int | None = key(
        None, "linear warm-up in optimizer steps", group="optimization", shown="from warmup_epochs"
    )
    blr: float = key(
        1.5e-4, "base learning rate per 256 images: lr = blr * total_batch_size / 256", group="optimization"
    )
    min_lr: float = key(0.0, "learning rate at the end of the cosine schedule", group="optimization")
    weight_decay: float = key(0.05, "AdamW's weight decay, except for biases and norms", group="optimization")
    adam_beta1: float = key(0.9, "AdamW's decay of the gradient's running mean", group="optimization")
    adam_beta2: float = key(0.95, "AdamW's decay of the squared gradient's running mean", group="optimization")
    clip_grad: float | None = key(None, "largest norm of the gradient", group="optimization", shown="no clipping")
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = key(
        "auto", "precision of the forward pass; auto uses bf16 on GPUs that have it", group="hardware", free=True
    )
    gradient_checkpointing: bool = key(False, "save memory by computing activations twice", group="hardware", free=True)
    compile: bool = key(False, "compile the model with torch.compile", group="hardware", free=True)
    attn_implementation: str = key(
        "sdpa", "attention kernel, such as eager, sdpa or flash_attention_2", group="hardware", free=True
    )
    deterministic: bool = key(
        False, "repeat a run bit by bit on a GPU too, at some cost in speed", group="hardware", free=True
    )
    output_dir: str | None = key(
        None, "folder of the run", group="checkpoints", free=True, metavar="DIR", shown="outputs/RECIPE"
    )
    resume: str = key(
        "none",
        "checkpoint to continue from: auto takes the newest complete one, if any",
        group="checkpoints",
        free=True,
        metavar="auto|none|DIR",
    )
    seed: int = key(0, "random seed of weights, order, crops, flips and masks", group="optimization")
    num_workers: int = key(2, "loader processes for each training process", group="hardware", free=True)
    log_steps: int = key(20, "steps between two lines of the log", group="logging", free=True)
    eval_steps: int | None = key(
        None, "steps between two evaluations", group="evaluation", free=True, shown="a tenth of the run"
    )
    save_steps: int | None = key(
        None, "steps between two checkpoints", group="checkpoints", free=True, shown="a tenth of the run"
    )
    keep_checkpoints: int = key(2, "number of newest checkpoints to keep, 2 or more", group="checkpoints", free=True)
    log_with: str | None = key(
        None, "trackers: tensorboard, wandb, trackio or all", group="logging", free=True, metavar="NAME", shown="none"
    )
    dry_run: bool = key(False, "show the run and stop before the first step", group="logging", free=True)


@dataclass
class PretrainRunKeys(RunKeys):
    """The keys that pretraining adds to those of every run, except the model's."""

    masks_per_image: int = key(
        1, "masks per decoded image in a step; total_batch_size counts every mask", group="masking"
    )
    image_size_schedule: list[str] | None = key(
        None, "image sizes by fraction of the run, such as 0:128 0.5:160 0.8:224", group="data", metavar="FRACTION:SIZE"
    )
    mask_ratio_schedule: list[str] | None = key(
        None, "mask ratios by fraction of the run, such as 0:0.6 0.5:0.75", group="masking", metavar="FRACTION:RATIO"
    )
    streaming: bool | None = key(
        None, "read the data in place, block by block", group="data", shown="true for remote data"
    )
    allow_data_change: bool = key(
        False, "resume although the data differs from the checkpoint's", group="checkpoints", free=True
    )
    max_bad_fraction: float = key(
        0.01, "stop when a larger fraction of the images can't be decoded", group="data", free=True
    )
    eval_crop_pct: float = key(
        0.875, "fraction of the resized side that the evaluation crop keeps, e.g. 224 of 256", group="evaluation"
    )
    image_mean: list[float] | None = key(
        None,
        "mean of each channel, for pixels in [0, 1]",
        group="data",
        shown="ImageNet's for 8-bit RGB, else measured",
    )
    image_std: list[float] | None = key(
        None,
        "standard deviation of each channel, for pixels in [0, 1]",
        group="data",
        shown="ImageNet's for 8-bit RGB, else measured",
    )
    quality_steps: int | None = key(
        None,
        "steps between two measurements of kNN, linear accuracy and RankMe; 0 for none",
        group="evaluation",
        free=True,
        shown="a fifth of the run",
    )
    quality_samples: int = key(
        2000, "training images for these measurements; half as many are classified", group="evaluation", free=True
    )
    push_to_hub: str | None = key(
        None,
        "Hub repository that receives each checkpoint and the final model",
        group="checkpoints",
        free=True,
        metavar="USER/NAME",
    )
    hub_private_repo: bool = key(False, "require that the Hub repository is private", group="checkpoints", free=True)
    model_size: Literal["tiny", "small", "base", "large", "huge"] = key(
        "base", "row of the table of model sizes", group="model"
    )


@dataclass
class PretrainKeys(ModelKeys, PretrainRunKeys):
    """All keys of `hf-mae pretrain`; the bases in this order put `model_size` before what it sets."""
