"""What both image processors share: every setting, and images of any kind -> bands, sizes, crops."""

# Shape letters in this file
#   C bands = num_channels   H, W pixels

# transformers' backends redefine the methods of their own base class with other arguments:
# pyright: reportIncompatibleMethodOverride=false

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers.image_processing_base import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import ChannelDimension, PILImageResampling, SizeDict
from transformers.processing_utils import ImagesKwargs
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from .hub_code_mae import NamesCode

# A little less, because half of the weight is common at the edge of missing pixels, and filters round differently.
HALF = 0.499
# Far above every real processor's.
MOST_CHANNELS, MOST_FACTOR = 2**14, 1e6


def resize_bands(
    image: np.ndarray, size: tuple[int, int], resample: int, box: tuple[float, float, float, float] | None = None
) -> np.ndarray:
    """Resize every band with Pillow's filters, keeping the dtype.

    Args:
        image: (H, W, C) uint8, uint16 or float32, in which NaN is a missing pixel (see `resize_present`).
        size: (height, width) of the result in pixels.
        resample: a `PIL.Image.Resampling` filter.
        box: (left, upper, right, lower), the part of the image to read, in pixels; all of it when omitted.

    Returns:
        (height, width, C). uint8 and uint16 are rounded and clipped to their range; float32 may overshoot.

    Raises:
        ValueError: if the array is not three-dimensional or has another dtype.
    """
    if image.ndim != 3 or image.dtype not in (np.uint8, np.uint16, np.float32):
        raise ValueError(
            f"resize_bands got shape {image.shape} and dtype {image.dtype}; pass (height, width, bands) as uint8, "
            "uint16 or float32"
        )
    how = (size[1], size[0]), resample, box
    if image.dtype == np.uint8 and image.shape[-1] == 3:  # one call, with the same result as band by band
        return np.array(Image.fromarray(image).resize(*how))

    def resize(bands: np.ndarray) -> np.ndarray:
        return np.stack([np.asarray(Image.fromarray(band).resize(*how)) for band in bands])

    # Above 8 bits Pillow only filters mode F; its double accumulator keeps a uint16 exact.
    bands = np.moveaxis(image if image.dtype == np.uint8 else image.astype(np.float32), -1, 0)
    if image.dtype == np.float32 and np.isnan(image).any():
        present = resize_present(torch.from_numpy(bands), lambda part: torch.from_numpy(resize(part.numpy())))
        return np.moveaxis(present.numpy(), 0, -1)
    resized = np.moveaxis(resize(bands), 0, -1)
    return resized.round().clip(0, 65535).astype(np.uint16) if image.dtype == np.uint16 else resized


def resize_present(image: torch.Tensor, resize: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Resize bands in which NaN stands for a missing pixel, and which may have none.

    Missing pixels get no weight in the filter, so they don't spread and nothing is blended into their neighbours. Where
    they have more than half of the weight, the result is missing. With missing pixels, every band stays in its range.

    Args:
        image: (..., H, W).
        resize: a linear filter, (..., H, W) -> (..., height, width).
    """
    missing = image.isnan()
    if not missing.any():
        return resize(image)
    weight = resize((~missing).to(image.dtype))
    mean = resize(image.masked_fill(missing, 0)) / weight
    low = image.masked_fill(missing, math.inf).amin((-2, -1), keepdim=True)
    high = image.masked_fill(missing, -math.inf).amax((-2, -1), keepdim=True)
    return mean.clamp(low, high).masked_fill(weight < HALF, math.nan)


def mark_missing(image: Any, nodata: float | None) -> Any:
    """Pixels with the value `nodata`, in any band, become NaN.

    Args:
        image: array or tensor of any shape and number type.
        nodata: value that stands for a missing pixel; None if there is no such value.

    Returns:
        float32 with NaN in place of the value; `image` itself if it doesn't hold it.
    """
    if nodata is None or not (missing := image == nodata).any():
        return image
    marked = image.astype(np.float32) if isinstance(image, np.ndarray) else image.to(torch.float32, copy=True)
    marked[missing] = math.nan
    return marked


def to_opaque(image: Image.Image, num_channels: int) -> Image.Image:
    """An 8-bit image in Pillow's mode L (1 channel) or RGB (3), composited on white where it is transparent.

    The image processors of transformers 5.24 do the same when they convert to RGB. Those of 5.17, and the reference
    code of MAE, drop the alpha band: the colours under transparent pixels then show.
    """
    if image.has_transparency_data:
        opaque = image.convert("RGBA")
        image = Image.new("RGBA", image.size, "white")
        image.alpha_composite(opaque)
    return image.convert("L" if num_channels == 1 else "RGB")


def pil_to_array(image: Image.Image, num_channels: int, do_convert_rgb: bool = True) -> np.ndarray:
    """Pixels of a Pillow image for a model of `num_channels` bands, at the image's own bit depth.

    Args:
        image: any mode; 8-bit modes go through `to_opaque`.
        num_channels: 1, 3, or 4 for a CMYK image or one with transparency.
        do_convert_rgb: with 3 channels, accept other modes than RGB.

    Returns:
        (H, W) or (H, W, C); uint8, uint16 (modes I and I;16), or float32 (mode F). A grey image of more than 8 bits
        stays one band: Pillow's own conversion of it to RGB would clip at 255.

    Raises:
        ValueError: if the mode cannot give `num_channels` bands, or a mode I image exceeds 16 bits.
    """
    if num_channels == 4 and (image.mode == "CMYK" or image.has_transparency_data):
        return np.array(image if image.mode == "CMYK" else image.convert("RGBA"))
    if num_channels not in (1, 3):
        raise ValueError(
            f"a Pillow image of mode {image.mode} cannot give num_channels={num_channels} bands; pass an array of "
            f"shape ({num_channels}, height, width)"
        )
    if num_channels == 3 and image.mode != "RGB" and not do_convert_rgb:
        raise ValueError(
            f"a Pillow image of mode {image.mode} does not have the num_channels=3 bands of RGB; "
            "pass do_convert_rgb=True"
        )
    if image.mode.startswith("I"):
        array = np.array(image)
        if array.min() < 0 or array.max() > 65535:
            raise ValueError(
                f"a Pillow image of mode {image.mode} has values from {array.min()} to {array.max()}, beyond the 16 "
                "bits 0..65535; pass it as a float32 array"
            )
        return array.astype(np.uint16)
    return np.array(image if image.mode == "F" else to_opaque(image, num_channels))


def to_bands(
    image: Image.Image | np.ndarray | torch.Tensor,
    num_channels: int,
    rescale_factor: float | None,
    input_data_format: str | ChannelDimension | None = None,
    do_convert_rgb: bool = True,
) -> torch.Tensor:
    """One image as bands, channels first, at the bit depth that `rescale_factor` expects.

    Args:
        image: a Pillow image; or (H, W), (C, H, W) or (H, W, C) of any numeric dtype. The band axis is the one with
            `num_channels` entries, or the first if both have that many.
        num_channels: number of bands in the result.
        rescale_factor: 1/255 brings 16-bit images to 0..255 (divided by 257, rounded), 1/65535 brings 8-bit images to
            0..65535 (times 257); any other value, or None, leaves the numbers alone.
        input_data_format: "channels_first" or "channels_last"; found from the shape when omitted.
        do_convert_rgb: with 3 channels, repeat a single band and composite a fourth (alpha) on white.

    Returns:
        (C, H, W) as uint8, as int32 with 16-bit values 0..65535 (torch has few operations on uint16), or as float32, to
        which every other dtype is converted with its values unchanged.

    Raises:
        ValueError: if no axis has `num_channels` entries, or as in `pil_to_array`.
    """
    if isinstance(image, Image.Image):
        image = pil_to_array(image, num_channels, do_convert_rgb)
        input_data_format = ChannelDimension.LAST
    if isinstance(image, np.ndarray):  # torch rejects flipped views and foreign byte orders (TIFF, FITS)
        image = torch.from_numpy(np.require(image, image.dtype.newbyteorder("="), ["C", "W"]))
    bands = image
    if bands.dtype != torch.uint8:
        bands = bands.to(torch.int32 if bands.dtype == torch.uint16 else torch.float32)
    to_rgb = num_channels == 3 and do_convert_rgb
    bands = _channels_first(bands, num_channels, input_data_format, to_rgb)
    if to_rgb and len(bands) == 1:
        bands = bands.expand(3, -1, -1)
    elif to_rgb and len(bands) == 4:
        bands = on_white(bands)
    if rescale_factor is None:
        return bands
    if bands.dtype == torch.int32 and math.isclose(rescale_factor, 1 / 255, rel_tol=1e-3):
        return to_8_bits(bands).to(torch.uint8)
    if bands.dtype == torch.uint8 and math.isclose(rescale_factor, 1 / 65535, rel_tol=1e-3):
        return to_16_bits(bands.to(torch.int32))
    return bands


def to_8_bits(wide: Any) -> Any:
    """0..65535 -> 0..255, rounded. For a tensor or an array of integers of more than 16 bits, whose dtype it keeps."""
    return (wide + 128) // 257


def to_16_bits(narrow: Any) -> Any:
    """0..255 -> 0..65535; `to_8_bits` undoes it. For a tensor or an array of 16 bits or more, whose dtype it keeps."""
    return narrow * 257


def band_axis(shape: Sequence[int], counts: Iterable[int], axes: Sequence[int] = (0, 2)) -> int | None:
    """The first of `axes` that holds the bands of an image, a three-dimensional array; None if none does.

    `counts` are the numbers of bands that it may have, the preferred one first.
    """
    if len(shape) != 3:
        return None
    return next((axis for count in counts for axis in axes if shape[axis] == count), None)


def _channels_first(
    image: torch.Tensor, num_channels: int, input_data_format: str | None, to_rgb: bool
) -> torch.Tensor:
    """Move the band axis to the front; with `to_rgb` it may also have one or four bands. See `to_bands`."""
    shape, axes, where = tuple(image.shape), (0, 2), "first or last"
    if image.ndim == 2:
        image, axes = image[None], (0,)
    elif input_data_format is not None:
        first = ChannelDimension(input_data_format) == ChannelDimension.FIRST
        axes, where = ((0,), "first") if first else ((2,), "last")
    axis = band_axis(image.shape, (num_channels, 1, 4) if to_rgb else (num_channels,), axes)
    if axis is not None:
        return image.movedim(axis, 0)
    remedy = "convert it to grey first, or set" if num_channels == 1 else "move the bands there, or set"
    raise ValueError(
        f"an image of shape {shape} does not have num_channels={num_channels} bands on its {where} axis; {remedy} "
        "num_channels to the number of its bands"
    )


def on_white(bands: torch.Tensor) -> torch.Tensor:
    """(C, H, W), the last band being alpha -> (C - 1, H, W) of the same dtype, composited on white.

    Floats must lie in [0, 1], so that white is 1.
    """
    white = {torch.uint8: 255, torch.int32: 65535, torch.float32: 1}[bands.dtype]
    if white == 1 and (bands.min() < 0 or bands.max() > 1):
        raise ValueError(
            f"a float RGBA image has values from {bands.min():g} to {bands.max():g}, beyond [0, 1]; pass its three "
            "colour bands, or all four as uint8"
        )
    alpha = bands[-1:].float() / white
    opaque = bands[:-1].float() * alpha + white * (1 - alpha)
    return opaque if white == 1 else opaque.round().to(bands.dtype)


def shortest_edge_size(height: int, width: int, edge: int) -> tuple[int, int]:
    """(height, width) in pixels after a resize of the shorter side to `edge`; the other is rounded down."""
    short = min(height, width)
    return int(edge * height / short), int(edge * width / short)


def resized_size(height: int, width: int, size: SizeDict) -> tuple[int, int]:
    """(height, width) in pixels after a resize to `size`; the longer side is rounded down, as torchvision does.

    Raises:
        ValueError: if `size` has other keys than "shortest_edge", or "height" and "width"; or if a very long, narrow
            image would become too large for Pillow to open.
    """
    sides = dict(size)
    if sides.keys() == {"shortest_edge"}:
        resized = shortest_edge_size(height, width, sides["shortest_edge"])
        if Image.MAX_IMAGE_PIXELS is not None and resized[0] * resized[1] > Image.MAX_IMAGE_PIXELS:
            raise ValueError(
                f"an image of {height} x {width} pixels would be resized to {resized[0]} x {resized[1]}, beyond "
                "PIL.Image.MAX_IMAGE_PIXELS; crop its centre first"
            )
        return resized
    if sides.keys() == {"height", "width"}:
        return sides["height"], sides["width"]
    raise ValueError(f"size is {sides}; pass {{'shortest_edge': N}} or {{'height': H, 'width': W}}")


def center_spans(
    height: int, width: int, crop_size: SizeDict
) -> tuple[tuple[slice, slice], tuple[tuple[int, int], tuple[int, int]]]:
    """The (rows, columns) to keep, and the zeros (before, after) to add where a side is too short.

    torchvision's CenterCrop rounds half of an odd margin to the even pixel, transformers' rounds it down. They differ
    by one pixel for margins of 4k + 3. This is torchvision's rule.

    Raises:
        ValueError: if `crop_size` has other keys than "height" and "width".
    """
    sides = dict(crop_size)
    if sides.keys() != {"height", "width"}:
        raise ValueError(f"crop_size is {sides}; pass {{'height': H, 'width': W}}")

    def span(length: int, target: int) -> tuple[slice, tuple[int, int]]:
        start, missing = round(max(length - target, 0) / 2), max(target - length, 0)
        return slice(start, start + target), (missing // 2, missing - missing // 2)

    rows, pad_rows = span(height, sides["height"])
    columns, pad_columns = span(width, sides["width"])
    return (rows, columns), (pad_rows, pad_columns)


def per_channel(name: str, value: float | tuple[float, ...], num_channels: int) -> tuple[float, ...]:
    """One number for each channel; a single one is repeated, any other count is a ValueError."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if len(values) not in (1, num_channels):
        raise ValueError(
            f"{name} has {len(values)} entries but num_channels is {num_channels}; pass {num_channels} "
            "(`hf-mae inspect` computes them from a data set), or do_normalize=False"
        )
    return values if len(values) == num_channels else values * num_channels


def check_settings(settings: Mapping[str, Any]) -> None:
    """Check a processor's numbers by name, so that absurd ones don't fill the memory or make infinite pixels.

    Raises:
        ValueError: if a number is out of range; the message names it and the remedy.
    """
    most = Image.MAX_IMAGE_PIXELS or math.inf
    for use, name in (("do_resize", "size"), ("do_center_crop", "crop_size")):
        sides = dict(settings[name]) if settings[use] and settings[name] is not None else {}
        numbers = [number for number in sides.values() if number is not None]
        # One number is the side of a square, at least.
        if numbers and not (min(numbers) >= 1 and numbers[0] * numbers[-1] <= most):
            raise ValueError(
                f"{name} {sides} is not between 1 pixel and PIL.Image.MAX_IMAGE_PIXELS, {most:,}; give e.g. 224"
            )
    if not 1 <= (channels := settings["num_channels"]) <= MOST_CHANNELS:
        raise ValueError(f"num_channels {channels} lies outside 1..{MOST_CHANNELS:,}; give the images' number of bands")
    factor = settings["rescale_factor"]
    if settings["do_rescale"] and factor is not None and not 0 < factor <= MOST_FACTOR:
        raise ValueError(f"rescale_factor {factor} lies outside (0, {MOST_FACTOR:g}]; give e.g. {1 / 255:.8f}, or 1")
    for name, least in (("image_mean", -math.inf), ("image_std", 0)) if settings["do_normalize"] else ():
        value = settings[name]
        values = value if isinstance(value, (tuple, list)) else [value]
        wrong = [number for number in values if isinstance(number, (int, float)) and not least < number < math.inf]
        if wrong:
            kind = "finite" if name == "image_mean" else "positive and finite"
            raise ValueError(f"{name} has the entry {wrong[0]}, which is not {kind}; give e.g. 0.5 for each channel")


class MAEImageProcessorKwargs(ImagesKwargs, total=False):
    """A processor's settings, which a call may override: transformers' keys and ours.

    num_channels: number of bands.
    nodata: value that stands for a missing pixel besides NaN, at the bit depth that `to_bands` gives: 0..255 with a
        `rescale_factor` of 1/255.
    """

    num_channels: int
    nodata: float | int | None


class MAEImageProcessorBase(NamesCode, BaseImageProcessor):
    """The evaluation transform of MAE as class attributes, and the steps that both backends share."""

    code_index, auto_class = "auto_image_processors_mae", "AutoImageProcessor"
    valid_kwargs = MAEImageProcessorKwargs
    model_input_names = ["pixel_values"]

    do_convert_rgb = True
    do_resize = True
    size = {"shortest_edge": 256}
    default_to_square = False
    resample = PILImageResampling.BICUBIC
    do_center_crop = True
    crop_size = {"height": 224, "width": 224}
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    num_channels = 3
    nodata: float | None = None

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Open paths and URLs; local files keep their mode, because transformers' loader would clip 16 bits."""
        if isinstance(image_url_or_urls, str) and os.path.isfile(image_url_or_urls):
            with Image.open(image_url_or_urls) as image:
                return ImageOps.exif_transpose(image)
        return super().fetch_images(image_url_or_urls)

    def _prepare_images_structure(self, images: Any, expected_ndims: int = 3) -> list:
        """A flat list of images; transformers' version rejects (H, W) arrays, which are one band here."""

        def flat(item: Any) -> list:
            if isinstance(item, (list, tuple)):
                return [image for nested in item for image in flat(nested)]
            if isinstance(item, Image.Image) or item.ndim != expected_ndims + 1:
                return [item]
            return list(item)

        return flat(self.fetch_images(images))

    def _to_bands(self, image: Any, kwargs: dict[str, Any]) -> torch.Tensor:
        rescale_factor = kwargs["rescale_factor"] if kwargs["do_rescale"] else None
        layout, to_rgb = kwargs["input_data_format"], kwargs["do_convert_rgb"]
        bands = to_bands(image, kwargs["num_channels"], rescale_factor, layout, to_rgb)
        return mark_missing(bands, kwargs["nodata"])

    def _preprocess_image_like_inputs(self, images: Any, *args: Any, **kwargs: Any) -> BatchFeature:
        check_settings(kwargs)  # before any image is decoded
        if kwargs["do_normalize"]:
            for name in ("image_mean", "image_std"):
                kwargs[name] = per_channel(name, kwargs[name], kwargs["num_channels"])
        return super()._preprocess_image_like_inputs(images, *args, **kwargs)
