"""The parts of fine-tuning: the checkpoint to resume, Trainer's arguments, the classifier, its image processor."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.utils import logging as transformers_logging

from ..classifier_mae import MAEForImageClassification
from ..configuration_mae import MAEConfig
from ..data.labels import Labels
from ..data.mix import RandAugment
from ..data.order import Rows
from ..data.stats import Probe, channels_fit, probe_rows
from ..data.transform import BICUBIC, ImageSpec, crop_settings, default_crop_pct
from ..errors import CheckpointError, DataError, UserError, one_line
from ..image_processing_mae import MAEImageProcessor
from ..keys import names_where
from ..keys.finetune_keys import FinetuneRecipe
from ..optim.groups import train_last_blocks
from ..pretrained import loading, model_failure
from ..run_folder import RunFolder
from .build import describe_failure
from .callbacks import EMA_FILE
from .devices import check_precision, check_processes, environment_flag
from .resume import check_same_recipe

# Weights that a classifier has and a pretrained model lacks.
HEAD = ("classifier.", "fc_norm.", "mae.norm.")


def find_trainer_checkpoint(recipe: FinetuneRecipe, output_dir: Path) -> Path | None:
    """The checkpoint that the run continues from; None for a new run.

    Raises:
        CheckpointError: if the named checkpoint is missing or incomplete, or belongs to a run of another recipe.
    """
    if recipe.resume == "none":
        return None
    # Trainer writes its state last, and EMACallback the average after that.
    needed = ["trainer_state.json"] + ([EMA_FILE] if recipe.ema_decay else [])
    for path in reversed(RunFolder(output_dir).checkpoints()) if recipe.resume == "auto" else [Path(recipe.resume)]:
        if all((path / name).is_file() for name in needed):
            check_run(recipe, path.parent)
            return path
    if recipe.resume == "auto":
        return None
    raise CheckpointError(f"{recipe.resume} is not a complete checkpoint (with {', '.join(needed)}); name another one")


def check_run(recipe: FinetuneRecipe, output_dir: Path) -> None:
    """Raise a CheckpointError if a folder holds a run of another recipe."""
    if before := RunFolder(output_dir).config()[0]:
        check_same_recipe(before, recipe, output_dir, names_where(recipe, free=True))


def training_arguments(recipe: FinetuneRecipe, stored: Path | None, precision: str) -> TrainingArguments:
    """A recipe as Trainer's arguments, except the numbers of steps, which depend on the data.

    Raises:
        UserError: if the recipe can't run on this machine.
    """
    if environment_flag("ACCELERATE_USE_FSDP"):
        raise UserError("fine-tuning runs under DDP, not FSDP; start it with torchrun")
    use_cpu = environment_flag("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    check_precision(precision, use_cpu)
    per_device_batch_size, grad_accum_steps = recipe.micro_batch(int(os.environ.get("WORLD_SIZE", "1")))
    args = TrainingArguments(
        output_dir=str(recipe.output_dir),
        resume_from_checkpoint=str(stored) if stored else None,
        per_device_train_batch_size=per_device_batch_size,
        per_device_eval_batch_size=per_device_batch_size,
        gradient_accumulation_steps=grad_accum_steps,
        learning_rate=recipe.lr,
        # Linear warm-up from 0, then half a cosine, as in optim/schedule.py; it scales each group's learning rate.
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": recipe.min_lr / recipe.lr},
        max_grad_norm=recipe.clip_grad or float("inf"),  # infinity logs the norm without clipping
        use_cpu=use_cpu,  # without it, Trainer refuses bf16 on a CPU
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        torch_compile=recipe.compile,
        seed=recipe.seed,
        data_seed=recipe.seed,
        dataloader_num_workers=recipe.num_workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,  # the collator uses more than the model does
        logging_steps=recipe.log_steps,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_on_start=True,  # a broken evaluation fails now, not after hours of training
        save_strategy="steps",
        save_total_limit=recipe.keep_checkpoints,
        report_to=recipe.log_with or "none",
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
    )
    check_processes(args.world_size)
    # One device per process, as everywhere else: Trainer would spread larger batches over all visible GPUs.
    args._n_gpu = min(args.n_gpu, 1)
    return args


def build_classifier(recipe: FinetuneRecipe, labels: Labels) -> MAEForImageClassification:
    """The classifier to train: a pretrained encoder with a new head, or a fine-tuned model; `trainable_blocks` applies.

    Raises:
        UserError: if the model can't be loaded, has other classes than the data, or fewer blocks than
            `trainable_blocks`.
    """
    given = ("problem_type", "pooling", "drop_path_rate", "trainable_positions", "attn_implementation")
    options: dict[str, Any] = {
        **{name: getattr(recipe, name) for name in given},
        "id2label": dict(enumerate(labels.names)),
        "label2id": {name: i for i, name in enumerate(labels.names)},
        "head_initializer_range": MAEConfig.head_initializer_range,
        "use_safetensors": True,
        "dtype": torch.float32,
    }
    if recipe.image_size is not None:
        options["image_size"] = recipe.image_size
    verbosity = transformers_logging.get_verbosity()
    # transformers would warn about the head's missing weights, which are expected.
    transformers_logging.set_verbosity_error()
    try:
        with loading(describe_failure(model_failure(recipe.model), recipe)):
            known = MAEConfig.from_pretrained(str(recipe.model))
            fine_tuned = "MAEForImageClassification" in (known.architectures or [])
            classes = [name for _, name in sorted(known.id2label.items())]
            if fine_tuned and not recipe.reset_head and classes != list(labels.names):
                raise UserError(
                    f"{recipe.model} has the classes {_some(classes)}, but {recipe.dataset} has {_some(labels.names)}; "
                    "pass --reset_head true for a new head"
                )
            model, info = MAEForImageClassification.from_pretrained(
                recipe.model, output_loading_info=True, ignore_mismatched_sizes=recipe.reset_head, **options
            )
    finally:
        transformers_logging.set_verbosity(verbosity)
    if missing := sorted(name for name in info["missing_keys"] if not name.startswith(HEAD)):
        raise UserError(
            f"--model {recipe.model} lacks {len(missing)} of the encoder's weights, such as {missing[0]}; name a model "
            "that hf-mae pretrain or hf-mae convert wrote"
        )
    if recipe.reset_head:
        torch.nn.init.trunc_normal_(model.classifier.weight, std=model.config.head_initializer_range)
        torch.nn.init.zeros_(model.classifier.bias)
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        train_last_blocks(model, recipe.trainable_blocks)
    except ValueError as error:
        raise UserError(str(error)) from error
    return model


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f", ... ({len(names)})" if len(names) > 5 else "")


def build_processor(recipe: FinetuneRecipe, config: MAEConfig) -> MAEImageProcessor:
    """The pretrained model's processor with the recipe's evaluation crop: bicubic resize, then the centre.

    Raises:
        UserError: if the model's image processor can't be loaded.
    """
    size = config.image_height_width
    settings = crop_settings(size, recipe.eval_crop_pct or default_crop_pct(size))
    settings |= {"do_resize": True, "do_center_crop": True, "resample": int(BICUBIC)}
    try:
        return MAEImageProcessor.from_pretrained(str(recipe.model), **settings)
    except (OSError, ValueError) as error:
        why = f"--model {recipe.model} lacks an image processor ({one_line(error)})"
        raise UserError(f"{why}; save one into its folder") from error


def build_rand_augment(recipe: FinetuneRecipe, spec: ImageSpec, processor: MAEImageProcessor) -> RandAugment | None:
    """The recipe's RandAugment, or None.

    Raises:
        UserError: if timm doesn't know the policy, or the images are not 8-bit grey or colour, or may miss pixels.
    """
    if recipe.rand_augment == "none":
        return None
    if spec.batch_dtype != "uint8" or spec.num_channels not in (1, 3):
        kind = spec.dtype if spec.nodata is None else f"{spec.dtype} with missing pixels (nodata {spec.nodata:g})"
        raise UserError(
            f"rand_augment needs 8-bit grey or colour images, not {spec.num_channels} channels of {kind}; "
            "pass --rand_augment none"
        )
    try:
        return RandAugment(recipe.rand_augment, spec.size, list(processor.image_mean))
    except ValueError as error:
        raise UserError(str(error)) from error


def check_images(rows: Rows, spec: ImageSpec) -> Probe:
    """What the images are like; a DataError if they and the model differ in their number of channels."""
    probe = probe_rows(rows, spec.num_channels)
    num_channels = probe.num_channels
    if not channels_fit(num_channels, spec.num_channels):
        raise DataError(
            f"images of {rows.source.name} have {num_channels} channels, but the model has {spec.num_channels}; "
            f"continue its pretraining on such images first: hf-mae pretrain --model ... --num_channels {num_channels}"
        )
    return probe
