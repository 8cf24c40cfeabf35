"""Crop and flip: the training view of an image, drawn from its own random numbers, and the evaluation view.

The paper pretrains with random resized crops and flips and nothing else (Appendix A.1; no colour changes, Table 1e).
What fine-tuning adds comes last: RandAugment, random erasing, mixup and cutmix (Table 9).
"""

import contextlib
import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torchvision.transforms import v2

from ..image_processing_base_mae import resize_bands

BICUBIC = Image.Resampling.BICUBIC
LONGEST = 100  # times the shorter side
RATIO = (3 / 4, 4 / 3)  # width/height of crops, relative to the output's


def sample_rng(seed: int, epoch: int, shard: int, row: int) -> np.random.Generator:
    """The random numbers of one sample in one epoch: the same on every machine, rank, worker and resume."""
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

    With `one_draw`, as the paper's TensorFlow code did, which the official linear probe follows: sides that are longer
    than the image's are cut to it, where torchvision draws again.

    Args:
        rng: source of the numbers.
        height: of the image, pixels.
        width: of the image, pixels.
        size: (height, width) of the output; `ratio` is relative to its aspect, so that a non-square output is
            not squeezed. For a square one this is torchvision's rule.
        scale: smallest and largest fraction of the image's area, in (0, 1] (0.2 and 1 in the paper).
        ratio: smallest and largest width/height, relative to the output's.
        one_draw: cut what is too long instead of drawing again.

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
    # No luck, with very long images: the largest central crop of an allowed shape.
    shape = min(max(width / height, math.exp(smallest)), math.exp(largest))
    w, h = min(width, max(1, round(height * shape))), min(height, max(1, round(width / shape)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def pixels_needed(size: tuple[int, int], scale: Sequence[float]) -> int:
    """Pixels of an image of which every random crop has the output's height and width, so that none is enlarged."""
    return math.ceil(size[0] * size[1] * RATIO[1] / scale[0])


def training_view(
    image: Image.Image | np.ndarray,
    rng: np.random.Generator,
    size: tuple[int, int],
    scale: Sequence[float] = (0.2, 1.0),
    flip: bool = True,
    one_draw: bool = False,
) -> np.ndarray:
    """Random resized crop (bicubic, antialiased) and horizontal flip.

    As in torchvision, what lies outside the crop has no part in it. Pixels of 8 bits are resized by torch, whose vector
    instructions need a quarter of Pillow's time; where a filter overshoots 0 or 255 the two differ, elsewhere by 1.

    Args:
        image: as `decode_image` returns it.
        rng: the sample's own numbers; four to forty of them are used up.
        size: (height, width) of the output in pixels.
        scale: smallest and largest fraction of the area that a crop keeps.
        flip: mirror half of the crops.
        one_draw: see `random_resized_crop_box`.

    Returns:
        (C, H, W) in the image's dtype.
    """
    height, width = _height_width(image)
    view = _crop_and_resize(image, size, random_resized_crop_box(rng, height, width, size, scale, one_draw=one_draw))
    if flip and rng.random() < 0.5:
        view = view.flip(-1)
    return view.numpy()


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


def _crop_and_resize(
    image: Image.Image | np.ndarray, size: tuple[int, int], box: tuple[int, int, int, int]
) -> torch.Tensor:
    """The box of an image, cut out and then resized to (height, width), as a contiguous (C, H, W)."""
    left, upper, right, lower = box
    crop = image[upper:lower, left:right] if isinstance(image, np.ndarray) else np.array(image.crop(box))
    if crop.dtype != np.uint8:
        return torch.from_numpy(resize_bands(crop, size, BICUBIC)).permute(2, 0, 1).contiguous()
    pixels = torch.from_numpy(crop if crop.ndim == 3 else crop[:, :, None]).permute(2, 0, 1)
    return F.interpolate(pixels[None], size, mode="bicubic", antialias=True)[0].contiguous()


def _resize(
    image: Image.Image | np.ndarray, size: tuple[int, int], box: tuple[float, float, float, float]
) -> np.ndarray:
    """The box of an image, resized to (height, width), as (H, W, C)."""
    if isinstance(image, np.ndarray):
        return resize_bands(image, size, BICUBIC, box=box)
    view = np.asarray(image.resize((size[1], size[0]), BICUBIC, box=box))
    return view if view.ndim == 3 else view[..., None]


# ---------------------------------------------------------------------------------------------- fine-tuning


@contextlib.contextmanager
def seeded(rng: np.random.Generator) -> Iterator[None]:
    """Let a library that draws from the global generators (of Python, numpy, torch's CPU) draw from `rng` instead."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = int(rng.integers(2**32))
    random.seed(seed)
    np.random.seed(seed)
    # Not torch.manual_seed, which seeds the GPUs too: drop path would draw the same numbers again and again.
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


class RandAugment:
    """RandAugment (arXiv:1909.13719) by timm, whose words for it the recipes use; for 8-bit gray and colour.

    Args:
        policy: `rand-m9-mstd0.5-inc1`: two random changes of magnitude 9 of 10, each made in half of the cases, with a
            standard deviation of 0.5, all of them stronger with the magnitude.
        size: (height, width) of the images in pixels.
        image_mean: (C,) in [0, 1]: what fills the corners that a rotation leaves empty.

    Raises:
        ValueError: if timm doesn't know the words.
    """

    def __init__(self, policy: str, size: tuple[int, int], image_mean: Sequence[float]):
        from timm.data.auto_augment import rand_augment_transform

        fill = tuple(round(255 * value) for value in image_mean)
        options = {"translate_const": int(min(size) * 0.45), "interpolation": BICUBIC}
        try:
            self.transform = rand_augment_transform(policy, {**options, "img_mean": fill * (3 // len(fill))})
        except (AssertionError, ValueError) as error:
            raise ValueError(f"rand_augment {policy} is nothing that timm knows; use rand-m9-mstd0.5-inc1") from error
        for change in self.transform.ops:
            if change.name.startswith("Posterize"):
                change.aug_fn = _posterize

    def __call__(self, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """(C, H, W) uint8 -> the same, changed by the numbers of `rng`; C is 1 or 3."""
        gray = pixels.shape[0] == 1
        image = Image.fromarray(pixels[0] if gray else np.ascontiguousarray(pixels.transpose(1, 2, 0))).convert("RGB")
        with seeded(rng):
            image = self.transform(image)
        return np.asarray(image.convert("L"))[None] if gray else np.asarray(image).transpose(2, 0, 1)


def _posterize(image: Image.Image, bits: int, **options: Any) -> Image.Image:
    """timm asks for 0 bits where a magnitude reaches 10; it made a black image until Pillow refused it."""
    return ImageOps.posterize(image, max(bits, 1))


class RandomErasing:
    """Random erasing (arXiv:1708.04896), "pixel" mode: a rectangle of 2 to 33 % of the area becomes noise, N(0, 1).

    Args:
        probability: of an image to be changed, in [0, 1].
    """

    def __init__(self, probability: float):
        self.transform = v2.RandomErasing(probability, scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3), value="random")  # type: ignore[arg-type]

    def __call__(self, pixel_values: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        """(C, H, W) normalised pixels -> the same."""
        with seeded(rng):
            return self.transform(pixel_values)


class Mixing:
    """Mixup (arXiv:1710.09412) or cutmix (arXiv:1905.04899) of a batch, an even chance each, then label smoothing.

    Image i is mixed with image i - 1. Where neither mixing nor smoothing is on, labels stay class indices.

    Args:
        num_classes: of the labels.
        mixup: both parameters of the Beta distribution of mixup's weight; 0: none (0.8 in the paper, Table 9).
        cutmix: the same of cutmix (1.0 in the paper).
        label_smoothing: share of each label that is spread over all classes, in [0, 1) (0.1 in the paper).
    """

    def __init__(self, num_classes: int, mixup: float = 0.0, cutmix: float = 0.0, label_smoothing: float = 0.0):
        self.num_classes, self.label_smoothing = num_classes, label_smoothing
        self.ways = [v2.MixUp(alpha=mixup, num_classes=num_classes)] if mixup else []
        self.ways += [v2.CutMix(alpha=cutmix, num_classes=num_classes)] if cutmix else []

    def __call__(
        self, pixel_values: torch.Tensor, labels: torch.Tensor, rng: np.random.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mix a batch.

        Args:
            pixel_values: (B, C, H, W).
            labels: (B,) class indices.
            rng: source of the numbers; torch's global generator when omitted.

        Returns:
            (B, C, H, W), and (B, num_classes) float32 rows that sum to 1 (or `labels`, if nothing is on).
        """
        with seeded(rng) if rng else contextlib.nullcontext():
            if self.ways:
                way = self.ways[int(torch.randint(len(self.ways), ()))]
                pixel_values, labels = way(pixel_values, labels)
            if self.label_smoothing:
                if labels.ndim == 1:
                    labels = torch.nn.functional.one_hot(labels, self.num_classes).float()
                labels = labels * (1 - self.label_smoothing) + self.label_smoothing / self.num_classes
        return pixel_values, labels
