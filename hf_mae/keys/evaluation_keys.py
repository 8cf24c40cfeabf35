"""The keys of `hf-mae evaluate knn | linear-probe | classification` and of `hf-mae embed`."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from ..errors import UserError
from ..optim.schedule import scaled_lr
from . import Recipe, data_key, evaluation_key, hardware_key, inherit, key, model_key, optimization_key, output_key
from .data_keys import PREDICTION_FILES, DataKeys, SplitKeys, predictions_key

Pooling = Literal["mean", "cls", "both"]


@dataclass
class ModelInput(Recipe):
    """The model that a command reads."""

    model: str = model_key(help_text="folder or Hub id of a pretrained model", metavar="DIR|ID")


@dataclass
class FeatureRecipe(ModelInput, DataKeys):
    """Keys of every command that runs images through a frozen model."""

    max_bad_fraction: float = data_key(0.01, "fail when a larger fraction of the images can't be decoded")
    per_device_batch_size: int | None = hardware_key(None, "images per device at once", "256")
    mixed_precision: Literal["no", "bf16"] = hardware_key("no", "precision of the model's forward pass")
    num_workers: int = hardware_key(2, "loader processes for each process")

    def check(self) -> None:
        super().check()
        self.check_least(max_samples=1, per_device_batch_size=1, num_workers=0)
        self.check_range("max_bad_fraction", high=1)

    @property
    def batch_size(self) -> int:
        """Images per device at once, where it doesn't change results."""
        return self.per_device_batch_size or 256


@dataclass
class ScoreRecipe(FeatureRecipe, SplitKeys):
    """Keys of every command whose result is an entry of results.json."""

    split: str = inherit(DataKeys, "split", "train", "split of the data to learn from")
    max_samples: int | None = inherit(DataKeys, "max_samples", None, "learn from at most this many images")
    results: str | None = output_key(
        None,
        "JSON file that the result is added to; none only prints it",
        "results.json of a local model",
        metavar="FILE|none",
    )

    def check(self) -> None:
        super().check()
        self.check_least(max_eval_samples=1)

    @property
    def results_file(self) -> Path | None:
        """File that the result is added to: by default beside the weights, if these are local."""
        if self.results:
            return None if self.results == "none" else Path(self.results)
        from ..run_folder import RunFolder  # not at the top: `--help` needs no locks

        return RunFolder(self.model).results_file if Path(self.model).is_dir() else None


@dataclass
class ClassificationRecipe(ScoreRecipe):
    """Keys of `hf-mae evaluate classification`; `split` names what the model was fine-tuned on."""

    model: str = inherit(ModelInput, "model", help_text="folder or Hub id of a fine-tuned model")
    split: str = inherit(DataKeys, "split", "train", "split that the model was fine-tuned on")
    max_samples: ClassVar[None] = None  # type: ignore[misc] # pyright: ignore[reportIncompatibleVariableOverride]
    predictions: str | None = predictions_key()

    def check(self) -> None:
        super().check()
        self.check_ending("predictions", *PREDICTION_FILES)


@dataclass
class PredictRecipe(FeatureRecipe):
    """Keys of `hf-mae predict`."""

    model: str = inherit(ModelInput, "model", help_text="folder or Hub id of a fine-tuned model")
    split: str | None = inherit(DataKeys, "split", None, "the only split to read", shown="all splits")  # type: ignore
    output: str = output_key(help_text="file to write: .csv or .parquet", metavar="FILE")

    def check(self) -> None:
        super().check()
        self.check_ending("output", *PREDICTION_FILES)


@dataclass
class EvaluateRecipe(ScoreRecipe):
    """Keys of kNN and linear probing, the evaluations of frozen features."""

    pooling: Pooling | None = evaluation_key(
        None, "feature vector of an image: mean of the patch tokens, class token, or both", "mean"
    )
    seeds: int = evaluation_key(1, "number of repetitions, each with a different random seed")
    fraction: float = evaluation_key(1.0, "fraction of both splits that each repetition draws")

    def check(self) -> None:
        super().check()
        self.check_least(seeds=1)
        self.check_fraction("fraction", "give e.g. 0.2")


@dataclass
class KnnRecipe(EvaluateRecipe):
    """Keys of `hf-mae evaluate knn`."""

    k: list[int] = evaluation_key([10, 20, 100, 200], "numbers of neighbours that vote; each gives one accuracy")
    temperature: float = evaluation_key(0.07, "temperature of the weights exp(cosine / temperature)")

    def check(self) -> None:
        super().check()
        self.check_least(k=1)
        self.check_range("temperature", low=1e-6, high=1e6)


@dataclass
class LinearProbeRecipe(EvaluateRecipe):
    """Keys of `hf-mae evaluate linear-probe`; those of the group optimization only matter with `--protocol paper`.

    Their defaults are the numbers of arXiv:2111.06377, Table 10, for ViT-Base; 50 epochs are enough for ViT-Large and
    ViT-Huge. `linear_probe.py` has the paper's settings that can't be changed.
    """

    recipe: str | None = key(
        None,
        "recipe with values for these keys: its name, such as linear_probe_vit_base_in1k, or a YAML file",
        metavar="NAME|FILE",
    )
    protocol: Literal["fast", "paper"] = evaluation_key(
        "fast", "logistic regression on features, or LARS on random crops as in the paper"
    )
    pooling: Pooling | None = inherit(EvaluateRecipe, "pooling", None, shown="mean; cls for the paper's protocol")
    per_device_batch_size: int | None = inherit(
        FeatureRecipe,
        "per_device_batch_size",
        None,
        shown="256; for the paper's protocol, the largest that fits the step, up to 512",
    )
    total_batch_size: int = optimization_key(16_384, "images per step, over all processes")
    epochs: float = optimization_key(90, "passes over the training images")
    warmup_epochs: float = optimization_key(10, "length of the linear warm-up in epochs")
    blr: float = optimization_key(0.1, "base learning rate per 256 images: lr = blr * total_batch_size / 256")
    min_lr: float = optimization_key(0.0, "learning rate at the end of the cosine schedule")
    weight_decay: float = optimization_key(0.0, "weight decay of the linear layer")
    seed: int = optimization_key(0, "random seed of weights, order, crops and flips; each repetition adds 1")

    @property
    def lr(self) -> float:
        """The highest learning rate of the paper's protocol."""
        return scaled_lr(self.blr, self.total_batch_size)

    def check(self) -> None:
        super().check()
        if self.protocol == "paper" and self.fraction != 1:
            raise UserError("fraction draws from a table of features; with --protocol paper pass --max_samples")
        self.check_least(total_batch_size=2)
        self.check_range("epochs", low=1e-9, high=10**6)
        self.check_range("warmup_epochs", "blr", "min_lr", "weight_decay")
        self.check_seed()


FEATURE_FILES = (".parquet", ".npy")


@dataclass
class EmbedRecipe(FeatureRecipe):
    """Keys of `hf-mae embed`."""

    output: str = output_key(
        help_text="file to write: NAME.parquet, or NAME.npy with NAME.csv beside it", metavar="FILE"
    )
    pooling: Literal["mean", "cls", "both", "patches"] = output_key(
        "mean", "features: mean of the patch tokens, class token, both, or all patch tokens"
    )

    def check(self) -> None:
        super().check()
        self.check_ending("output", *FEATURE_FILES)
