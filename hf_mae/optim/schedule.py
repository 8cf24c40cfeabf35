"""The learning rate and other values that change during a run: pure functions of the step, without state to save."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypeVar

T = TypeVar("T")


def scaled_lr(blr: float, total_batch_size: int) -> float:
    """The highest learning rate, by the linear scaling rule: `blr` is given per 256 images of an optimizer step."""
    return blr * total_batch_size / 256


def steps_of(epochs: float, num_images: int, images_per_step: int) -> float:
    """Length of a number of epochs in optimizer steps; not rounded."""
    return epochs * (num_images / images_per_step)


def lr_at(step: float, lr: float, warmup_steps: float, total_steps: float, min_lr: float = 0.0) -> float:
    """Linear warm-up from 0, then half a cosine down to `min_lr` (arXiv:2111.06377, Table 8).

    Args:
        step: optimizer steps taken before this one, from 0. Any other unit works too; the original counts epochs.
        lr: the highest learning rate, as from `scaled_lr`.
        warmup_steps: length of the warm-up, in the unit of `step`.
        total_steps: end of the cosine, in the same unit.
        min_lr: learning rate at the end of the cosine.

    Returns:
        The learning rate of the step.
    """
    if step < warmup_steps:
        return lr * step / warmup_steps
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1e-9)
    return min_lr + (lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))


def read_points(words: Sequence[str], read: Callable[[str], T]) -> list[tuple[float, T]]:
    """Parse a value that changes during a run: FRACTION:VALUE sets the value from that fraction of the run on.

    Args:
        words: e.g. `["0:128", "0.5:160", "0.8:224"]`; a ValueError unless fractions start at 0, rise, stay below 1.
        read: parses the text of a value.

    Returns:
        (fraction, value) for each word.
    """
    try:
        points = [(float(at), read(value)) for at, _, value in (word.partition(":") for word in words)]
    except ValueError as error:
        raise ValueError(f"{' '.join(words)} is not FRACTION:VALUE ...; give e.g. 0:A 0.5:B") from error
    starts = [at for at, _ in points]
    if starts[:1] != [0] or not all(a < b for a, b in pairwise([*starts, 1])):
        raise ValueError(f"{' '.join(words)} must start at 0, rise and stay below 1; give e.g. 0:A 0.5:B")
    return points


def stages(points: Sequence[tuple[float, T]], total_steps: int) -> list[tuple[int, T]]:
    """Convert fractions of a run to steps: (first step, from 0; value)."""
    return [(math.ceil(at * total_steps), value) for at, value in points]


def value_at(stages: Sequence[tuple[int, T]], step: int) -> T:
    """The value at a step (from 0): that of the last stage that has begun."""
    return [value for first, value in stages if first <= step][-1]
