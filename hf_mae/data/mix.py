"""What fine-tuning adds to crops and flips: RandAugment, random erasing, mixup and cutmix (arXiv:2111.06377, Table 9).

timm and torchvision make the changes. Both draw from global random generators. `seeded` seeds those from the sample's
own generator, so that results are functions of (seed, epoch, shard, row) here too.
"""

import contextlib
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.transforms import v2

from .transform import BICUBIC


@contextlib.contextmanager
def seeded(rng: np.random.Generator) -> Iterator[None]:
    """Seed the global generators (Python, numpy, torch on the CPU) from `rng`, and restore their state at the end."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = int(rng.integers(2**32))
    random.seed(seed)
    np.random.seed(seed)
    # Not torch.manual_seed, which also seeds the GPUs: drop path would draw the same numbers again and again.
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


class RandAugment:
    """RandAugment (arXiv:1909.13719) from timm, for 8-bit grey and colour images.

    Args:
        policy: timm's name, such as `rand-m9-mstd0.5-inc1`: two random changes, each applied with probability 0.5, of
            magnitude 9 of 10 with standard deviation 0.5. A higher magnitude makes every change stronger.
        size: (height, width) of the images in pixels.
        image_mean: (C,) in [0, 1], the colour of the corners that a rotation leaves empty.

    Raises:
        ValueError: if timm doesn't know the policy.
    """

    def __init__(self, policy: str, size: tuple[int, int], image_mean: Sequence[float]):
        from timm.data.auto_augment import rand_augment_transform

        fill = tuple(round(255 * value) for value in image_mean)
        options = {"translate_const": int(min(size) * 0.45), "interpolation": BICUBIC}
        try:
            self.transform = rand_augment_transform(policy, {**options, "img_mean": fill * (3 // len(fill))})
        except (AssertionError, ValueError) as error:
            raise ValueError(f"rand_augment {policy} is unknown to timm; use e.g. rand-m9-mstd0.5-inc1") from error
        for change in self.transform.ops:
            if change.name.startswith("Posterize"):
                change.aug_fn = _posterize

    def __call__(self, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Change pixels (C, H, W) uint8 with random numbers from `rng`; C is 1 or 3. Shape and dtype don't change."""
        gray = pixels.shape[0] == 1
        image = Image.fromarray(pixels[0] if gray else np.ascontiguousarray(pixels.transpose(1, 2, 0))).convert("RGB")
        with seeded(rng):
            image = self.transform(image)
        return np.array(image.convert("L"))[None] if gray else np.array(image).transpose(2, 0, 1)


def _posterize(image: Image.Image, bits: int, **options: Any) -> Image.Image:
    """At magnitude 10, timm asks for 0 bits, which gave a black image in older Pillow and is an error in newer."""
    return ImageOps.posterize(image, max(bits, 1))


class RandomErasing:
    """Random erasing (arXiv:1708.04896), "pixel" mode: a rectangle of 2 to 33 % of the area becomes noise, N(0, 1).

    Args:
        probability: probability that an image is changed, in [0, 1].
    """

    def __init__(self, probability: float):
        self.transform = v2.RandomErasing(probability, scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3), value="random")  # type: ignore[arg-type]

    def __call__(self, pixel_values: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        """Erase a random part of normalised pixels (C, H, W), or nothing; keeps the shape."""
        with seeded(rng):
            return self.transform(pixel_values)


class Mixing:
    """Mixup (arXiv:1710.09412) or cutmix (arXiv:1905.04899) of a batch, with equal chances, then label smoothing.

    Image i is mixed with image i - 1. Without mixing and smoothing, labels stay class indices.

    Args:
        num_classes: number of classes.
        mixup: alpha of mixup, whose weight is drawn from Beta(alpha, alpha); 0 turns it off (paper, Table 9: 0.8).
        cutmix: alpha of cutmix, used in the same way; 0 turns it off (1.0 in the paper).
        label_smoothing: share of each label that is spread over all classes, in [0, 1) (0.1 in the paper).
    """

    def __init__(self, num_classes: int, mixup: float = 0.0, cutmix: float = 0.0, label_smoothing: float = 0.0):
        self.num_classes, self.label_smoothing = num_classes, label_smoothing
        self.ways = [v2.MixUp(alpha=mixup, num_classes=num_classes)] if mixup else []
        self.ways += [v2.CutMix(alpha=cutmix, num_classes=num_classes)] if cutmix else []

    def __call__(
        self, pixel_values: torch.Tensor, labels: torch.Tensor, rng: np.random.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mix pixel_values (B, C, H, W) and class indices (B,), with torch's global generator if `rng` is omitted.

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
