"""The order of samples, exactly resumable on any number of ranks and workers.

An epoch's order is a pure function of (seed, epoch): the source's blocks in random order, and the rows of each block in
random order. A source with random access is one block, so its order is a full permutation. L logical streams read
L equal parts of that order, epoch after epoch. A step's batch is assembled from chunks of some of the streams. So the
only state is one integer per stream, the number of rows it has read, and batches don't depend on which process reads
which stream.

    step t takes chunk j, for j = 0..c-1, from stream (t % n) * c + j        L = n * c streams
    rank r of R owns the chunks [r * c/R, (r+1) * c/R)                       R divides c
    worker w of W owns every W-th item, and so whole streams                 W divides n * (items in a step)
"""

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ..errors import DataError
from .shards import Row, Source

HELD_OUT = 0.05  # share held out for evaluation if a source has no evaluation split and no share is given

# Salts keep the random numbers of different uses apart. Don't change them: that would change the order of samples.
_BLOCKS, _ROWS = 1, 2


def held_out(shards: np.ndarray, rows: np.ndarray, fraction: float) -> np.ndarray:
    """Choose rows to hold out for evaluation by a hash of their place, which doesn't depend on the seed.

    At least one of several rows is held out, unless `fraction` is 0, so that a few images are enough.

    `shards` and `rows` (n,) are each row's shard and its number there; `fraction` is in [0, 1). Returns (n,) bool.
    """
    hashes = _hash(shards, rows)
    out = hashes.astype(np.float64) / 2.0**64 < fraction
    if fraction and len(out) > 1 and not out.any():
        out[hashes.argmin()] = True
    return out


def held_out_of_each(groups: np.ndarray, shards: np.ndarray, rows: np.ndarray, fraction: float) -> np.ndarray:
    """Hold out the same fraction of each group of rows: those with the smallest hashes, so mostly as `held_out` does.

    A group of two or more rows has at least one on either side; a single row isn't held out.

    `groups` (n,) is the number of each row's group; the rest is as for `held_out`.
    """
    order = np.lexsort([_hash(shards, rows), groups])
    _, starts, counts = np.unique(groups[order], return_index=True, return_counts=True)
    most = np.rint(fraction * counts).clip(1, None).clip(None, counts - 1)
    out = np.empty(len(groups), dtype=bool)
    out[order] = np.arange(len(groups)) < np.repeat(starts + most, counts)
    return out


def _hash(shards: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """A different number for each place, (n,) uint64, evenly spread."""
    key = (shards.astype(np.uint64) << np.uint64(40)) + rows.astype(np.uint64)
    # splitmix64: neighbouring places get unrelated numbers.
    key = (key + np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0xBF58476D1CE4E5B9)
    key = (key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return key ^ (key >> np.uint64(31))


def spread(index: np.ndarray, most: int, source: Source) -> np.ndarray:
    """Up to `most` of these rows: evenly spaced ones if any row is cheap to read, else the first ones."""
    if len(index) <= most or not source.random_access:
        return index[:most]
    return index[np.linspace(0, len(index) - 1, most).round().astype(np.int64)]


class Rows:
    """The rows of a source that are used for training or for evaluation.

    Args:
        source: the source to read.
        part: "all" rows; or, if the source has no evaluation split, "held_out" ones or "train", the rest.
        held_out_fraction: share of the rows that are held out, in [0, 1).
        max_samples: maximum number of rows, chosen by `spread`; all rows when omitted.
        labelled: whether to leave out the `unlisted` rows of the source.
        groups: (n,) group of each row of the source; then the same share of each group is held out.

    Attributes:
        index: (n,) numbers of these rows in the whole source, from 0, ascending.
        shard_starts: number of the first row of each shard; then the number of all rows in the source.
        blocks: (b, 2) start and stop in `index` of the blocks that are read as one; one block for random access.

    Raises:
        DataError: if no row is left.
    """

    def __init__(
        self,
        source: Source,
        part: str = "all",
        held_out_fraction: float = HELD_OUT,
        max_samples: int | None = None,
        labelled: bool = False,
        groups: np.ndarray | None = None,
    ):
        self.source = source
        sizes = np.asarray(source.shard_sizes, dtype=np.int64)
        self.shard_starts = np.concatenate([[0], np.cumsum(sizes)])
        index = np.arange(self.shard_starts[-1])
        if part != "all":
            place = self.place(index)
            if groups is None:
                out = held_out(*place, held_out_fraction)
            else:
                out = held_out_of_each(groups, *place, held_out_fraction)
            index = index[out if part == "held_out" else ~out]
        if labelled and source.unlisted is not None:
            index = index[~source.unlisted[index]]
        if max_samples is not None:
            index = spread(index, max_samples, source)
        if len(index) == 0:
            what, remedy = f"split {source.split} of {source.name} has {int(sizes.sum())} rows", "or another split"
            if part != "all":
                what += f", too few to train on some and evaluate on others with eval_fraction {held_out_fraction}"
                remedy = "another --eval_fraction or an --eval_dataset"
            raise DataError(f"{what}; give more data, {remedy}")
        self.index = index
        starts = [0] if source.random_access else [self.shard_starts[s] + start for s, start, _ in source.blocks]
        edges = np.searchsorted(index, [*starts, self.shard_starts[-1]])
        self.blocks = np.stack([edges[:-1], edges[1:]], axis=1)[np.diff(edges) > 0]  # ranges of `index`

    def __len__(self) -> int:
        return len(self.index)

    @property
    def name(self) -> str:
        """A name for messages."""
        return f"split {self.source.split} of {self.source.name}"

    def place(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Numbers in the whole source (n,) -> shards (n,) and row numbers in them (n,)."""
        shards = np.searchsorted(self.shard_starts, index, side="right") - 1
        return shards, index - self.shard_starts[shards]

    def read_one(self, number: int) -> Row:
        """The undecoded row `number`, from 0 to `len(self) - 1`."""
        return next(self.read(self.index[number : number + 1]))

    def read(self, index: np.ndarray) -> Iterator[Row]:
        """Undecoded rows in the order of `index`, which holds numbers in the whole source; errors of `Source.read`.

        Neighbours in `index` that lie in one shard are read together.
        """
        shards, rows = self.place(index)
        for run in np.split(np.arange(len(index)), np.flatnonzero(np.diff(shards)) + 1):
            yield from self.source.read(int(shards[run[0]]), rows[run].tolist())


class EpochOrder:
    """The order of rows in an epoch, looked up in pieces. Keeps at most two permutations of rows in memory."""

    def __init__(self, rows: Rows, seed: int):
        self.rows, self.seed = rows, seed
        self._blocks, self._permutation = lru_cache(2)(self._draw_blocks), lru_cache(2)(self._draw)

    def segment(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Rows (numbers in the source) at the positions from `start`, up to `stop` or the end of the block."""
        order, ends = self._blocks(epoch)
        at = np.searchsorted(ends, start, side="right")
        first, last = self.rows.blocks[order[at]]
        begin = ends[at] - (last - first)
        places = self._permutation(int(last - first), epoch, _ROWS, int(order[at]))
        return self.rows.index[first + places[start - begin : stop - begin]]

    def _draw_blocks(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The blocks in the order of an epoch, and the positions where they end."""
        order = self._draw(len(self.rows.blocks), epoch, _BLOCKS)
        return order, np.cumsum(np.diff(self.rows.blocks[order])[:, 0])

    def _draw(self, size: int, *key: int) -> np.ndarray:
        return np.random.default_rng([self.seed, *key]).permutation(size)


class LogicalStream:
    """Stream `number` of `count`: reads its part of every epoch, without end.

    `position` counts the rows read since the start of the run. A checkpoint saves nothing else.
    """

    def __init__(self, order: EpochOrder, number: int, count: int, position: int = 0):
        self.order, self.position = order, position
        length = len(order.rows)
        self.first, last = number * length // count, (number + 1) * length // count
        self.length = last - self.first
        self._buffer: deque[Row] = deque()

    def next(self, count: int) -> tuple[int, Row]:
        """The next undecoded row and its epoch, as (epoch, row); `count` is how many rows the caller still needs."""
        epoch, offset = divmod(self.position, self.length)
        if not self._buffer:
            # A block from the network is fetched once; cheap rows are fetched when they are needed.
            ahead = min(count, self.length - offset) if self.order.rows.source.random_access else self.length - offset
            start = self.first + offset
            self._buffer.extend(self.order.rows.read(self.order.segment(epoch, start, start + ahead)))
        self.position += 1
        return epoch, self._buffer.popleft()


@dataclass(frozen=True)
class StreamPlan:
    """How a step's batch is assembled; fixed for a run, so that it can resume with other ranks and workers.

    Args:
        total_batch_size: number of images that a step decodes, over all ranks.
        chunks: c, number of chunks in a batch, each from a different stream.
        groups: n, number of steps from one turn of a stream to the next.
    """

    total_batch_size: int
    chunks: int
    groups: int

    @property
    def num_streams(self) -> int:
        return self.chunks * self.groups

    @classmethod
    def choose(
        cls, total_batch_size: int, ranks: int, workers: int, num_samples: int, random_access: bool
    ) -> "StreamPlan":
        """Choose a plan for these ranks and workers that also fits as many other numbers of them as possible.

        Chunks of local data cost nothing, so there are many; a chunk from the network keeps a block in memory.
        Streams of 100 rows or more differ in length by 1 % at most, so all images are seen about equally often.

        Args:
            total_batch_size: number of images that a step decodes, over all ranks.
            ranks: number of processes.
            workers: loader processes of each rank; 0 if it loads its own data.
            num_samples: number of training rows.
            random_access: as in `Source`.

        Raises:
            DataError: if the ranks don't divide the batch, or there are fewer rows than streams.
        """
        most = max(ranks, 64 if random_access else 16)
        fitting = [c for c in _divisors(total_batch_size) if c % ranks == 0 and c <= most]
        groups = math.lcm(max(workers, 1), 4)
        chunks = max((c for c in fitting if c * groups * 100 <= num_samples), default=ranks)
        if chunks * groups * 100 > num_samples:
            groups = max(workers, 1)
        if total_batch_size % ranks or chunks * groups > num_samples:
            raise DataError(
                f"{num_samples} images can't be split among {ranks} processes with {max(workers, 1)} workers for "
                f"batches of {total_batch_size}; use fewer --num_workers, or processes that divide the batch"
            )
        return cls(total_batch_size, chunks, groups)

    def items_per_step(self, ranks: int, workers: int, grad_accum_steps: int) -> int:
        """Number of items that a rank's share of a step is split into: one per micro-batch, if the chunks allow it.

        `ranks` and `workers` are as in `choose`; `grad_accum_steps` is the number of micro-batches of a rank's share.

        Raises:
            DataError: if ranks or workers don't divide the streams; it lists the numbers that do.
        """
        if self.chunks % ranks:
            message = f"{ranks} processes don't divide the {self.chunks} chunks of this run's batches"
            raise DataError(f"{message}; use one of {_divisors(self.chunks)}")
        items = math.gcd(grad_accum_steps, self.chunks // ranks)
        if workers and (self.groups * items) % workers:
            raise DataError(
                f"{workers} workers don't divide the {self.groups * items} items that this run's streams are read in; "
                f"use --num_workers 0 or one of {_divisors(self.groups * items)}"
            )
        return items


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
