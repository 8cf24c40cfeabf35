"""Frozen encoder -> feature table, by one pooling rule that every protocol states."""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from ..data.sources import DataError, Source, open_source
from ..data.stats import RESCALE_FACTORS
from ..data.stream import EvaluationSet, Rows, View, each_batch, make_loader
from ..image_processing_mae import MAEImageProcessor
from ..modeling_mae import MAEModel

Pooling = Literal["mean", "cls"]


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
        """A random part of the rows, without repetition."""
        rows = np.random.default_rng(seed).permutation(len(self.labels))[: max(1, round(fraction * len(self.labels)))]
        chosen = torch.from_numpy(np.sort(rows))
        return Features(self.values[chosen], self.labels[chosen])


@dataclass
class EvaluateRecipe:
    """Keys of `hf-mae evaluate`."""

    model: str = field(metadata={"help": "folder or Hub id of a pretrained model"})
    dataset: str = field(metadata={"help": "labelled data set, as for hf-mae pretrain"})
    dataset_config: str | None = field(default=None, metadata={"help": "configuration name of a Hub data set"})
    dataset_revision: str | None = field(default=None, metadata={"help": "branch, tag or commit of a Hub data set"})
    split: str = field(default="train", metadata={"help": "split that is learnt from"})
    eval_split: str = field(default="validation", metadata={"help": "split that is classified"})
    image_column: str | None = field(default=None, metadata={"help": "column of the images"})
    label_column: str | None = field(default=None, metadata={"help": "column of the labels"})
    max_samples: int | None = field(default=None, metadata={"help": "learn from so many images at most"})
    max_eval_samples: int | None = field(default=None, metadata={"help": "classify so many images at most"})
    pooling: Pooling = field(default="mean", metadata={"help": "mean of the patch tokens, or the class token"})
    fraction: float = field(default=1.0, metadata={"help": "share of both splits that each seed draws"})
    seeds: int = field(default=1, metadata={"help": "repetitions, each on another draw"})
    batch_size: int = field(default=256, metadata={"help": "images at once"})
    num_workers: int = field(default=2, metadata={"help": "loader processes"})


class FrozenEncoder(nn.Module):
    """A pretrained encoder with its image processor's normalisation, all patches visible, nothing trained.

    Args:
        path: folder or Hub id.
        pooling: "mean" of the patch tokens after the last LayerNorm, or "cls".
    """

    def __init__(self, path: str, pooling: Pooling):
        super().__init__()
        try:
            self.encoder: MAEModel = MAEModel.from_pretrained(path, pooling=pooling).eval().requires_grad_(False)
            self.processor = MAEImageProcessor.from_pretrained(path)
        except (OSError, ValueError) as error:
            raise DataError(f"--model {path} can't be loaded: {' '.join(str(error).split())[:300]}") from error
        self.dtype = next((d for d, f in RESCALE_FACTORS.items() if f == self.processor.rescale_factor), "float32")
        if not self.processor.do_rescale:
            self.dtype = "float32"

    @property
    def view(self) -> View:
        """The evaluation view that the model was trained for."""
        processor, config = self.processor, self.encoder.config
        size: Any = processor.size
        return View(
            size=config.image_height_width,
            num_channels=config.num_channels,
            dtype=self.dtype,
            num_patches=config.num_patches,
            eval_resize=size.shortest_edge or (size.height, size.width),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) in the source's dtype -> (B, D) float32."""
        factor = RESCALE_FACTORS[self.dtype]
        mean, std = (
            torch.tensor(values, device=images.device).view(1, -1, 1, 1) / factor
            for values in (self.processor.image_mean, self.processor.image_std)
        )
        return self.encoder((images.float() - mean) / std).pooler_output.float()


@torch.no_grad()
def extract_features(encoder: FrozenEncoder, source: Source, recipe: EvaluateRecipe, most: int | None) -> Features:
    """Features and labels of (at most so many of) a split's images.

    Raises:
        DataError: if the split has no labels.
    """
    device = next(encoder.parameters()).device
    rows = Rows(source, max_samples=most)
    values, labels = [], []
    loader = make_loader(EvaluationSet(rows, encoder.view, recipe.batch_size), recipe.num_workers)
    for batch in each_batch(loader):
        if any(label is None for label in batch.labels):
            raise DataError(f"{source.name} has no labels in split {source.split}; name their column by --label_column")
        values.append(encoder(batch.images.to(device)).cpu())
        labels += batch.labels
    return Features(torch.cat(values), torch.tensor(labels, dtype=torch.long))


def split_features(recipe: EvaluateRecipe) -> tuple[Features, Features]:
    """Features of the split that is learnt from, and of the one that is classified."""
    encoder = FrozenEncoder(recipe.model, recipe.pooling)
    encoder.to("cuda" if torch.cuda.is_available() else "cpu")
    tables = []
    for split, most in ((recipe.split, recipe.max_samples), (recipe.eval_split, recipe.max_eval_samples)):
        source = open_source(
            recipe.dataset,
            split=split,
            config_name=recipe.dataset_config,
            revision=recipe.dataset_revision,
            image_column=recipe.image_column,
            label_column=recipe.label_column,
        )
        tables.append(extract_features(encoder, source, recipe, most))
    train, test = tables
    if len(train.labels.unique()) < 2:
        raise DataError(f"split {recipe.split} of {recipe.dataset} has one class only; two or more are needed")
    return train, test
