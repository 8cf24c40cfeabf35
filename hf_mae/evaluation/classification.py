"""Scores of a fine-tuned model on a labelled split, by the evaluation crop of its image processor."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import EvalPrediction

from ..configuration_mae import MAEConfig
from ..data.labelled import scoring_view
from ..data.labels import Labels
from ..data.sources import DataError
from ..data.splits import open_splits
from ..data.stats import make_normalizer
from ..data.stream import EvaluationSet, each_batch, make_loader
from ..image_processing_mae import MAEImageProcessor
from ..modeling_mae import MAEForImageClassification
from .metrics import make_compute_metrics
from .results import add_result, make_result, results_file


@dataclass
class ClassificationRecipe:
    """Keys of `hf-mae evaluate classification`."""

    model: str = field(metadata={"help": "folder or Hub id of a fine-tuned model"})
    dataset: str = field(metadata={"help": "labelled data set, as for hf-mae finetune"})
    dataset_config: str | None = field(default=None, metadata={"help": "configuration name of a Hub data set"})
    dataset_revision: str | None = field(default=None, metadata={"help": "branch, tag or commit of a Hub data set"})
    split: str = field(default="train", metadata={"help": "split that the model was fine-tuned on"})
    eval_dataset: str | None = field(default=None, metadata={"help": "another data set to score on"})
    eval_split: str | None = field(
        default=None, metadata={"help": "split to score on; found by name, or the held-out part, when omitted"}
    )
    image_column: str | None = field(default=None, metadata={"help": "column of the images"})
    label_column: str | None = field(default=None, metadata={"help": "column of the labels"})
    max_eval_samples: int | None = field(default=None, metadata={"help": "score so many images at most"})
    per_device_batch_size: int = field(default=64, metadata={"help": "images at once"})
    num_workers: int = field(default=2, metadata={"help": "loader processes"})
    results: str | None = field(
        default=None, metadata={"help": "file the result is added to, or none; a local model's own results.json"}
    )

    @property
    def results_file(self) -> Path | None:
        """Where the result goes."""
        return results_file(self.results, self.model)


@torch.no_grad()
def evaluate_classification(recipe: ClassificationRecipe) -> dict[str, Any]:
    """Score a fine-tuned model.

    Returns:
        The entry of results.json.

    Raises:
        DataError: if the model or the data can't be read, or their labels don't go together.
    """
    try:
        config: Any = MAEConfig.from_pretrained(recipe.model)
        if "MAEForImageClassification" not in (config.architectures or []):
            raise DataError(f"{recipe.model} has no classifier; make one by hf-mae finetune --model {recipe.model}")
        model = MAEForImageClassification.from_pretrained(recipe.model).eval()
        processor = MAEImageProcessor.from_pretrained(recipe.model)
    except DataError:
        raise
    except (OSError, ValueError) as error:
        raise DataError(f"--model {recipe.model} can't be loaded: {' '.join(str(error).split())[:300]}") from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    _, rows, evaluated_on = open_splits(
        recipe.dataset,
        recipe.split,
        recipe.eval_dataset,
        recipe.eval_split,
        max_eval_samples=recipe.max_eval_samples,
        config_name=recipe.dataset_config,
        revision=recipe.dataset_revision,
        image_column=recipe.image_column,
        label_column=recipe.label_column,
        streaming=False,
    )
    problem = config.problem_type or "single_label_classification"
    labels = Labels(problem, tuple(config.id2label[i] for i in range(config.num_labels)))
    view = scoring_view(config, processor)
    normalize = make_normalizer(processor, view.dtype, torch.device(device))
    logits, values, bad = [], [], []
    for batch in each_batch(make_loader(EvaluationSet(rows, view, recipe.per_device_batch_size), recipe.num_workers)):
        if batch.keys:
            logits.append(model(normalize(batch.images.to(device))).logits.float().cpu())
        values += batch.labels
        bad += batch.bad
    if not values:
        raise DataError(f"none of the {len(rows)} images of {rows.source.name} can be decoded; check the data")
    prediction = EvalPrediction(torch.cat(logits).numpy(), labels.targets(values, rows.source).numpy())
    protocol = {"name": "classification", "image_size": list(view.size), "eval_resize": view.eval_resize}
    data = {
        "dataset": recipe.eval_dataset or recipe.dataset,
        "config": recipe.dataset_config,
        "revision": recipe.dataset_revision,
        "split": rows.source.split,
        "evaluated_on": evaluated_on,
        "max_eval_samples": recipe.max_eval_samples,
        "eval_images": len(values),
        "bad_samples": len(bad),
        "classes": len(labels.names),
    }
    result = make_result(protocol, data, recipe.model, [make_compute_metrics(problem)(prediction)])
    if recipe.results_file:
        add_result(result, recipe.results_file)
    return result
