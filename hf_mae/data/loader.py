"""Rows -> batches in the source's dtype: the training stream, evaluation sets, and worker processes.

Workers decode and crop. Scaling and normalisation happen on the device, so a batch of common images is uint8. Every
random number of a sample is a function of (seed, epoch, shard, row), by `sample_rng`.
"""

import contextlib
import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..errors import DataError, UserError
from .augment import sample_rng, training_view
from .decode import BadImage, BadSample
from .order import EpochOrder, LogicalStream, Rows, StreamPlan
from .shards import Row
from .transform import ImageSpec


@dataclass
class Batch:
    """A batch of images, with mask noise and labels.

    Args:
        images: (b, C, H, W) in the source's dtype, or `ImageSpec.batch_dtype`.
        noise: (b * masks, N) float32 mask noise from U[0, 1), with the masks of one image next to each other.
        keys: (b,) readable places of the samples in the source.
        labels: (b,) as the source stores them; None for an image without a label.
        positions: stream number -> rows read so far, for the streams in this batch.
        bad: (key, reason) of each sample that could not be decoded.
    """

    images: torch.Tensor
    noise: torch.Tensor
    keys: list[str]
    labels: list[Any]
    positions: dict[int, int] = field(default_factory=dict)
    bad: list[BadSample] = field(default_factory=list)

    def pin_memory(self) -> "Batch":
        self.images, self.noise = self.images.pin_memory(), self.noise.pin_memory()
        return self


Sample = tuple[np.ndarray, np.ndarray, Row]  # pixels, mask noise and the row they come from


def _collate(spec: ImageSpec, samples: list[Sample], positions: dict[int, int], bad: list[BadSample]) -> Batch:
    # Not np.stack, which refuses an empty list: a batch may have no sample.
    images = np.array([pixels for pixels, _, _ in samples], spec.batch_dtype).reshape(-1, spec.num_channels, *spec.size)
    noise = np.array([mask_noise for _, mask_noise, _ in samples], np.float32).reshape(-1, spec.num_patches)
    keys, labels = [row.key for _, _, row in samples], [row.label for _, _, row in samples]
    return Batch(torch.from_numpy(images), torch.from_numpy(noise), keys, labels, positions, bad)


class TrainingStream(IterableDataset):
    """One rank's batches of the steps [first_step, last_step), for a DataLoader that doesn't batch (`make_loader`).

    A step gives `items_per_step` items of type `Batch`, of equal size. A sample that can't be decoded is listed in
    `Batch.bad`, and the next row of its stream takes its place.

    Args:
        rows: the training rows.
        plan: how batches are assembled.
        spec: size, dtype, crop and number of masks of the images.
        seed: seed of order, crop, flip and mask noise.
        positions: (L,) number of rows that each of the plan's L streams has read before `first_step`.
        first_step: step of the first batch, from 0.
        last_step: the step after the last batch's.
        rank: rank of this process, from 0.
        ranks: number of processes.
        items_per_step: number of items that a rank's share of a step is split into, see `StreamPlan.items_per_step`.
        later_specs: (step, spec) pairs in order of their steps; each spec applies from its step on.

    Raises:
        DataError: while iterating, if a stream has no image that can be decoded.
        SourceUnavailable: while iterating, if the network failed on every try.
    """

    def __init__(
        self,
        rows: Rows,
        plan: StreamPlan,
        spec: ImageSpec,
        seed: int,
        positions: Sequence[int],
        first_step: int,
        last_step: int,
        rank: int = 0,
        ranks: int = 1,
        items_per_step: int = 1,
        later_specs: Sequence[tuple[int, ImageSpec]] = (),
    ):
        self.rows, self.plan, self.seed = rows, plan, seed
        self.specs = [(0, spec), *later_specs]
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
            spec = [spec for start, spec in self.specs if start <= step][-1]
            samples: list[Sample] = []
            positions: dict[int, int] = {}
            bad: list[BadSample] = []
            for stream in range(first, first + self.chunks_per_item):
                if stream not in streams:
                    streams[stream] = LogicalStream(order, stream, self.plan.num_streams, self.positions[stream])
                samples += self._chunk(streams[stream], spec, bad)
                positions[stream] = streams[stream].position
            yield _collate(spec, samples, positions, bad)

    def _chunk(self, stream: LogicalStream, spec: ImageSpec, bad: list[BadSample]) -> list[Sample]:
        samples: list[Sample] = []
        failed = 0
        while len(samples) < self.chunk_size:
            epoch, row = stream.next(self.chunk_size - len(samples))
            try:
                image = spec.decode(row.image, for_crops=True)
                rng = sample_rng(self.seed, epoch, row.shard, row.row)
                pixels = training_view(image, rng, spec.size, spec.crop_scale, spec.flip, spec.one_draw)
                samples.append((pixels, rng.random((spec.masks, spec.num_patches), dtype=np.float32), row))
                failed = 0
            except BadImage as error:
                bad.append((row.key, error.reason))
                failed += 1
                # One good image per epoch means at most 2 * length - 2 failures in a row.
                if failed > 2 * stream.length:
                    raise DataError(
                        f"{failed} images in a row could not be read, the last one {row.key} ({error}); check the data"
                    ) from error
        return samples


class EvaluationSet(IterableDataset):
    """One rank's share of the rows, once and in order: the evaluation crop, and one fixed mask noise per row.

    There is one batch for every `batch_size` rows; the last may have fewer. An image that can't be decoded is listed in
    `Batch.bad` and left out, so a batch may be smaller than the others, or even empty.
    """

    def __init__(self, rows: Rows, spec: ImageSpec, batch_size: int, mask_seed: int = 0, rank: int = 0, ranks: int = 1):
        self.rows, self.spec, self.batch_size, self.mask_seed = rows, spec, batch_size, mask_seed
        # Each rank gets neighbouring rows, so that only one rank fetches a block from the network.
        self.index = np.array_split(rows.index, ranks)[rank]

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        for start in range(number * self.batch_size, len(self.index), workers * self.batch_size):
            samples: list[Sample] = []
            bad: list[BadSample] = []
            for row in self.rows.read(self.index[start : start + self.batch_size]):
                try:
                    image = self.spec.decode(row.image)
                except BadImage as error:
                    bad.append((row.key, error.reason))
                    continue
                noise = sample_rng(self.mask_seed, 0, row.shard, row.row).random(self.spec.num_patches, np.float32)
                samples.append((self.spec.evaluation_view(image), noise, row))
            yield _collate(self.spec, samples, {}, bad)


def ignore_termination(worker_id: int) -> None:
    """Start-up of a loader worker. It ignores signals: the training process saves first, and then ends its workers."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    # A worker decodes on one core; more threads would only slow down the other workers.
    torch.set_num_threads(1)


def check_bad(bad: int, count: int, most: float, message: str) -> None:
    """Raise a DataError that starts with `message` if more than the fraction `most` of `count` images are bad."""
    if bad / count > most:
        raise DataError(f"{message}, more than max_bad_fraction {most:.1%}; check the data, or raise the limit")


def make_loader(
    dataset: IterableDataset, num_workers: int, pin_memory: bool = False, start: Callable = ignore_termination
) -> DataLoader:
    """A DataLoader of a `TrainingStream` or `EvaluationSet`, in order.

    Args:
        dataset: yields batches of type `Batch`.
        num_workers: number of loader processes; 0 loads in this one.
        pin_memory: whether to pin batches, for faster copies to a GPU.
        start: start-up function of each worker; gets its number.
    """
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
    """Cut UserErrors from loader workers, whose message is a whole traceback, down to one line."""
    try:
        yield
    except UserError as error:
        last_line = str(error).strip().rpartition("\n")[2]
        raise type(error)(last_line.removeprefix(f"{type(error).__module__}.{type(error).__qualname__}: ")) from error


def each_batch(loader: DataLoader) -> Generator[Any]:
    """Yield what a loader yields, such as the batches of `make_loader`, and end its workers however the loop ends.

    Close the generator (`contextlib.closing`) if the loop may stop early.

    Raises:
        UserError: as the data set raises it; one from a worker is cut down to one line.
    """
    batches = iter(loader)
    try:
        with one_line_errors():
            yield from batches
    finally:
        # An error's traceback would keep the workers alive, and the process would hang at exit, because they ignore its
        # SIGTERM. `_shutdown_workers` also sends only SIGTERM to a slow worker.
        if loader.num_workers:
            batches._shutdown_workers()  # type: ignore[attr-defined]
            for worker in batches._workers:  # type: ignore[attr-defined]
                worker.kill()
                worker.join()
