"""Micro-batches of a pretraining run on the device, and a record of the samples read for them."""

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass

import torch
from accelerate.utils import gather_object

from ..data.decode import BadSample
from ..data.loader import Batch, TrainingStream, each_batch, make_loader


@dataclass
class MicroBatches:
    """An iterator over this process's micro-batches. Loader workers start at the first `next` and stop at `close`."""

    stream: TrainingStream  # this process's share of the data
    images: int  # decoded images per micro-batch
    masks: int  # masks per image
    num_workers: int
    device: torch.device

    def __post_init__(self) -> None:
        self._read_up_to: dict[int, int] = {}
        self._bad: list[BadSample] = []
        self._batches = self._generate()

    def __next__(self) -> Batch:
        return next(self._batches)

    def close(self) -> None:
        """Stop the loader workers."""
        self._batches.close()

    def _generate(self) -> Generator[Batch]:
        loader = make_loader(self.stream, self.num_workers, self.device.type == "cuda")
        with closing(each_batch(loader)) as items:
            for item in items:
                self._read_up_to.update(item.positions)
                self._bad += item.bad
                for start in range(0, len(item.keys), self.images):
                    part = slice(start, start + self.images)
                    images = item.images[part].to(self.device, non_blocking=True)
                    noise = item.noise[self.masks * part.start : self.masks * part.stop]
                    noise = noise.to(self.device, non_blocking=True)
                    yield Batch(images, noise, item.keys[part], item.labels[part])

    def positions(self) -> dict[int, int]:
        """Number of a stream -> rows read, for the streams that any process has read. Every process must call it."""
        return {stream: rows for process in gather_object([self._read_up_to]) for stream, rows in process.items()}

    def take_bad(self) -> list[BadSample]:
        """(key, reason) of samples that failed to decode since the last call, on any process. All must call it."""
        bad = gather_object(self._bad)
        self._bad = []
        return bad
