"""Feature tables: the encoder's output for every row of a split."""

import logging
from collections import Counter
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from ..data.labels import class_numbers, common_classes
from ..data.loader import Batch, EvaluationSet, each_batch, make_loader
from ..data.order import Rows
from ..data.transform import ImageSpec
from ..errors import DataError

logger = logging.getLogger(__name__)


@dataclass
class Features:
    """A feature table.

    Args:
        values: (n, D) float32, one row an image.
        labels: (n,) class numbers.
    """

    values: torch.Tensor
    labels: torch.Tensor

    def sample(self, fraction: float, seed: int) -> "Features":
        """A random part of the rows, without repetition; the table itself for all of them."""
        if fraction == 1:
            return self
        rows = np.random.default_rng(seed).permutation(len(self.labels))[: max(1, round(fraction * len(self.labels)))]
        chosen = torch.from_numpy(np.sort(rows))
        return Features(self.values[chosen], self.labels[chosen])


@dataclass
class Table:
    """Features, with the label and place of each image.

    Args:
        values: (n, ...) float32 on the host.
        labels: (n,) as the source has them.
        keys: (n,) places of the images.
        bad: (key, reason) of the images that could not be decoded, as far as they are known by name.
        num_rows: all images, decoded or not.
    """

    values: torch.Tensor
    labels: list[Any]
    keys: list[str]
    bad: list[tuple[str, str]]
    num_rows: int


def encoded_batches(
    encode: Callable[[torch.Tensor], torch.Tensor],
    rows: Rows,
    spec: ImageSpec,
    batch_size: int,
    num_workers: int,
    accelerator: Accelerator,
    bar: str | None = None,
) -> Generator[tuple[Batch, torch.Tensor]]:
    """This process's share of the rows, batch by batch: images and their encodings, on the device.

    Every process calls `encode` as often as the others, since sharded weights are gathered in each call.

    Args:
        encode: (B, C, H, W) in the source's dtype, on the device -> (B, ...).
        rows: the images.
        spec: of their evaluation crops.
        batch_size: images at once.
        num_workers: loader processes.
        accelerator: of all processes.
        bar: label of a progress bar; None for no bar.
    """
    ranks, shape = accelerator.num_processes, (1, spec.num_channels, *spec.size)
    dataset = EvaluationSet(rows, spec, batch_size, rank=accelerator.process_index, ranks=ranks)
    longest_share = -(-len(rows) // ranks)
    calls = range(-(-longest_share // batch_size))
    with closing(each_batch(make_loader(dataset, num_workers))) as batches, torch.no_grad():
        for _ in tqdm(calls, desc=bar, disable=bar is None or not accelerator.is_main_process, leave=False):
            batch = next(batches, None)
            empty = batch is None or not batch.keys
            images = torch.zeros(shape, dtype=getattr(torch, spec.dtype)) if empty else batch.images
            values = encode(images.to(accelerator.device, non_blocking=True))
            if batch is not None:
                yield batch, values[: len(batch.keys)]


def extract_table(rows: Rows, batches: Iterable[tuple[Batch, torch.Tensor]]) -> Table:
    """Features of all rows, in their order, on every process.

    Args:
        rows: the images.
        batches: this process's share of them, by `encoded_batches`.

    Raises:
        DataError: if no image can be decoded.
    """
    values: list[torch.Tensor] = []
    share = Table(torch.empty(0), [], [], [], len(rows))
    for batch, encoded in batches:
        values.append(encoded.float().cpu())
        share.labels += batch.labels
        share.keys += batch.keys
        share.bad += batch.bad
    if values:
        share.values = torch.cat(values)
    shares = [part for part in gather_object([share]) if part.keys]
    bad = [sample for part in shares for sample in part.bad]
    if not shares:
        raise DataError(f"none of the {len(rows)} images of {rows.name} can be decoded; check the data")
    return Table(
        values=torch.cat([part.values for part in shares]) if len(shares) > 1 else shares[0].values,
        labels=[label for part in shares for label in part.labels],
        keys=[key for part in shares for key in part.keys],
        bad=bad,
        num_rows=len(rows),
    )


def with_class_numbers(
    train: Table, rows: Rows, test: Table, eval_rows: Rows, all_known: bool = True
) -> tuple[Features, Features]:
    """Features with the class numbers that both tables share; arguments and errors of `common_classes`."""
    classes = common_classes(train.labels, rows, test.labels, eval_rows, all_known=all_known)
    first, second = (Features(table.values, class_numbers(table.labels, classes)) for table in (train, test))
    return first, second


def report_bad(decoded: int, rows: Rows, bad: list[tuple[str, str]], most: float) -> None:
    """Warn of images that could not be decoded.

    Args:
        decoded: how many could.
        rows: of all images.
        bad: (key, reason) of those that could not, as far as they are known by name.
        most: share of all that may be bad.

    Raises:
        DataError: if more are bad.
    """
    count = len(rows) - decoded
    if count == 0:
        return
    reasons = ", ".join(f"{reason} {n}" for reason, n in Counter(reason for _, reason in bad).most_common())
    named = f" ({reasons}; the first is {bad[0][0]})" if bad else ""
    line = f"{count} of the {len(rows)} images of {rows.name} can't be decoded{named}"
    if count > most * len(rows):
        raise DataError(f"{line}, more than max_bad_fraction {most:.1%}; check the data, or allow more")
    logger.warning("%s; they are left out", line)


def top_k_correct(scores: torch.Tensor, labels: torch.Tensor, k: int) -> int:
    """How many rows have their label among the k classes of highest score.

    Args:
        scores: (n, K), e.g. logits.
        labels: (n,) class numbers.
        k: all classes where there are fewer.
    """
    best = scores.topk(min(k, scores.shape[1]), dim=1).indices
    return int((best == labels.to(best.device).unsqueeze(1)).sum())


def rankme(values: torch.Tensor) -> float:
    """Effective rank of a feature table: exp of the entropy of its normalised singular values.

    Args:
        values: (n, D) features, not centred; the paper uses 25,600 rows, and n bounds the result.

    Returns:
        From 1 to min(n, D).
    """
    singular = torch.linalg.svdvals(values.double())
    share = singular / singular.sum() + 1e-7  # the paper's epsilon
    return float(torch.exp(-(share * share.log()).sum()))
