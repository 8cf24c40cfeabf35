"""The order of samples, exactly resumable on any number of ranks and workers; batches in the source's dtype.

An epoch's order is a pure function of (seed, epoch): the source's blocks in random order, and within each its rows in
random order (a source with random access is one block, so its order is a full permutation). L logical streams read
L equal parts of that order, each epoch after epoch, and the batch of a step is put together from chunks of some of
them. So the only state is one integer per stream, how many rows it has read, and the batches don't depend on who
reads which stream.

    step t takes chunk j, for j = 0..c-1, from stream (t % n) * c + j        L = n * c streams
    rank r of R owns the chunks [r * c/R, (r+1) * c/R)                       R divides c
    worker w of W owns every W-th item, and so whole streams                 W divides n * (items in a step)
"""

import contextlib
import logging
import math
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from .augment import evaluation_view, pixels_needed, sample_rng, training_view
from .decode import BadImage, MissingPackage, decode_image
from .sources import DataError, Row, Source

logger = logging.getLogger(__name__)

# Salts keep the random numbers of different uses apart; they are part of the order, so don't change them.
_BLOCKS, _ROWS = 1, 2


def held_out(shards: np.ndarray, rows: np.ndarray, fraction: float) -> np.ndarray:
    """Which rows are held out for evaluation, by a hash of their place, whatever the seed.

    Args:
        shards: (n,) index of each row's shard.
        rows: (n,) row number within its shard.
        fraction: share that is held out, in [0, 1).

    Returns:
        (n,) bool.
    """
    key = (shards.astype(np.uint64) << np.uint64(40)) + rows.astype(np.uint64)
    # splitmix64: neighbouring places get unrelated numbers.
    key = (key + np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0xBF58476D1CE4E5B9)
    key = (key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (key ^ (key >> np.uint64(31))).astype(np.float64) / 2.0**64 < fraction


class Rows:
    """The rows of a source that one use sees (training, evaluation), and their order in each epoch.

    Args:
        source: where they come from.
        part: "all", or, of a source without a split of its own for evaluation, "train" or "held_out".
        held_out_fraction: share that `held_out` takes.
        max_samples: at most so many: evenly spaced ones of a source with random access, else the first.
    """

    def __init__(
        self, source: Source, part: str = "all", held_out_fraction: float = 0.05, max_samples: int | None = None
    ):
        self.source = source
        sizes = np.asarray(source.shard_sizes, dtype=np.int64)
        self.shard_starts = np.concatenate([[0], np.cumsum(sizes)])
        index = np.arange(self.shard_starts[-1])
        if part != "all":
            out = held_out(*self.place(index), held_out_fraction)
            index = index[out if part == "held_out" else ~out]
        if max_samples is not None and max_samples < len(index):
            even = np.linspace(0, len(index) - 1, max_samples).round().astype(np.int64)
            index = index[even if source.random_access else slice(max_samples)]
        if len(index) == 0:
            raise DataError(
                f"no rows are left of the {int(sizes.sum())} in {source.name} for {part}; give more data, or an "
                "--eval_dataset"
            )
        self.index = index
        starts = [0] if source.random_access else [self.shard_starts[s] + start for s, start, _ in source.blocks]
        ends = np.searchsorted(index, [*starts[1:], self.shard_starts[-1]])
        starts = np.concatenate([[0], ends[:-1]])
        self.blocks = np.stack([starts, ends], axis=1)[ends > starts]  # ranges of `index`

    def __len__(self) -> int:
        return len(self.index)

    @property
    def name(self) -> str:
        """What they are, for people."""
        return f"split {self.source.split} of {self.source.name}"

    def place(self, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(shard, row) of rows given by their number in the whole source."""
        shards = np.searchsorted(self.shard_starts, index, side="right") - 1
        return shards, index - self.shard_starts[shards]

    def read(self, index: np.ndarray) -> Iterator[Row]:
        """Undecoded rows, in the order asked for; runs within one shard are read at once."""
        shards, rows = self.place(index)
        for run in np.split(np.arange(len(index)), np.flatnonzero(np.diff(shards)) + 1):
            yield from self.source.read(int(shards[run[0]]), rows[run].tolist())


class EpochOrder:
    """The order of rows in an epoch, looked up in pieces. It holds the permutations of two epochs at most."""

    def __init__(self, rows: Rows, seed: int):
        self.rows, self.seed = rows, seed
        self._epochs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._permutations: dict[tuple[int, int], np.ndarray] = {}

    def segment(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Rows (numbers in the source) at the positions from `start`, up to `stop` or the end of a block."""
        if epoch not in self._epochs:
            while len(self._epochs) > 1:
                self._epochs.pop(next(iter(self._epochs)))
            order = np.random.default_rng([self.seed, epoch, _BLOCKS]).permutation(len(self.rows.blocks))
            sizes = self.rows.blocks[order, 1] - self.rows.blocks[order, 0]
            self._epochs[epoch] = order, np.cumsum(sizes)
        order, ends = self._epochs[epoch]
        at = int(np.searchsorted(ends, start, side="right"))
        block = int(order[at])
        first, last = self.rows.blocks[block]
        begin = int(ends[at]) - int(last - first)
        return self.rows.index[first + self._permutation(epoch, block, int(last - first))[start - begin : stop - begin]]

    def _permutation(self, epoch: int, block: int, size: int) -> np.ndarray:
        key = (epoch, block)
        if key not in self._permutations:
            while len(self._permutations) > 1:
                self._permutations.pop(next(iter(self._permutations)))
            self._permutations[key] = np.random.default_rng([self.seed, epoch, _ROWS, block]).permutation(size)
        return self._permutations[key]


class LogicalStream:
    """Stream `number` of `count`: its part of each epoch, for ever.

    `position` counts the rows read since the start of the run; it is all that has to be saved.
    """

    def __init__(self, order: EpochOrder, number: int, count: int, position: int = 0):
        self.order, self.position = order, position
        length = len(order.rows)
        self.first, last = number * length // count, (number + 1) * length // count
        self.length = last - self.first
        self._buffer: deque[Row] = deque()

    def next(self, wanted: int) -> tuple[int, Row]:
        """The epoch and the next undecoded row; `wanted` says how many will be asked for at once."""
        epoch, offset = divmod(self.position, self.length)
        if not self._buffer:
            # A block from the network is fetched once; cheap rows are fetched as they are needed.
            ahead = min(wanted, self.length - offset) if self.order.rows.source.random_access else self.length - offset
            start = self.first + offset
            self._buffer.extend(self.order.rows.read(self.order.segment(epoch, start, start + ahead)))
        self.position += 1
        return epoch, self._buffer.popleft()


@dataclass(frozen=True)
class StreamPlan:
    """How a step's batch is put together; fixed for a run, so that it can move to other ranks and workers.

    Args:
        total_batch_size: images that a step decodes, over all ranks.
        chunks: c, chunks in a batch, each from another stream.
        groups: n, steps until a stream has its turn again.
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
        """A plan for these ranks and workers that leaves room for others.

        Chunks of local data cost nothing, so there are many; a chunk from the network keeps a block in memory.
        Streams of 100 rows or more differ in length by 1 % at most, so that no image is seen more often than others.
        """
        most = max(ranks, 64 if random_access else 16)
        fitting = [c for c in _divisors(total_batch_size) if c % ranks == 0 and c <= most]
        groups = math.lcm(max(workers, 1), 4)
        chunks = max((c for c in fitting if c * groups * 100 <= num_samples), default=ranks)
        if chunks * groups * 100 > num_samples:
            groups = max(workers, 1)
        if total_batch_size % ranks or chunks * groups > num_samples:
            raise DataError(
                f"{num_samples} images can't be dealt to {ranks} processes with {max(workers, 1)} workers for batches "
                f"of {total_batch_size}; use fewer --num_workers, or processes that divide the batch"
            )
        return cls(total_batch_size, chunks, groups)

    def items_per_step(self, ranks: int, workers: int, grad_accum_steps: int) -> int:
        """Into how many items a rank's part of a step is cut: as many as there are micro-batches, if chunks allow.

        Raises:
            DataError: if ranks or workers don't divide the streams; it names those that do.
        """
        if self.chunks % ranks:
            raise DataError(
                f"{ranks} processes don't divide the {self.chunks} chunks of this run's batches; use one of "
                f"{_divisors(self.chunks)}"
            )
        items = math.gcd(grad_accum_steps, self.chunks // ranks)
        if workers and (self.groups * items) % workers:
            raise DataError(
                f"{workers} workers don't divide the {self.groups * items} items that this run's streams are read in; "
                f"use --num_workers 0 or one of {_divisors(self.groups * items)}"
            )
        return items


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


@dataclass(frozen=True)
class View:
    """What becomes of an image on the way into a batch.

    Args:
        size: (height, width) in pixels.
        num_channels: C.
        dtype: of the pixels: "uint8", "uint16" or "float32".
        num_patches: N, for the mask noise.
        crop_scale: smallest and largest fraction of the area that a training crop keeps.
        flip: mirror half of the training crops.
        masks: of each training image.
        eval_resize: for the evaluation view, see `evaluation_view`.
        one_draw: how a training crop is drawn, see `random_resized_crop_box`.
    """

    size: tuple[int, int]
    num_channels: int
    dtype: str
    num_patches: int
    crop_scale: tuple[float, float] = (0.2, 1.0)
    flip: bool = True
    masks: int = 1
    eval_resize: int | tuple[int, int] = 256
    one_draw: bool = False

    @property
    def min_pixels(self) -> int:
        """Pixels that an image has to keep for training crops, see `pixels_needed`."""
        return pixels_needed(self.size, self.crop_scale)


@dataclass
class Batch:
    """Images and what belongs to them.

    Args:
        images: (b, C, H, W) in the source's dtype.
        noise: (b * masks, N) float32 mask noise from U[0, 1), the masks of an image side by side.
        keys: (b,) places of the samples, for people.
        labels: (b,) whatever the source has.
        positions: of the streams that gave rows to this batch: stream number -> rows read.
        bad: (key, reason) of the samples that were skipped on the way.
    """

    images: torch.Tensor
    noise: torch.Tensor
    keys: list[str]
    labels: list[Any]
    positions: dict[int, int] = field(default_factory=dict)
    bad: list[tuple[str, str]] = field(default_factory=list)

    def pin_memory(self) -> "Batch":
        self.images, self.noise = self.images.pin_memory(), self.noise.pin_memory()
        return self


Sample = tuple[np.ndarray, np.ndarray, Row]


def _collate(view: View, samples: Sequence[Sample], positions: dict[int, int], bad: list[tuple[str, str]]) -> Batch:
    images = np.empty((len(samples), view.num_channels, *view.size), view.dtype)
    for at, (pixels, _, _) in enumerate(samples):
        images[at] = pixels
    noise = np.array([mask_noise for _, mask_noise, _ in samples], np.float32).reshape(-1, view.num_patches)
    return Batch(
        images=torch.from_numpy(images),
        noise=torch.from_numpy(noise),
        keys=[row.key for _, _, row in samples],
        labels=[row.label for _, _, row in samples],
        positions=positions,
        bad=bad,
    )


class TrainingStream(IterableDataset):
    """A rank's share of the batches of the steps [first_step, last_step), for a DataLoader without batching.

    Args:
        rows: what to train on.
        plan: how batches are put together.
        view: what becomes of each image.
        seed: of order, crop, flip and mask noise.
        positions: (L,) rows that each stream has read before `first_step`.
        first_step: the step of the first batch, from 0.
        last_step: the step before which it ends.
        rank: of this process, from 0.
        ranks: processes.
        items_per_step: items that a rank's part of a step is cut into.
        later_views: (step, view) that takes the place of the one before from this step on, steps rising.
    """

    def __init__(
        self,
        rows: Rows,
        plan: StreamPlan,
        view: View,
        seed: int,
        positions: Sequence[int],
        first_step: int,
        last_step: int,
        rank: int = 0,
        ranks: int = 1,
        items_per_step: int = 1,
        later_views: Sequence[tuple[int, View]] = (),
    ):
        self.rows, self.plan, self.seed = rows, plan, seed
        self.views = [(0, view), *later_views]
        self.positions, self.steps = list(positions), range(first_step, last_step)
        self.items_per_step = items_per_step
        self.chunks_per_item = plan.chunks // ranks // items_per_step
        self.first_chunk = rank * (plan.chunks // ranks)
        self.chunk_size = plan.total_batch_size // plan.chunks

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        order = EpochOrder(self.rows, self.seed)
        streams: dict[int, LogicalStream] = {}
        items = len(self.steps) * self.items_per_step
        for item in range(number, items, workers):
            step, part = self.steps[item // self.items_per_step], item % self.items_per_step
            first = step % self.plan.groups * self.plan.chunks + self.first_chunk + part * self.chunks_per_item
            view = [view for start, view in self.views if start <= step][-1]
            samples: list[Sample] = []
            bad: list[tuple[str, str]] = []
            for stream in range(first, first + self.chunks_per_item):
                if stream not in streams:
                    streams[stream] = LogicalStream(order, stream, self.plan.num_streams, self.positions[stream])
                samples += self._chunk(streams[stream], view, bad)
            taken = range(first, first + self.chunks_per_item)
            yield _collate(view, samples, {stream: streams[stream].position for stream in taken}, bad)

    def _chunk(self, stream: LogicalStream, view: View, bad: list[tuple[str, str]]) -> list[Sample]:
        samples: list[Sample] = []
        failed = 0
        while len(samples) < self.chunk_size:
            epoch, row = stream.next(self.chunk_size - len(samples))
            try:
                image = decode_image(row.image, view.num_channels, view.dtype, view.min_pixels)
                rng = sample_rng(self.seed, epoch, row.shard, row.row)
                pixels = training_view(image, rng, view.size, view.crop_scale, view.flip, view.one_draw)
                samples.append((pixels, rng.random((view.masks, view.num_patches), dtype=np.float32), row))
                failed = 0
            except BadImage as error:
                bad.append((row.key, error.reason))
                failed += 1
                # With one good image, at the start of an epoch and at the end of the next, fewer would fail.
                if failed > 2 * stream.length:
                    raise DataError(
                        f"{failed} images in a row could not be read, the last one {row.key} ({error}); check the data"
                    ) from error
        return samples


class EvaluationSet(IterableDataset):
    """A rank's share of the rows, once, in their own order: the evaluation crop, and one fixed mask noise per row.

    There is one batch for every `batch_size` rows, the last of fewer. An image that can't be decoded is left out of its
    batch and named in `Batch.bad`, so that a batch may be smaller than the others, and have no image at all.
    """

    def __init__(self, rows: Rows, view: View, batch_size: int, mask_seed: int = 0, rank: int = 0, ranks: int = 1):
        self.rows, self.view, self.batch_size, self.mask_seed = rows, view, batch_size, mask_seed
        # Whole runs of neighbours to each rank: a block from the network is then fetched by one of them.
        self.index = np.array_split(rows.index, ranks)[rank]

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        starts = range(number * self.batch_size, len(self.index), workers * self.batch_size)
        for start in starts:
            samples: list[Sample] = []
            bad: list[tuple[str, str]] = []
            for row in self.rows.read(self.index[start : start + self.batch_size]):
                try:
                    image = decode_image(row.image, self.view.num_channels, self.view.dtype)
                except BadImage as error:
                    bad.append((row.key, error.reason))
                    continue
                noise = sample_rng(self.mask_seed, 0, row.shard, row.row).random(self.view.num_patches, np.float32)
                samples.append((evaluation_view(image, self.view.eval_resize, self.view.size), noise, row))
            yield _collate(self.view, samples, {}, bad)


def ignore_termination(worker_id: int) -> None:
    """Start-up of a loader worker: the signals are for the training process, which saves and then ends its workers."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    # A worker decodes on one core; more threads only get in the way of the others.
    torch.set_num_threads(1)


def make_loader(
    dataset: IterableDataset, num_workers: int, pin_memory: bool = False, start: Callable = ignore_termination
) -> DataLoader:
    """Batches of a stream or an evaluation set, in order, from `num_workers` processes (0: in this one)."""
    return DataLoader(
        dataset,
        batch_size=None,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=start if num_workers else None,
        prefetch_factor=2 if num_workers else None,
    )


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Tell the errors of a loader's worker in one line: they have the worker's traceback for a message."""
    try:
        yield
    except (DataError, MissingPackage) as error:
        last_line = str(error).strip().rpartition("\n")[2]
        raise type(error)(last_line.removeprefix(f"{type(error).__module__}.{type(error).__qualname__}: ")) from error


def each_batch(loader: DataLoader) -> Generator[Batch]:
    """The batches of a loader. Its workers are ended whatever happens, and their errors are told in one line."""
    batches = iter(loader)
    try:
        with one_line_errors():
            yield from batches
    finally:
        # Left to the garbage collector, they would live on in an error's traceback, and the process wait for them for
        # ever at its end, where it sends them the SIGTERM that they ignore. So does the iterator's own way to end one
        # that is late.
        if loader.num_workers:
            batches._shutdown_workers()  # type: ignore[attr-defined]
            for worker in batches._workers:  # type: ignore[attr-defined]
                worker.kill()
                worker.join()
