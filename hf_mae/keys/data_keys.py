"""How every command names its data."""

from dataclasses import dataclass


@dataclass(kw_only=True)
class DataKeys:
    """One split of a data set, and its columns.

    Args:
        dataset: `digits` (built in: 1,797 handwritten digits of 8 x 8 pixels); a folder of images; a folder made by
            `datasets`' `save_to_disk`, or laid out as on the Hub; parquet files or tars, as file, glob or pattern
            such as `shard-{000..003}.tar`; a URL of such a folder or such files; or the id of a data set on the Hub.
        dataset_config: configuration of a data set that has several.
        dataset_revision: branch, tag or commit of a data set on the Hub.
        split: name of the split. A folder of images without split folders is `train`, and so are single files.
        image_column: column (or tar member) of the images; found by type when omitted.
        label_column: column (or tar member) of the labels; found by type or name when omitted.
        max_samples: maximum number of images; all of them when omitted.
    """

    dataset: str
    dataset_config: str | None = None
    dataset_revision: str | None = None
    split: str = "train"
    image_column: str | None = None
    label_column: str | None = None
    max_samples: int | None = None


@dataclass(kw_only=True)
class SplitKeys(DataKeys):
    """A split to learn from, and one to evaluate on.

    Args:
        eval_dataset: data set to evaluate on; `dataset` when omitted.
        eval_split: split to evaluate on; found by its name, or a held-out part of `split`, when omitted.
        max_eval_samples: maximum number of images to evaluate on; all of them when omitted.
    """

    eval_dataset: str | None = None
    eval_split: str | None = None
    max_eval_samples: int | None = None
