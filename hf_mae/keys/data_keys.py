"""How every command names its data, and the keys of `hf-mae prepare` and `hf-mae inspect`."""

from dataclasses import dataclass
from typing import Any

from ..errors import UserError, without_secrets
from . import FLOAT32_MAX, PICTURE_FILES, Recipe, data_key, evaluation_key, hardware_key, inherit, output_key


@dataclass
class SourceKeys(Recipe):
    """Where images and labels come from.

    Args:
        dataset: `digits` (built in: 1,797 handwritten digits of 8 x 8 pixels); a folder of images; a folder made by
            `datasets`' `save_to_disk`, or laid out as on the Hub; parquet files or tars, as file, glob or pattern
            such as `shard-{000..003}.tar`; a URL of such a folder or such files; or the id of a data set on the Hub.
        dataset_config: configuration of a data set that has several.
        dataset_revision: branch, tag or commit of a data set on the Hub.
        image_column: column (or tar member) of the images.
        label_column: column (or tar member) of the labels; for tables beside images, also several, as in "a,b".
        labels: table of labels for a folder of images (.csv, .tsv, .jsonl or .parquet) that lies elsewhere.
    """

    dataset: str = data_key(
        help_text="folder, files, URL or Hub id of images, parquet or tar shards; or digits, a built-in set of 1,797 "
        "handwritten digits",
        place=True,
    )
    dataset_config: str | None = data_key(None, "configuration name of a Hub data set", place=True, metavar="NAME")
    dataset_revision: str | None = data_key(None, "branch, tag or commit of a Hub data set", place=True, metavar="NAME")
    image_column: str | None = data_key(None, "column that holds the images", "found by type", metavar="NAME")
    label_column: str | None = data_key(
        None, "column that holds the labels, or several of 0 and 1: a,b", "found by type or name", metavar="NAME"
    )
    labels: str | None = data_key(
        None, "CSV file with the labels of a folder of images", "metadata.csv in it", place=True, metavar="FILE"
    )


@dataclass
class DataKeys(SourceKeys):
    """The rows that a command reads."""

    split: str = data_key("train", "split of the data to read", metavar="NAME")
    max_samples: int | None = data_key(None, "read at most this many images", "all")


@dataclass
class SplitKeys(DataKeys):
    """The rows to learn from, and the rows to evaluate on; `open_splits` says how these are found."""

    eval_dataset: str | None = data_key(
        None,
        "another data set to evaluate on: folder, files, URL, Hub id or digits",
        "eval_split of dataset",
        place=True,
    )
    eval_split: str | None = data_key(
        None,
        "name of the split to evaluate on",
        "validation or test if there is one, otherwise eval_fraction of split, held out from training",
        place=True,
        metavar="NAME",
    )
    eval_fraction: float | None = data_key(
        None,
        "fraction of split to hold out from training and evaluate on, whether or not the data has an evaluation split",
        "0.05, if the data has no evaluation split",
    )
    max_eval_samples: int | None = evaluation_key(None, "evaluate on at most this many images", "all")

    def check(self) -> None:
        super().check()
        if (fraction := self.eval_fraction) is None:
            return
        if not 0 < fraction < 1:
            raise UserError(f"eval_fraction {fraction} lies outside (0, 1); give e.g. 0.2")
        for name in ("eval_dataset", "eval_split"):
            if given := getattr(self, name):
                raise UserError(
                    f"eval_fraction {fraction} holds out a part of split {self.split}, but {name} is "
                    f"{without_secrets(given)}; leave out one of them"
                )

    def evaluation_source(self) -> SourceKeys:
        """Where the images to evaluate on come from. Configuration and revision are for `dataset` alone."""
        if self.eval_dataset is None:
            return self
        shared = {name: getattr(self, name) for name in ("image_column", "label_column", "labels")}
        return SourceKeys(dataset=self.eval_dataset, **shared)


PREDICTION_FILES = (".csv", ".parquet")


def predictions_key(**changes: Any) -> Any:
    """A file for a classifier's predictions for the images that it is evaluated on."""
    text = "CSV or parquet file for the label, prediction and scores of each evaluation image"
    return output_key(None, text, "none", metavar="FILE", **changes)


@dataclass
class NodataKeys(Recipe):
    """Which pixels are missing."""

    nodata: float | None = data_key(None, "pixel value that stands for missing data, besides NaN", "none")

    @property
    def nodata_flag(self) -> str:
        """The flag at the end of a command line, with a space before it; empty without a value."""
        return "" if self.nodata is None else f" --nodata {self.nodata:.9g}"  # a float32 has nine digits at most

    def check(self) -> None:
        super().check()
        self.check_range("nodata", low=-FLOAT32_MAX, high=FLOAT32_MAX)


@dataclass
class PrepareRecipe(NodataKeys, SourceKeys):
    """Keys of `hf-mae prepare SRC DST`."""

    dataset: str = inherit(SourceKeys, "dataset", positional=True, metavar="SRC")
    output_dir: str = output_key(help_text="folder for the parquet shards", positional=True, metavar="DST")
    split: str | None = data_key(None, "the only split to prepare", "all splits", metavar="NAME")
    shortest_edge: int = output_key(256, "pixels of the shorter side; smaller images keep their size and their bytes")
    quality: int = output_key(90, "quality of re-encoded JPEGs, 1 to 95")
    rows_per_shard: int = output_key(5000, "number of images in each file")
    num_workers: int = hardware_key(2, "processes, each writing one shard at a time; 0 for none")
    max_bad_fraction: float = data_key(0.01, "fail when a larger fraction of the images can't be decoded")

    def check(self) -> None:
        super().check()
        self.check_range("shortest_edge", low=1, high=65_535)
        self.check_range("quality", low=1, high=95)
        self.check_range("rows_per_shard", low=1, high=10**9)
        self.check_range("num_workers", high=1000)
        self.check_range("max_bad_fraction", high=1)


@dataclass
class InspectRecipe(NodataKeys, SourceKeys):
    """Keys of `hf-mae inspect DATA`."""

    dataset: str = inherit(SourceKeys, "dataset", positional=True, metavar="DATA")
    split: str | None = data_key(None, "the only split to look at", "all splits", metavar="NAME")
    max_samples: int | None = data_key(
        None, "read at most this many images of each split", "as many as half a minute allows"
    )
    num_channels: int | None = data_key(None, "number of channels to decode each image to", "as in the data")
    output: str | None = output_key(
        None, "file for a contact sheet of each split, .png, .webp or .jpg", "none", metavar="FILE"
    )
    json: bool = output_key(False, "print what was found as JSON instead of a table")

    def check(self) -> None:
        super().check()
        self.check_least(max_samples=1, num_channels=1)
        self.check_ending("output", *PICTURE_FILES)
