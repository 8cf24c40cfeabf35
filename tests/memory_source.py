"""A source of images in memory, in shards and blocks of any size, that keeps count of what is read."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from hf_mae.data.order import Rows
from hf_mae.data.shards import Row, Source


class MemorySource(Source):
    """Images by shard; `reads` has one (shard, rows) for each call of `read` in this process.

    Args:
        shards: images (encoded bytes or arrays) of each shard.
        block: rows of a block at most, of a source without random access; None: any row is cheap.
        labels: of all rows, in order.
    """

    def __init__(self, shards: list[Sequence[Any]], block: int | None = None, labels: Sequence[Any] | None = None):
        names = [f"shard{number}" for number in range(len(shards))]
        super().__init__("memory", "train", names, [len(shard) for shard in shards], random_access=block is None)
        self.shards, self.reads, self.labels_from = shards, [], "memory"  # as a stream, which may have labels
        starts = np.cumsum([0, *self.shard_sizes])
        self.labels = [None if labels is None else labels[start:stop] for start, stop in itertools.pairwise(starts)]
        if block:
            self.blocks = [
                (shard, start, min(start + block, size))
                for shard, size in enumerate(self.shard_sizes)
                for start in range(0, size, block)
            ]

    def read(self, shard: int, rows: Sequence[int]) -> list[Row]:
        self.reads.append((shard, tuple(rows)))
        labels = self.labels[shard]
        return [self._row(shard, row, self.shards[shard][row], None if labels is None else labels[row]) for row in rows]


def noise_images(sizes: Sequence[int], shape: tuple[int, ...] = (6, 5, 1), dtype: Any = np.uint8) -> list[np.ndarray]:
    """A shard of distinct random images for each size."""
    rng = np.random.default_rng(0)
    top = np.iinfo(dtype).max if np.issubdtype(dtype, np.integer) else 1
    return [(rng.random((size, *shape)) * top).astype(dtype) for size in sizes]


def random_image(height: int, width: int, channels: int = 3, dtype: Any = np.uint8) -> np.ndarray:
    """Random pixels; always the same for one size."""
    return np.random.default_rng([height, width]).integers(0, np.iinfo(dtype).max, (height, width, channels), dtype)


def memory_rows(sizes: Sequence[int], block: int | None = None, **options: Any) -> Rows:
    """Rows of random gray images of 6 x 5 pixels."""
    return Rows(MemorySource(noise_images(sizes), block), **options)
