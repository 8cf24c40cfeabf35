"""The parts of a pretraining run: data, model, image processor and starting state, new or from a checkpoint."""

import copy
import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.utils.hub import cached_file

from .. import __version__
from ..configuration_mae import SIZES, MAEConfig
from ..data.order import Rows, StreamPlan
from ..data.sources import open_splits
from ..data.stats import Probe, channel_stats, channels_fit, probe_rows
from ..data.transform import ImageSpec, crop_settings, evaluation_spec, rescale_settings
from ..errors import CheckpointError, DataError, UserError, one_line
from ..image_processing_mae import MAEImageProcessor
from ..keys.run_keys import PretrainRecipe, RunRecipe
from ..modeling_mae import MAEForPreTraining
from ..optim.schedule import stages
from ..pretrained import loading, model_failure
from ..run_folder import PROCESSOR_NAME
from .state import RunState

logger = logging.getLogger(__name__)


@dataclass
class PretrainData:
    """The data of a run."""

    rows: Rows  # for training
    eval_rows: Rows
    num_channels: int  # C, for all images of a batch
    probe: Probe  # what they are like before they are decoded to C channels
    evaluated_on: str  # a description of the evaluation rows


def open_data(recipe: PretrainRecipe) -> PretrainData:
    """Open the training and evaluation rows of a recipe.

    Raises:
        DataError: if the data is missing, or its number of channels differs from `num_channels`.
    """
    rows, eval_rows, evaluated_on = open_splits(recipe, streaming=recipe.streaming)
    probe = probe_rows(rows, recipe.num_channels)
    configured = probe.num_channels if recipe.num_channels is None else recipe.num_channels
    if not channels_fit(probe.num_channels, configured):
        raise DataError(
            f"images of {recipe.dataset} have {probe.num_channels} channels, but num_channels is {configured}; pass "
            f"--num_channels {probe.num_channels}"
        )
    return PretrainData(rows, eval_rows, configured, probe, evaluated_on)


def build_model(recipe: PretrainRecipe, stored: Path | None, num_channels: int) -> MAEForPreTraining:
    """The model of a run, in float32 and training mode.

    Args:
        recipe: the run's recipe. Its `model`, if any, is loaded at the recipe's image size and channels.
        stored: checkpoint to load the model from instead; None for a new run.
        num_channels: C, number of image channels.

    Raises:
        UserError: if the model can't be loaded or built.
    """
    options = {"attn_implementation": recipe.attn_implementation, "dtype": torch.float32}
    failure = f"{stored} can't be loaded" if stored else "the model can't be built"
    if recipe.model and not stored:
        failure = model_failure(recipe.model)
    with loading(describe_failure(failure, recipe)):
        if stored or recipe.model:
            changes = {} if stored else {"num_channels": num_channels, **recipe.given_model_keys()}
            # Only safetensors are loaded, never a pickle.
            options |= {"use_safetensors": True, **changes}
            model = MAEForPreTraining.from_pretrained(stored or recipe.model, **options)
        else:
            model = MAEForPreTraining._from_config(model_config_of(recipe, num_channels), **options)
    if recipe.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if recipe.compile:
        model.compile()
    return model.train()


def describe_failure(what: str, recipe: RunRecipe) -> str:
    """Start of the error message for a model that can't be loaded; names an attention that may be missing."""
    if recipe.attn_implementation in ("eager", "sdpa"):
        return what
    return f"{what} with attn_implementation {recipe.attn_implementation} (eager and sdpa always work)"


def build_processor(
    recipe: PretrainRecipe, stored: Path | None, data: PretrainData, config: MAEConfig
) -> MAEImageProcessor:
    """The model's image processor: sizes, scaling, mean and standard deviation.

    Without `nodata` in the recipe, it has that of the `model` to start from.

    Raises:
        CheckpointError: if the checkpoint's processor can't be loaded.
        UserError: if mean or standard deviation don't have one number per channel.
    """
    if stored:
        try:
            return MAEImageProcessor.from_pretrained(stored)
        except (OSError, ValueError) as error:
            message = f"the image processor in {stored} can't be loaded; name another checkpoint"
            raise CheckpointError(message) from error
    nodata = recipe.nodata if recipe.nodata is not None or not recipe.model else stored_nodata(recipe.model)
    most = {"uint8": 255, "uint16": 65_535}.get(data.probe.dtype)
    if nodata is not None and most and not (0 <= nodata <= most and nodata % 1 == 0):
        what = f"nodata {nodata:g} can't be a pixel of {data.probe.dtype} images"
        raise UserError(f"{what}; give a whole number from 0 to {most}, or none")
    mean, std = recipe.image_mean, recipe.image_std
    if mean is None or std is None:
        if data.num_channels == 3 and data.probe.dtype == "uint8":
            mean, std = list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD)
        else:
            stats = channel_stats(data.rows, data.num_channels, data.probe.dtype, nodata=nodata)
            mean, std = stats["image_mean"], stats["image_std"]
    for name, values in (("image_mean", mean), ("image_std", std)):
        if len(values) != data.num_channels:
            raise UserError(f"{name} has {len(values)} numbers for {data.num_channels} channels; give one per channel")
    return MAEImageProcessor(
        num_channels=data.num_channels,  # pyright: ignore[reportCallIssue] (its own key, unknown to the base class)
        nodata=nodata,  # pyright: ignore[reportCallIssue]
        **crop_settings(config.image_height_width, recipe.eval_crop_pct),
        image_mean=mean,
        image_std=std,
        **rescale_settings(data.probe.dtype),
    )


def stored_nodata(model: str) -> float | None:
    """The `nodata` of a model's image processor; None if it has none, or no image processor."""
    with loading(model_failure(model)):
        if cached_file(model, PROCESSOR_NAME, _raise_exceptions_for_missing_entries=False) is None:
            return None
        return MAEImageProcessor.from_pretrained(model).nodata


def make_spec(recipe: PretrainRecipe, data: PretrainData, config: MAEConfig, processor: MAEImageProcessor) -> ImageSpec:
    """The crop, dtype and masks of the images in a batch."""
    return replace(
        evaluation_spec(config, processor),
        num_channels=data.num_channels,
        crop_scale=(recipe.crop_scale[0], recipe.crop_scale[-1]),
        flip=recipe.flip,
        masks=recipe.masks_per_image,
    )


def make_training_specs(
    recipe: PretrainRecipe, spec: ImageSpec, config: MAEConfig, total_steps: int
) -> list[tuple[int, ImageSpec]]:
    """(first step from 0, spec of the training images from that step on), by `image_size_schedule`.

    Raises:
        UserError: if a size or mask ratio doesn't fit the model, or the last size is not the model's own.
    """
    points = recipe.image_sizes or [(0.0, config.image_size)]
    specs = []
    for at, size in points:
        sized = copy.deepcopy(config)
        sized.image_size = size
        try:
            sized.check()
            for ratio in [config.mask_ratio, *(ratio for _, ratio in recipe.mask_ratios)]:
                if sized.num_kept_patches(ratio) == sized.num_patches:
                    raise ValueError(f"mask_ratio {ratio} hides none of the {sized.num_patches} patches; use e.g. 0.75")
        except ValueError as error:
            raise UserError(f"image_size {size}, from fraction {at:g} of the run on: {error}") from error
        specs.append((at, replace(spec, size=sized.image_height_width, num_patches=sized.num_patches)))
    if specs[-1][1].size != config.image_height_width:
        raise UserError(
            f"image_size_schedule ends with {points[-1][1]}, but image_size is {config.image_size}; make them equal"
        )
    return stages(specs, total_steps)


def start_state(
    recipe: PretrainRecipe, data: PretrainData, total_steps: int, ranks: int, stored: RunState | None
) -> RunState:
    """The state that a run starts from: step 0, or the `stored` state of its checkpoint.

    Raises:
        CheckpointError: if the data differs from the checkpoint's, unless `allow_data_change` is set.
    """
    # All that the order of samples depends on besides the seed, in JSON's types.
    facts = {name: value for name, value in data.rows.source.fingerprint.items() if name != "labels"}
    fingerprint = json.loads(json.dumps({**facts, "num_samples": len(data.rows)}))
    if stored is None:
        access = data.rows.source.random_access
        plan = StreamPlan.choose(recipe.images_per_step, ranks, recipe.num_workers, len(data.rows), access)
        return RunState(recipe.to_dict(), total_steps, plan, [0] * plan.num_streams, fingerprint)
    if stored.fingerprint != fingerprint:
        change = f"{data.rows.source.name} is not the data that this run was trained on (its files or rows changed)"
        if not recipe.allow_data_change:
            raise CheckpointError(f"{change}; restore the old data, or pass --allow_data_change true")
        logger.warning("%s; continuing with it, in a different order of samples from here on", change)
    # A resume may change some keys, so the recipe and all that follows from it are new.
    own = {"recipe": recipe.to_dict(), "total_steps": total_steps, "fingerprint": fingerprint, "version": __version__}
    return replace(stored, **own)


def model_config_of(recipe: PretrainRecipe, num_channels: int) -> MAEConfig:
    """Configuration of a new model: the row of its size, with `num_channels` and the recipe's model keys on top.

    Raises:
        UserError: if a model key is out of range, has the wrong type, or contradicts another.
    """
    keys = {**SIZES[recipe.model_size], "num_channels": num_channels, **recipe.given_model_keys()}
    try:
        return MAEConfig(**keys)
    except (ValueError, StrictDataclassError) as error:
        raise UserError(one_line(error)) from error
