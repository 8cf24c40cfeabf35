"""Feature tables: the encoder's output for every row of a split."""

import itertools
import logging
import math
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

from ..data.decode import BadSample
from ..data.labels import class_numbers, common_classes
from ..data.loader import Batch, EvaluationSet, check_bad, each_batch, make_loader
from ..data.order import Rows
from ..data.transform import ImageSpec
from ..errors import DataError, UserError
from ..keys.evaluation_keys import FeatureRecipe

logger = logging.getLogger(__name__)


def sample_size(rows: int, fraction: float) -> int:
    """Number of rows in a random fraction of a table."""
    return max(1, round(fraction * rows))


@dataclass
class Features:
    """A feature table with class numbers."""

    values: torch.Tensor  # (n, D) float32, one row per image
    labels: torch.Tensor  # (n,) class numbers

    def sample(self, fraction: float, seed: int) -> "Features":
        """A random fraction of the rows, in (0, 1], without repetition; the table itself for 1."""
        if fraction == 1:
            return self
        rows = np.random.default_rng(seed).permutation(len(self.labels))[: sample_size(len(self.labels), fraction)]
        chosen = torch.from_numpy(np.sort(rows))
        return Features(self.values[chosen], self.labels[chosen])


@dataclass
class Table:
    """Features, with the label and place of each image."""

    values: torch.Tensor  # (n, ...) float32 on the host
    labels: list[Any]  # (n,) as the source stores them
    keys: list[str]  # (n,) places of the images
    bad: list[BadSample]  # key and reason of the images that can't be decoded
    num_rows: int  # all images, decoded or not


def even_batches(
    rows: Rows,
    spec: ImageSpec,
    batch_size: int,
    num_workers: int,
    accelerator: Accelerator,
    *,
    mask_seed: int = 0,
    bar: str | None = None,
) -> Generator[tuple[Batch, torch.Tensor, torch.Tensor]]:
    """Yield this process's share of the rows: each batch, and its images and mask noise on the device.

    All processes get the same number of batches, since each forward gathers sharded weights. A process with fewer
    batches gets extra ones without keys. A batch without keys has one black image.

    Args:
        rows: the rows of all processes.
        spec: size, channels and dtype of the images.
        batch_size: images per batch, on each process.
        num_workers: loader processes for each process.
        accelerator: the processes.
        mask_seed: seed of the mask noise.
        bar: label of a progress bar; without it there is none.
    """
    ranks, device = accelerator.num_processes, accelerator.device
    dataset = EvaluationSet(rows, spec, batch_size, mask_seed, accelerator.process_index, ranks)
    black = torch.zeros(1, spec.num_channels, *spec.size, dtype=getattr(torch, spec.batch_dtype))
    blank = Batch(black, torch.zeros(1, spec.num_patches), [], [])
    calls = range(math.ceil(len(rows) / (ranks * batch_size)))
    with closing(each_batch(make_loader(dataset, num_workers))) as batches:
        for _ in tqdm(calls, desc=bar, disable=bar is None or not accelerator.is_main_process, leave=False):
            batch = next(batches, blank)
            shown = batch if batch.keys else blank
            yield batch, shown.images.to(device, non_blocking=True), shown.noise.to(device, non_blocking=True)


def encoded_batches(
    encode: Callable[[torch.Tensor], torch.Tensor], batches: Generator[tuple[Batch, torch.Tensor, torch.Tensor]]
) -> Generator[tuple[Batch, torch.Tensor]]:
    """Yield each batch of `even_batches` with the encodings of its images, on the device; there may be none.

    `encode` takes images (B, C, H, W) in the source's dtype.
    """
    with closing(batches):
        for batch, images, _ in batches:
            with torch.no_grad():
                values = encode(images)
            yield batch, values[: len(batch.keys)]


def extract_table(rows: Rows, batches: Iterable[tuple[Batch, torch.Tensor]]) -> Table:
    """Features of all rows, in order, on every process; `batches` are this process's, from `encoded_batches`.

    Raises:
        DataError: if no image can be decoded.
    """
    share = [
        # Without a copy, the class token's features are a view that keeps all tokens in memory.
        (encoded.to("cpu", torch.float32, copy=True), batch.labels, batch.keys, batch.bad)
        for batch, encoded in batches
    ]
    values, *lists = zip(*gather_object(share), strict=True)
    labels, keys, bad = (list(itertools.chain.from_iterable(parts)) for parts in lists)
    if not keys:
        raise DataError(f"none of the {len(rows)} images of {rows.name} can be decoded; check the data")
    return Table(torch.cat(values), labels, keys, bad, len(rows))


def run_model(
    encode: Callable[[torch.Tensor], torch.Tensor],
    rows: Rows,
    spec: ImageSpec,
    recipe: FeatureRecipe,
    accelerator: Accelerator,
    bar: str,
) -> Table:
    """The table of all rows, on every process; the arguments are those of `even_batches` and `encoded_batches`.

    Raises:
        DataError: if too many images can't be decoded.
        UserError: if values are not finite.
    """
    batches = even_batches(rows, spec, recipe.batch_size, recipe.num_workers, accelerator, bar=bar)
    table = extract_table(rows, encoded_batches(encode, batches))
    report_bad(rows, table.bad, recipe.max_bad_fraction)
    if not table.values.isfinite().all():
        raise UserError(f"outputs of --model {recipe.model} are not finite; its training has diverged")
    return table


def with_class_numbers(
    train: Table, rows: Rows, test: Table, eval_rows: Rows, all_known: bool = True
) -> tuple[Features, Features]:
    """The features of the two tables with common class numbers; arguments and errors are those of `common_classes`."""
    classes = common_classes(train.labels, rows, test.labels, eval_rows, all_known=all_known)
    first = Features(train.values, class_numbers(train.labels, rows.source, classes))
    return first, Features(test.values, class_numbers(test.labels, eval_rows.source, classes))


def report_bad(rows: Rows, bad: list[BadSample], most: float) -> None:
    """Warn about images that can't be decoded, given as (key, reason).

    Raises:
        DataError: if they are more than the fraction `most` of the rows, or all rows.
    """
    if not bad:
        return
    reasons = ", ".join(f"{reason} {n}" for reason, n in Counter(reason for _, reason in bad).most_common())
    named = f"({reasons}; the first is {bad[0][0]})"
    line = f"{len(bad)} of the {len(rows)} images of {rows.name} can't be decoded {named}"
    check_bad(len(bad), len(rows), most, line)
    if len(bad) == len(rows):
        raise DataError(f"{line}; check the data")
    logger.warning("%s; they are left out", line)


def top_k_correct(scores: torch.Tensor, labels: torch.Tensor, k: int) -> int:
    """Number of rows of (n, K) scores whose label (n,) is among the k highest; all rows if k >= K."""
    best = scores.topk(min(k, scores.shape[1]), dim=1).indices
    return int((best == labels.to(best.device).unsqueeze(1)).sum())


def top_ks(classes: int) -> tuple[int, ...]:
    """The numbers k of the top-k accuracies to show: of up to five classes, all are among the first five."""
    return (1, 5) if classes > 5 else (1,)
