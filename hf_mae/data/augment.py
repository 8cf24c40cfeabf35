"""Crop and flip: the training view of an image, drawn with the image's own random generator.

The paper pretrains with random resized crops and flips and nothing else (Appendix A.1; no colour changes, Table 1e).
Fine-tuning's other changes are in mix.py, the evaluation view is in transform.py.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ..image_processing_base_mae import resize_bands
from .transform import BICUBIC, RATIO, size_of


def sample_rng(seed: int, epoch: int, shard: int, row: int) -> np.random.Generator:
    """The random generator of a sample in an epoch: the same on every machine, rank and worker, and after a resume."""
    return np.random.default_rng([seed, epoch, shard, row])


def random_resized_crop_box(
    rng: np.random.Generator,
    height: int,
    width: int,
    size: tuple[int, int],
    scale: Sequence[float] = (0.2, 1.0),
    ratio: Sequence[float] = RATIO,
    one_draw: bool = False,
) -> tuple[int, int, int, int]:
    """Draw a crop as torchvision's RandomResizedCrop does, for an output of any shape.

    Args:
        rng: random generator to draw from.
        height, width: size of the image in pixels.
        size: (height, width) of the output in pixels. `ratio` is relative to its aspect ratio, so that a non-square
            output is not squeezed. For a square output this is torchvision's rule.
        scale: smallest and largest fraction of the image's area, in (0, 1] (0.2 and 1 in the paper).
        ratio: smallest and largest width/height, relative to the output's.
        one_draw: clip a box that is larger than the image, where torchvision draws again. The paper's TensorFlow code
            did this, and the official linear probe follows it.

    Returns:
        (left, upper, right, lower) in pixels, as Pillow counts.
    """
    aspect = size[1] / size[0]
    smallest, largest = math.log(ratio[0] * aspect), math.log(ratio[1] * aspect)
    for _ in range(10):
        area = height * width * rng.uniform(scale[0], scale[1])
        shape = math.exp(rng.uniform(smallest, largest))
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if one_draw:
            w, h = min(max(w, 1), width), min(max(h, 1), height)
        if 0 < w <= width and 0 < h <= height:
            top, left = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
            return left, top, left + w, top + h
    # Every draw failed, which happens with very long images: take the largest central crop of an allowed shape.
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
    one_draw: bool = False,
) -> np.ndarray:
    """Random resized crop (bicubic, antialiased) and horizontal flip.

    As in torchvision, pixels outside the crop don't influence it. torch resizes 8-bit pixels in a quarter of Pillow's
    time. The results differ by 1 at most, except where a filter overshoots 0 or 255.

    Args:
        image: as `decode_image` returns it.
        rng: the sample's random generator; 4 to 40 numbers are drawn.
        size, scale, flip, one_draw: `size`, `crop_scale`, `flip` and `one_draw` of `ImageSpec`.

    Returns:
        (C, H, W) in the image's dtype.
    """
    height, width = size_of(image)
    view = _crop_and_resize(image, size, random_resized_crop_box(rng, height, width, size, scale, one_draw=one_draw))
    if flip and rng.random() < 0.5:
        # PyTorch 2.11 can't flip uint16 on a CPU, so flip the same bytes as int16.
        view = view.view(torch.int16).flip(-1).view(torch.uint16) if view.dtype == torch.uint16 else view.flip(-1)
    return view.numpy()


def _crop_and_resize(
    image: Image.Image | np.ndarray, size: tuple[int, int], box: tuple[int, int, int, int]
) -> torch.Tensor:
    """Cut the box out of an image, then resize it to (height, width); returns a contiguous (C, H, W)."""
    left, upper, right, lower = box
    crop = image[upper:lower, left:right] if isinstance(image, np.ndarray) else np.array(image.crop(box))
    if crop.dtype != np.uint8:
        return torch.from_numpy(resize_bands(crop, size, BICUBIC)).permute(2, 0, 1).contiguous()
    pixels = torch.from_numpy(crop if crop.ndim == 3 else crop[:, :, None]).permute(2, 0, 1)
    return F.interpolate(pixels[None], size, mode="bicubic", antialias=True)[0].contiguous()
