"""Labelled images for a Trainer, one by one: decoded, cropped, augmented and normalised."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..errors import DataError
from ..image_processing_mae import MAEImageProcessor
from ..run_folder import append_bad_sample
from .augment import sample_rng, training_view
from .decode import BadImage, BadSample
from .loader import each_batch, ignore_termination
from .mix import Mixing, RandAugment, RandomErasing
from .order import Rows
from .shards import Row
from .transform import ImageSpec, make_normalizer

# A data set with few bad images won't give this many of them in a row.
TRIES = 10


class LabelledImages(Dataset):
    """Images and targets. All random changes are functions of (seed, epoch, shard, row).

    In training, an image that can't be decoded is replaced by another one, so that every batch is full. In the first
    epoch, `bad_file` lists it. For evaluation, remove such rows first (`without_bad`).

    Args:
        rows: the images.
        targets: (n, ...) targets of these rows.
        spec: size, channels, dtype and crops of the images.
        processor: gives the mean and standard deviation for normalisation.
        seed: seed of all random changes; None for the evaluation view, which has none.
        rand_augment: applied to the training view.
        random_erasing: probability of erasing in the training view, in [0, 1].
        bad_file: gets one JSON line for each bad image.
        multiple: each epoch leaves out a few random rows to make the rest a multiple of this, so all batches are full.
    """

    def __init__(
        self,
        rows: Rows,
        targets: torch.Tensor,
        spec: ImageSpec,
        processor: MAEImageProcessor,
        seed: int | None = None,
        rand_augment: RandAugment | None = None,
        random_erasing: float = 0.0,
        bad_file: Path | None = None,
        multiple: int = 1,
    ):
        self.rows, self.targets, self.spec, self.seed = rows, targets, spec, seed
        self.rand_augment, self.erase = rand_augment, RandomErasing(random_erasing) if random_erasing else None
        self.bad_file = bad_file
        self.length = len(rows) // multiple * multiple or len(rows)
        self.set_epoch(0)
        self.normalize = make_normalizer(processor)

    def __len__(self) -> int:
        return self.length

    def set_epoch(self, epoch: int) -> None:
        """Start an epoch, with other crops and flips, and other rows left out."""
        self.epoch, self.order = epoch, np.arange(len(self.rows))
        if self.length < len(self.rows):
            self.order = np.random.default_rng([self.seed or 0, epoch]).permutation(self.order)[: self.length]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`pixel_values` (C, H, W) float32, `labels`, and in training `rng`, the sample's random generator.

        Raises:
            BadImage: in evaluation, if the image can't be decoded.
            DataError: in training, if neither the image nor nine random others can be decoded.
        """
        index = int(self.order[index])
        row = self.rows.read_one(index)
        if self.seed is None:
            pixels = self.spec.evaluation_view(self.spec.decode(row.image))
            return {"pixel_values": self.normalize(torch.from_numpy(pixels)), "labels": self.targets[index]}
        rng = sample_rng(self.seed, self.epoch, row.shard, row.row)
        image, index = self._decode_or_replace(row, index, rng)
        pixels = training_view(image, rng, self.spec.size, self.spec.crop_scale, self.spec.flip)
        if self.rand_augment:
            pixels = self.rand_augment(pixels, rng)
        pixel_values = self.normalize(torch.from_numpy(pixels))
        if self.erase:
            pixel_values = self.erase(pixel_values, rng)
        return {"pixel_values": pixel_values, "labels": self.targets[index], "rng": rng}

    def _decode_or_replace(self, row: Row, index: int, rng: np.random.Generator) -> tuple[Any, int]:
        """The decoded image, or another random one if it can't be decoded, and the index of the row it comes from."""
        message = ""
        for _ in range(TRIES):
            try:
                return self.spec.decode(row.image, for_crops=True), index
            except BadImage as error:
                message = f"{row.key}: {error}"
                if self.bad_file and self.epoch == 0:
                    append_bad_sample(self.bad_file, row.key, error.reason)
            index = int(rng.integers(len(self.rows)))
            row = self.rows.read_one(index)
        name = self.rows.source.name
        raise DataError(f"{TRIES} random images of {name} in a row can't be decoded ({message}); check the data")


class Collator:
    """Collates samples of `LabelledImages` into batches, and mixes those of the training view.

    Args:
        mixing: mixup, cutmix and label smoothing of a training batch; None leaves its images and labels unchanged.
    """

    def __init__(self, mixing: Mixing | None = None):
        self.mixing = mixing

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """`pixel_values` (B, C, H, W) and `labels` (B, ...)."""
        pixel_values = torch.stack([sample["pixel_values"] for sample in samples])
        labels = torch.stack([sample["labels"] for sample in samples])
        if self.mixing and "rng" in samples[0]:
            pixel_values, labels = self.mixing(pixel_values, labels, samples[0]["rng"])
        return {"pixel_values": pixel_values, "labels": labels}


class _Reasons(Dataset):
    """Why each row can't be decoded: (key, reason), or None if it can."""

    def __init__(self, rows: Rows, spec: ImageSpec):
        self.rows, self.spec = rows, spec

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> BadSample | None:
        row = self.rows.read_one(index)
        try:
            self.spec.decode(row.image)
        except BadImage as error:
            return row.key, error.reason
        return None


def without_bad(rows: Rows, spec: ImageSpec, num_workers: int = 0) -> list[BadSample]:
    """Decode every row once and remove those that can't be decoded, so that the number of scored images is known.

    Returns:
        (key, reason) of the removed rows.

    Raises:
        DataError: if none is left.
    """
    loader = DataLoader(
        _Reasons(rows, spec), 64, num_workers=num_workers, collate_fn=list, worker_init_fn=ignore_termination
    )
    reasons: list[BadSample | None] = [reason for batch in each_batch(loader) for reason in batch]
    bad = [reason for reason in reasons if reason]
    if len(bad) == len(rows):
        key, reason = bad[0]
        name = rows.source.name
        raise DataError(f"none of {len(rows)} images of {name} can be decoded ({key}: {reason}); check the data")
    rows.index = rows.index[[reason is None for reason in reasons]]
    return bad
