"""Scores of a fine-tuned model on a labelled split, with the evaluation crop of its image processor."""

from typing import Any

import torch
from accelerate import Accelerator
from transformers import EvalPrediction

from ..classifier_mae import MAEForImageClassification
from ..data.labels import Labels
from ..data.sources import open_splits
from ..data.stats import probe_rows
from ..data.transform import evaluation_spec, make_normalizer
from ..data.understood import announce_data
from ..keys.evaluation_keys import ClassificationRecipe
from ..pretrained import load_with_processor
from .metrics import make_compute_metrics
from .results import check_results_file, named_data, record_result
from .table import encoded_batches, even_batches, extract_table, report_bad


def evaluate_classification(recipe: ClassificationRecipe) -> dict[str, Any] | None:
    """Score a fine-tuned model.

    Returns:
        The entry of results.json; None on all but the main process.

    Raises:
        UserError: if the model or the data can't be read, or their labels don't match; one line with the remedy.
    """
    check_results_file(recipe)
    accelerator = Accelerator()
    model, processor = load_with_processor(MAEForImageClassification, recipe.model)
    config: Any = model.config
    device = accelerator.device
    model.to(device)  # pyright: ignore[reportArgumentType]
    with accelerator.main_process_first():
        _, rows, evaluated_on = open_splits(recipe, streaming=False, labelled=True)
        probe = probe_rows(rows, config.num_channels)
    problem = config.problem_type or "single_label_classification"
    labels = Labels(problem, tuple(config.id2label[i] for i in range(config.num_labels)))
    spec = evaluation_spec(config, processor)
    normalize = make_normalizer(processor, device)
    if accelerator.is_main_process:
        announce_data(probe, spec, None, rows, evaluated_on)

    def logits(images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=recipe.mixed_precision == "bf16"):
            return model(normalize(images)).logits

    batches = even_batches(rows, spec, recipe.batch_size, recipe.num_workers, accelerator)
    table = extract_table(rows, encoded_batches(logits, batches))
    report_bad(rows, table.bad, recipe.max_bad_fraction)
    if not accelerator.is_main_process:
        return None
    prediction = EvalPrediction(table.values.numpy(), labels.targets(table.labels, rows.source).numpy())
    protocol = {
        "name": "classification",
        "image_size": list(spec.size),
        "eval_resize": spec.eval_resize,
        "mixed_precision": recipe.mixed_precision,
    }
    data = {
        **named_data(recipe, rows.source.split, evaluated_on, learned=False),
        "eval_images": len(table.keys),
        "bad_samples": len(table.bad),
        "classes": len(labels.names),
    }
    return record_result(recipe, protocol, data, [make_compute_metrics(problem)(prediction)])
