"""Convert image processors of transformers' ViT models and timm's settings to ours, and back."""

from pathlib import Path
from typing import Any

from transformers import ViTImageProcessor
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..configuration_mae import MAEConfig
from ..data.transform import crop_settings, default_crop_pct, stored_crop_pct
from ..files import read_json
from ..image_processing_mae import MAEImageProcessor
from ..run_folder import PROCESSOR_NAME

# Settings besides sizes that our image processor and ViTImageProcessor share.
SETTINGS = ("do_resize", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std", "resample")
# timm's names of PIL.Image.Resampling
INTERPOLATION = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}


def evaluation_processor(config: MAEConfig, crop_pct: float | None = None, **settings: Any) -> MAEImageProcessor:
    """The original's evaluation transform with explicit sizes: resize the shorter side, then crop the centre.

    Args:
        config: of the model, for its image size and channels.
        crop_pct: the crop's share of the resized side; `default_crop_pct` when omitted.
        **settings: other settings; mean and standard deviation are ImageNet's when omitted.
    """
    size = config.image_height_width
    crop = crop_settings(size, crop_pct or default_crop_pct(size))
    normalization: dict[str, Any] = {"image_mean": IMAGENET_DEFAULT_MEAN, "image_std": IMAGENET_DEFAULT_STD}
    return adapt_channels(MAEImageProcessor(**(crop | normalization | settings)), config.num_channels)


def adapt_channels(processor: MAEImageProcessor, num_channels: int) -> MAEImageProcessor:
    """Set mean and standard deviation for another number of channels: each gets the average of the old values."""
    for name in ("image_mean", "image_std"):
        values = list(getattr(processor, name))
        setattr(processor, name, values if len(values) == num_channels else [sum(values) / len(values)] * num_channels)
    processor.num_channels = num_channels
    return processor


def read_processor(folder: Path, config: MAEConfig) -> MAEImageProcessor:
    """Read an image processor: ours as it is; of others the normalisation, and their crop if they have one.

    transformers' ViTMAE squeezes images to 224 x 224 where the original's evaluation resizes and crops them.
    """
    file = folder / PROCESSOR_NAME
    stored = read_json(file) if file.exists() else {}
    if str(stored.get("image_processor_type", "")).startswith("MAE"):
        return MAEImageProcessor.from_pretrained(folder)
    settings = {key: stored[key] for key in SETTINGS if key in stored and key != "resample"}
    if stored.get("do_center_crop"):
        settings |= {key: stored[key] for key in ("size", "crop_size", "resample") if key in stored}
    return evaluation_processor(config, **settings)


def write_transformers_processor(processor: MAEImageProcessor, folder: Path) -> None:
    """Write an equivalent `ViTImageProcessor`; its crop may be one pixel off (see `center_spans`)."""
    settings = {key: getattr(processor, key) for key in (*SETTINGS, "size", "crop_size", "do_center_crop")}
    ViTImageProcessor(**settings, do_convert_rgb=processor.num_channels == 3).save_pretrained(folder)


def read_timm_processor(pretrained: dict[str, Any], config: MAEConfig) -> MAEImageProcessor:
    """Our image processor for the transform that timm builds from a model's `pretrained_cfg`."""
    known = {f"image_{key}": list(pretrained[key]) for key in ("mean", "std") if pretrained.get(key)}
    resample = INTERPOLATION.get(pretrained.get("interpolation", "bicubic"), 3)
    return evaluation_processor(config, pretrained.get("crop_pct"), resample=resample, **known)


def timm_settings(processor: MAEImageProcessor, config: MAEConfig) -> dict[str, Any]:
    """The image settings for timm's `pretrained_cfg`."""
    names = {number: name for name, number in INTERPOLATION.items()}
    return {
        "input_size": [config.num_channels, *config.image_height_width],
        "crop_pct": stored_crop_pct(processor),
        "interpolation": names.get(int(processor.resample), "bicubic"),
        "mean": list(processor.image_mean),
        "std": list(processor.image_std),
    }
