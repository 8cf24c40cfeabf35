"""Predictions for each image: `--predictions FILE`, and `hf-mae predict` for images without labels."""

# Shape letters in this file
#   n images   K classes

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import torch
from accelerate import Accelerator

from ..classifier_mae import MAEForImageClassification
from ..data.labels import Labels
from ..data.locate import locate
from ..data.order import Rows
from ..data.sources import open_split
from ..data.stats import probe_rows
from ..data.transform import evaluation_spec, make_normalizer
from ..data.understood import announce_data
from ..files import as_utf8, check_writable, replaced, writing
from ..keys.evaluation_keys import FeatureRecipe, PredictRecipe
from ..pretrained import load_with_processor
from .table import Table, run_model

SEPARATOR = "; "  # of several classes in one text


class ClassifierRun:
    """A fine-tuned model and the processes that run it.

    Args:
        recipe: keys of the command.

    Raises:
        UserError: if the model can't be loaded.
    """

    def __init__(self, recipe: FeatureRecipe):
        self.recipe, self.accelerator = recipe, Accelerator()
        self.model, processor = load_with_processor(MAEForImageClassification, recipe.model)
        config: Any = self.model.config
        self.model.to(self.accelerator.device)  # pyright: ignore[reportArgumentType]
        problem = config.problem_type or "single_label_classification"
        self.labels = Labels(problem, tuple(config.id2label[i] for i in range(config.num_labels)))
        self.spec = evaluation_spec(config, processor)
        self.normalize = make_normalizer(processor, self.accelerator.device)

    def logits(self, rows: Rows) -> Table:
        """The logits of all rows, (n, K), on every process; errors are those of `run_model`."""
        device, bf16 = self.accelerator.device.type, self.recipe.mixed_precision == "bf16"

        def encode(images: torch.Tensor) -> torch.Tensor:
            with torch.autocast(device, torch.bfloat16, enabled=bf16):
                return self.model(self.normalize(images)).logits

        return run_model(encode, rows, self.spec, self.recipe, self.accelerator, "images")


def predict(recipe: PredictRecipe) -> dict[str, Any] | None:
    """Write a fine-tuned model's predictions for the images of all splits or of one; they need no labels.

    Returns:
        `path`; `images`, the number written; `classes`, class -> number of images that it was predicted for, largest
        first, without those of no image. None on all but the main process.

    Raises:
        UserError: for anything a user can fix; one line with the remedy.
    """
    check_writable(recipe.output, "--output")
    run, place = ClassifierRun(recipe), locate(recipe)
    tables = []
    for split in [recipe.split] if recipe.split else place.splits:
        with run.accelerator.main_process_first():
            rows = Rows(open_split(place, split), max_samples=recipe.max_samples)
            probe = probe_rows(rows, run.spec.num_channels)
        if run.accelerator.is_main_process:
            announce_data(probe, run.spec, rows)
        tables.append(run.logits(rows))
    if not run.accelerator.is_main_process:
        return None
    scores = scores_of(run.labels, torch.cat([table.values for table in tables]))
    keys = [key for table in tables for key in table.keys]
    write_predictions(recipe.output, "--output", run.labels, keys, scores)
    counts = Counter(name for row in predicted(run.labels, scores) for name in row)
    return {"path": recipe.output, "images": len(keys), "classes": dict(counts.most_common())}


def scores_of(labels: Labels, logits: torch.Tensor) -> np.ndarray:
    """Probabilities of the classes, or the numbers of a regression, (n, K), from logits of that size."""
    if labels.problem == "regression":
        return logits.numpy()
    return (logits.softmax(dim=1) if labels.problem == "single_label_classification" else logits.sigmoid()).numpy()


def predicted(labels: Labels, scores: np.ndarray) -> list[list[str]]:
    """The predicted classes of each image: the likeliest, or all above one half; none for a regression."""
    if labels.problem == "regression":
        return [[] for _ in scores]
    if labels.problem == "single_label_classification":
        return [[labels.names[c]] for c in scores.argmax(axis=1)]
    return [[labels.names[c] for c in np.flatnonzero(row > 0.5)] for row in scores]


def write_predictions(
    path: str, flag: str, labels: Labels, keys: Sequence[str], scores: np.ndarray, targets: np.ndarray | None = None
) -> None:
    """Write a CSV or parquet file with a row for each image.

    Its columns are `key`, the image's place in the source; `label`, if there are targets; `prediction`, the class or
    classes (not for a regression); and `score_CLASS` of each class: its probability, or the predicted number.

    Args:
        path: file to write, .csv or .parquet.
        flag: the key of the command that named it.
        labels: the classes.
        keys: of the n images.
        scores: (n, K), from `scores_of`.
        targets: the targets that `labels` makes, (n,) or (n, K).

    Raises:
        UserError: if the file can't be written.
    """
    columns: dict[str, Any] = {"key": [as_utf8(key) for key in keys]}
    if targets is not None:
        columns["label"] = _true_labels(labels, targets)
    if labels.problem != "regression":
        columns["prediction"] = [SEPARATOR.join(row) for row in predicted(labels, scores)]
    columns |= {f"score_{as_utf8(name)}": scores[:, c] for c, name in enumerate(labels.names)}
    table = pa.table(columns)
    with writing(path, flag):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with replaced(Path(path)) as temporary:
            (pq.write_table if path.lower().endswith(".parquet") else pyarrow.csv.write_csv)(table, temporary)


def _true_labels(labels: Labels, targets: np.ndarray) -> list[Any]:
    if labels.problem == "single_label_classification":
        return [labels.names[c] for c in targets]
    if labels.problem == "regression":
        return [row[0] if len(row) == 1 else SEPARATOR.join(map(str, row)) for row in targets.tolist()]
    return [SEPARATOR.join(labels.names[c] for c in np.flatnonzero(row)) for row in targets]
