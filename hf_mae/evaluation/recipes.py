"""TODO"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..errors import UserError
from ..keys.data_keys import DataKeys, SplitKeys
from ..run_folder import read_results


@dataclass(kw_only=True)
class FeatureRecipe(DataKeys):
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
        """Raise a UserError for a value that can't be."""
        for key, least in (("max_samples", 1), ("per_device_batch_size", 1), ("num_workers", 0)):
            if (value := getattr(self, key)) is not None and value < least:
                raise UserError(f"{key} {value} is too small; give {least} or more")

    @property
    def batch_size(self) -> int:
        """Images at once, where nothing depends on it."""
        return self.per_device_batch_size or 256


@dataclass(kw_only=True)
class ScoreRecipe(FeatureRecipe, SplitKeys):
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
        """Raise a UserError for a value that can't be, a DataError for a file that results can't be added to."""
        super().check()
        if self.max_eval_samples is not None and self.max_eval_samples < 1:
            raise UserError(f"max_eval_samples {self.max_eval_samples} is too small; give 1 or more")
        if path := self.results_file:
            read_results(path)

    @property
    def results_file(self) -> Path | None:
        """Where the result goes: what was typed, none for "none"; else beside the weights, if these are local."""
        if self.results:
            return None if self.results == "none" else Path(self.results)
        return Path(self.model) / "results.json" if Path(self.model).is_dir() else None
