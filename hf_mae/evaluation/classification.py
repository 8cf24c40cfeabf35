"""Scores of a fine-tuned model on a labelled split, with the evaluation crop of its image processor."""

from typing import Any

from transformers import EvalPrediction

from ..data.sources import open_splits
from ..data.stats import probe_rows
from ..data.understood import announce_data
from ..files import check_writable
from ..keys.evaluation_keys import ClassificationRecipe
from .metrics import detail, make_compute_metrics
from .predictions import ClassifierRun, scores_of, write_predictions
from .results import check_results_file, named_data, record_result, with_split_of_run


def evaluate_classification(recipe: ClassificationRecipe) -> dict[str, Any] | None:
    """Score a fine-tuned model.

    Returns:
        The entry of results.json; None on all but the main process.

    Raises:
        UserError: if the model or the data can't be read, or their labels don't match; one line with the remedy.
    """
    check_results_file(recipe)
    check_writable(recipe.predictions, "--predictions")
    recipe = with_split_of_run(recipe)
    run = ClassifierRun(recipe)
    labels = run.labels
    with run.accelerator.main_process_first():
        _, rows, evaluated_on = open_splits(recipe, streaming=False, labelled=True, problem=labels.problem)
        probe = probe_rows(rows, run.spec.num_channels)
    if run.accelerator.is_main_process:
        classes = None if labels.problem == "regression" else f"{len(labels.names)} classes"
        announce_data(probe, run.spec, None, rows, evaluated_on, classes)
    table = run.logits(rows)
    if not run.accelerator.is_main_process:
        return None
    logits, targets = table.values.numpy(), labels.targets(table.labels, rows.source).numpy()
    if recipe.predictions:
        scores = scores_of(labels, table.values)
        write_predictions(recipe.predictions, "--predictions", labels, table.keys, scores, targets)
    protocol = {
        "name": "classification",
        "image_size": list(run.spec.size),
        "eval_resize": run.spec.eval_resize,
        "mixed_precision": recipe.mixed_precision,
    }
    data = {
        **named_data(recipe, rows.source.split, evaluated_on, learned=False),
        "eval_images": len(table.keys),
        "bad_samples": len(table.bad),
        "classes": len(labels.names),
    }
    figures = make_compute_metrics(labels.problem)(EvalPrediction(logits, targets))
    return record_result(recipe, protocol, data, [figures], detail(labels, logits, targets))
