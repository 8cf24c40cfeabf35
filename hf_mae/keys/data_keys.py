"""How every command names its data, and the keys of `hf-mae prepare` and `hf-mae stats`."""

from dataclasses import dataclass

from ..errors import DataError
from . import Recipe, inherit, key


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
        label_column: column (or tar member) of the labels.
    """

    dataset: str = key(
        help_text="Hub id, folder or URL of images, parquet or tar shards; or digits", group="data", place=True
    )
    dataset_config: str | None = key(
        None, "configuration name of a Hub data set", group="data", place=True, metavar="NAME"
    )
    dataset_revision: str | None = key(
        None, "branch, tag or commit of a Hub data set", group="data", place=True, metavar="NAME"
    )
    image_column: str | None = key(None, "column of the images", group="data", metavar="NAME", shown="found by type")
    label_column: str | None = key(
        None, "column of the labels", group="data", metavar="NAME", shown="found by type or name"
    )


@dataclass
class DataKeys(SourceKeys):
    """The rows that a command reads."""

    split: str = key("train", "split to read", group="data", metavar="NAME")
    max_samples: int | None = key(None, "maximum number of images", group="data", shown="all")


@dataclass
class SplitKeys(DataKeys):
    """The rows to learn from, and the rows to evaluate on; `open_splits` says how these are found."""

    eval_dataset: str | None = key(
        None, "data set to evaluate on", group="data", place=True, shown="the same as dataset"
    )
    eval_split: str | None = key(
        None,
        "split to evaluate on",
        group="data",
        place=True,
        metavar="NAME",
        shown="found by name, or a held-out part",
    )
    max_eval_samples: int | None = key(
        None, "maximum number of evaluation images", group="evaluation", free=True, shown="all"
    )


@dataclass
class PrepareRecipe(SourceKeys):
    """Keys of `hf-mae prepare SRC DST`."""

    dataset: str = inherit(SourceKeys, "dataset", positional=True, metavar="SRC")
    output_dir: str = key(help_text="folder to write", group="output", positional=True, metavar="DST")
    split: str | None = key(None, "the only split to prepare", group="data", metavar="NAME", shown="all splits")
    shortest_edge: int = key(
        256, "pixels of the shorter side; smaller images keep their size and their bytes", group="output"
    )
    quality: int = key(90, "JPEG quality, 1 to 95", group="output")
    rows_per_shard: int = key(5000, "number of images in a file", group="output")
    num_workers: int = key(2, "processes, each writing one shard at a time; 0 for none", group="hardware")
    max_bad_fraction: float = key(0.01, "fail when a larger fraction of the images can't be decoded", group="data")

    def check(self) -> None:
        """Raise a DataError for a value that can't be used."""
        limits = {
            "shortest_edge": (1, 65_535),
            "quality": (1, 95),
            "rows_per_shard": (1, 10**9),
            "num_workers": (0, 1000),
        }
        for name, (low, high) in {**limits, "max_bad_fraction": (0, 1)}.items():
            if not low <= getattr(self, name) <= high:
                raise DataError(f"{name} {getattr(self, name)} is out of range; give {low} to {high}")


@dataclass
class StatsRecipe(DataKeys):
    """Keys of `hf-mae stats`."""

    streaming: bool | None = key(None, "read the data in place, block by block", group="data", shown="true if remote")
    num_channels: int | None = key(None, "number of channels of each image", group="data", shown="as in the data")
