"""Crop and flip: the training view of an image, drawn from its own random numbers, and the evaluation view.

The paper pretrains with random resized crops and flips and nothing else (Appendix A.1; no colour changes, Table 1e).
"""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from ..image_processing_pil_mae import resize_bands

BICUBIC = Image.Resampling.BICUBIC
LONGEST = 100  # times the shorter side


def sample_rng(seed: int, epoch: int, shard: int, row: int) -> np.random.Generator:
    """The random numbers of one sample in one epoch: the same on every machine, rank, worker and resume."""
    return np.random.default_rng([seed, epoch, shard, row])


def random_resized_crop_box(
    rng: np.random.Generator,
    height: int,
    width: int,
    size: tuple[int, int],
    scale: Sequence[float] = (0.2, 1.0),
    ratio: Sequence[float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    """Draw a crop as torchvision's RandomResizedCrop does, for an output of any shape.

    Args:
        rng: source of the numbers.
        height: of the image, pixels.
        width: of the image, pixels.
        size: (height, width) of the output; `ratio` is relative to its aspect, so that a non-square output is
            not squeezed. For a square one this is torchvision's rule.
        scale: smallest and largest fraction of the image's area, in (0, 1] (0.2 and 1 in the paper).
        ratio: smallest and largest width/height, relative to the output's.

    Returns:
        (left, upper, right, lower) in pixels, as Pillow counts.
    """
    aspect = size[1] / size[0]
    smallest, largest = math.log(ratio[0] * aspect), math.log(ratio[1] * aspect)
    for _ in range(10):
        area = height * width * rng.uniform(scale[0], scale[1])
        shape = math.exp(rng.uniform(smallest, largest))
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
            return left, top, left + w, top + h
    # No luck, with very long images: the largest central crop of an allowed shape.
    shape = min(max(width / height, math.exp(smallest)), math.exp(largest))
    w, h = min(width, max(1, round(height * shape))), min(height, max(1, round(width / shape)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def training_view(
    image: Image.Image | np.ndarray,
    rng: np.random.Generator,
    size: tuple[int, int],
    scale: Sequence[float] = (0.2, 1.0),
    flip: bool = True,
) -> np.ndarray:
    """Random resized crop (bicubic) and horizontal flip.

    Args:
        image: as `decode_image` returns it.
        rng: the sample's own numbers; four to forty of them are used up.
        size: (height, width) of the output in pixels.
        scale: smallest and largest fraction of the area that a crop keeps.
        flip: mirror half of the crops.

    Returns:
        (C, H, W) in the image's dtype.
    """
    height, width = _height_width(image)
    view = _resize(image, size, random_resized_crop_box(rng, height, width, size, scale))
    if flip and rng.random() < 0.5:
        view = view[:, ::-1]
    return np.ascontiguousarray(view.transpose(2, 0, 1))


def evaluation_view(
    image: Image.Image | np.ndarray, resize: int | tuple[int, int], size: tuple[int, int]
) -> np.ndarray:
    """Resize (bicubic) and centre crop, pixel by pixel what the Pillow image processor does.

    Of an image more than `LONGEST` times as long as it is wide, the middle alone is resized. The crop shows no more,
    and the whole of a line of 65,535 pixels would become one of 256 x 16,776,960.

    Args:
        image: as `decode_image` returns it.
        resize: pixels of the shorter side, or (height, width), before the crop.
        size: (height, width) of the crop in pixels, not larger than what it is cut from.

    Returns:
        (C, H, W) in the image's dtype.
    """
    height, width = _height_width(image)
    left = upper = 0
    if isinstance(resize, int):
        left, upper = max(0, (width - LONGEST * height) // 2), max(0, (height - LONGEST * width) // 2)
        height, width = height - 2 * upper, width - 2 * left
        short = min(height, width)
        resize = (
            resize if height == short else int(resize * height / width),
            resize if width == short else int(resize * width / height),
        )
    view = _resize(image, resize, (left, upper, left + width, upper + height))
    top, left = round((resize[0] - size[0]) / 2), round((resize[1] - size[1]) / 2)
    view = view[top : top + size[0], left : left + size[1]]
    return np.ascontiguousarray(view.transpose(2, 0, 1))


def evaluation_resize(size: tuple[int, int], crop_pct: float) -> int | tuple[int, int]:
    """What to resize to before the centre crop: the shorter side for square crops, else (height, width).

    Args:
        size: (height, width) of the crop in pixels.
        crop_pct: the crop's share of the resized side, in (0, 1]: 0.875 is 224 of 256.
    """
    height, width = (round(side / crop_pct) for side in size)
    return height if size[0] == size[1] else (height, width)


def _height_width(image: Image.Image | np.ndarray) -> tuple[int, int]:
    return image.shape[:2] if isinstance(image, np.ndarray) else (image.height, image.width)  # type: ignore[return-value]


def _resize(
    image: Image.Image | np.ndarray, size: tuple[int, int], box: tuple[float, float, float, float]
) -> np.ndarray:
    """The box of an image, resized to (height, width), as (H, W, C)."""
    if isinstance(image, np.ndarray):
        return resize_bands(image, size, BICUBIC, box=box)
    view = np.asarray(image.resize((size[1], size[0]), BICUBIC, box=box))
    return view if view.ndim == 3 else view[..., None]
