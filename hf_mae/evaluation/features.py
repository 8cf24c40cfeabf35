"""Frozen encoder -> feature table, by one pooling rule that every protocol states."""

# Shape letters in this file
#   B images   C channels   H, W pixels   N patches   D encoder width   n rows of a table

import logging
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from tqdm.auto import tqdm

from ..data.labelled import pixel_dtype, scoring_view
from ..data.sources import DataError
from ..data.stats import make_normalizer
from ..data.stream import Batch, EvaluationSet, Rows, View, each_batch, make_loader
from ..image_processing_mae import MAEImageProcessor
from ..modeling_mae import MAEModel, MAEPreTrainedModel
from ..training.recipe import RecipeError
from .results import read_results

logger = logging.getLogger(__name__)

Pooling = Literal["mean", "cls", "both"]
Model = TypeVar("Model", bound=MAEPreTrainedModel)


@dataclass
class FeatureRecipe:
    """Keys of every command that reads features of a frozen encoder."""

    model: str = field(metadata={"help": "folder or Hub id of a pretrained model"})
    dataset: str = field(metadata={"help": "data set, as for hf-mae pretrain"})
    dataset_config: str | None = field(default=None, metadata={"help": "configuration name of a Hub data set"})
    dataset_revision: str | None = field(default=None, metadata={"help": "branch, tag or commit of a Hub data set"})
    split: str = field(default="train", metadata={"help": "split of the data set; to learn from, where one learns"})
    image_column: str | None = field(default=None, metadata={"help": "column of the images; found when omitted"})
    label_column: str | None = field(default=None, metadata={"help": "column of the labels; found when omitted"})
    max_samples: int | None = field(default=None, metadata={"help": "use so many images of the split at most"})
    max_bad_fraction: float = field(default=0.01, metadata={"help": "stop when more images can't be decoded"})
    per_device_batch_size: int | None = field(default=None, metadata={"help": "images at once on a device"})
    mixed_precision: Literal["no", "bf16"] = field(default="no", metadata={"help": "of the encoder"})
    num_workers: int = field(default=2, metadata={"help": "loader processes for each process"})

    def check(self) -> None:
        """Raise a RecipeError for a value that can't be."""
        for key, least in (("max_samples", 1), ("per_device_batch_size", 1), ("num_workers", 0)):
            if (value := getattr(self, key)) is not None and value < least:
                raise RecipeError(f"{key} {value} is too small; give {least} or more")

    @property
    def batch_size(self) -> int:
        """Images at once, where nothing depends on it."""
        return self.per_device_batch_size or 256


@dataclass
class ScoreRecipe(FeatureRecipe):
    """Keys of every command whose result is an entry of results.json."""

    eval_dataset: str | None = field(
        default=None, metadata={"help": "data set that is classified; the same when omitted"}
    )
    eval_split: str | None = field(
        default=None, metadata={"help": "split that is classified; found by name, or a held-out part, when omitted"}
    )
    max_eval_samples: int | None = field(default=None, metadata={"help": "classify so many images at most"})
    results: str | None = field(
        default=None, metadata={"help": "file the result is added to, or none; a local model's own results.json"}
    )

    def check(self) -> None:
        """Raise a RecipeError for a value that can't be, a DataError for a file that results can't be added to."""
        super().check()
        if self.max_eval_samples is not None and self.max_eval_samples < 1:
            raise RecipeError(f"max_eval_samples {self.max_eval_samples} is too small; give 1 or more")
        if path := self.results_file:
            read_results(path)

    @property
    def results_file(self) -> Path | None:
        """Where the result goes: what was typed, none for "none"; else beside the weights, if these are local."""
        if self.results:
            return None if self.results == "none" else Path(self.results)
        return Path(self.model) / "results.json" if Path(self.model).is_dir() else None


def pool(tokens: torch.Tensor, pooling: str) -> torch.Tensor:
    """One vector an image, of the tokens after the encoder's last LayerNorm.

    Args:
        tokens: (B, 1 + N, D), class token first.
        pooling: "cls": the class token; "mean": mean of the patch tokens; "both": one after the other; "patches": all
            patch tokens, in image order.

    Returns:
        (B, D), for "both" (B, 2D), for "patches" (B, N, D); float32.
    """
    tokens = tokens.float()
    parts = {"cls": lambda: tokens[:, 0], "mean": lambda: tokens[:, 1:].mean(dim=1), "patches": lambda: tokens[:, 1:]}
    return torch.cat([parts["cls"](), parts["mean"]()], dim=1) if pooling == "both" else parts[pooling]()


def load_with_processor(kind: type[Model], path: str, **overrides: Any) -> tuple[Model, MAEImageProcessor]:
    """A pretrained model in evaluation mode, and its image processor.

    Args:
        kind: class of the model.
        path: folder or Hub id.
        overrides: of its configuration.

    Raises:
        DataError: if there is no model, or not all weights of this class.
    """
    try:
        # Whatever precision it was saved in: figures of one model are to be the same everywhere.
        loaded: Any = kind.from_pretrained(
            path, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **overrides
        )
        processor = MAEImageProcessor.from_pretrained(path)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"--model {path} can't be loaded: {' '.join(str(error).split())[:300]}") from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        if missing[0].startswith("classifier."):
            raise DataError(f"--model {path} has no classifier; make one by hf-mae finetune --model {path}")
        what = "it has an encoder only" if missing[0].startswith("decoder.") else "it is not a model of hf_mae"
        raise DataError(f"--model {path} has no weights for {missing[0]}; {what}")
    return model.eval(), processor


class FrozenEncoder(nn.Module):
    """A pretrained encoder with its image processor's normalisation, all patches visible, nothing trained.

    Args:
        path: folder or Hub id.
        pooling: see `pool`.
        mixed_precision: "no", or "bf16" for autocast.

    Raises:
        DataError: if there is no model, or not all weights of an encoder.
    """

    def __init__(self, path: str, pooling: str, mixed_precision: str = "no"):
        super().__init__()
        self.pooling, self.mixed_precision = pooling, mixed_precision
        encoder, self.processor = load_with_processor(MAEModel, path)
        self.encoder = encoder.requires_grad_(False)
        self.dtype = pixel_dtype(self.processor)

    @property
    def view(self) -> View:
        """The evaluation view that the model was trained for."""
        return scoring_view(self.encoder.config, self.processor)

    @property
    def width(self) -> int:
        """Numbers in a pooled vector."""
        return self.encoder.config.hidden_size * (2 if self.pooling == "both" else 1)

    def train(self, mode: bool = True) -> "FrozenEncoder":
        """It stays in evaluation mode, also as part of something that is trained."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) in the source's dtype -> pooled features, float32."""
        pixel_values = make_normalizer(self.processor, self.dtype, images.device)(images)
        # TF32, cuDNN's default for convolutions, would make features depend on the batch's size in the third digit.
        exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        with exact, torch.autocast(images.device.type, torch.bfloat16, enabled=self.mixed_precision == "bf16"):
            return pool(self.encoder(pixel_values).last_hidden_state, self.pooling)


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
    """Features with what the source says of each image.

    Args:
        values: (n, ...) float32 on the host.
        labels: (n,) as the source has them.
        keys: (n,) places of the images.
        bad: (key, reason) of the images that could not be decoded, as far as they are known by name.
        num_rows: images that there were, decoded or not.
    """

    values: torch.Tensor
    labels: list[Any]
    keys: list[str]
    bad: list[tuple[str, str]]
    num_rows: int


def encoded_batches(
    encode: Callable[[torch.Tensor], torch.Tensor],
    rows: Rows,
    view: View,
    batch_size: int,
    num_workers: int,
    accelerator: Accelerator,
    bar: str | None = None,
) -> Generator[tuple[Batch, torch.Tensor]]:
    """This process's share of the rows, batch by batch: images and what `encode` makes of them, on the device.

    Every process calls `encode` as often as the others, since sharded weights are gathered in each call.

    Args:
        encode: (B, C, H, W) in the source's dtype, on the device -> (B, ...).
        rows: the images.
        view: what becomes of them.
        batch_size: images at once.
        num_workers: loader processes.
        accelerator: of all processes.
        bar: what a progress bar says before its number; None: no bar.
    """
    ranks, shape = accelerator.num_processes, (1, view.num_channels, *view.size)
    dataset = EvaluationSet(rows, view, batch_size, rank=accelerator.process_index, ranks=ranks)
    longest_share = -(-len(rows) // ranks)
    calls = range(-(-longest_share // batch_size))
    with closing(each_batch(make_loader(dataset, num_workers))) as batches, torch.no_grad():
        for _ in tqdm(calls, desc=bar, disable=bar is None or not accelerator.is_main_process, leave=False):
            batch = next(batches, None)
            empty = batch is None or not batch.keys
            images = torch.zeros(shape, dtype=getattr(torch, view.dtype)) if empty else batch.images
            values = encode(images.to(accelerator.device, non_blocking=True))
            if batch is not None:
                yield batch, values[: len(batch.keys)]


def extract_table(
    encode: Callable[[torch.Tensor], torch.Tensor],
    rows: Rows,
    view: View,
    batch_size: int,
    num_workers: int,
    accelerator: Accelerator,
    bar: str | None = None,
) -> Table:
    """Features of all rows, in their order, on every process; arguments of `encoded_batches`.

    Raises:
        DataError: if no image can be decoded.
    """
    values: list[torch.Tensor] = []
    share = Table(torch.empty(0), [], [], [], len(rows))
    for batch, encoded in encoded_batches(encode, rows, view, batch_size, num_workers, accelerator, bar):
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
