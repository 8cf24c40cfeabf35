"""Scores of a fine-tuned model on a labelled split, by the evaluation crop of its image processor."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import EvalPrediction

from ..data.labels import Labels
from ..data.loader import EvaluationSet, each_batch, make_loader
from ..data.sources import DataError, open_splits
from ..data.transform import evaluation_spec, make_normalizer
from ..modeling_mae import MAEForImageClassification
from ..pretrained import load_with_processor
from ..run_folder import add_result
from .metrics import make_compute_metrics
from .recipes import ScoreRecipe
from .results import make_result
from .table import report_bad


@dataclass
class ClassificationRecipe(ScoreRecipe):
    """Keys of `hf-mae evaluate classification`; `split` names what the model was fine-tuned on."""


@torch.no_grad()
def evaluate_classification(recipe: ClassificationRecipe) -> dict[str, Any]:
    """Score a fine-tuned model.

    Returns:
        The entry of results.json.

    Raises:
        UserError: if the model or the data can't be read, or their labels don't go together; one line with
            the remedy.
    """
    recipe.check()
    model, processor = load_with_processor(MAEForImageClassification, recipe.model)
    config: Any = model.config
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)  # pyright: ignore[reportArgumentType]
    _, rows, evaluated_on = open_splits(recipe, streaming=False)
    problem = config.problem_type or "single_label_classification"
    labels = Labels(problem, tuple(config.id2label[i] for i in range(config.num_labels)))
    spec = evaluation_spec(config, processor)
    normalize = make_normalizer(processor, spec.dtype, torch.device(device))
    logits, values, bad = [], [], []
    for batch in each_batch(make_loader(EvaluationSet(rows, spec, recipe.batch_size), recipe.num_workers)):
        if batch.keys:
            with torch.autocast(device, torch.bfloat16, enabled=recipe.mixed_precision == "bf16"):
                logits.append(model(normalize(batch.images.to(device))).logits.float().cpu())
        values += batch.labels
        bad += batch.bad
    if not values:
        raise DataError(f"none of the {len(rows)} images of {rows.source.name} can be decoded; check the data")
    report_bad(len(values), rows, bad, recipe.max_bad_fraction)
    prediction = EvalPrediction(torch.cat(logits).numpy(), labels.targets(values, rows.source).numpy())
    protocol = {
        "name": "classification",
        "image_size": list(spec.size),
        "eval_resize": spec.eval_resize,
        "mixed_precision": recipe.mixed_precision,
    }
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
