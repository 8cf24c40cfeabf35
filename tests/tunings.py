"""Runs of `hf-mae finetune` that take about a second."""

import json
from pathlib import Path

from runs import flags, load_finetune_recipe, start

from hf_mae.training.finetune import trainer_parts

# A second of fine-tuning on the digits.
TINY_TUNING = {
    "dataset": "digits",
    "crop_scale": [0.7, 1.0],
    "flip": False,
    "eval_crop_pct": 1.0,
    "max_samples": 256,
    "total_batch_size": 32,
    "total_steps": 8,
    "num_workers": 0,
    "log_steps": 1,
    "save_steps": 4,
}


def arguments(output_dir, **keys) -> list[str]:
    """The command line of a tiny fine-tuning; a key that is None is left out."""
    return flags({**TINY_TUNING, "output_dir": output_dir, **keys})


def tune(output_dir, **keys) -> Path:
    assert start("finetune", *arguments(output_dir, **keys)) == 0
    return Path(output_dir)


def parts_of(output_dir, **keys) -> dict:
    return trainer_parts(load_finetune_recipe(arguments(output_dir, **keys)))


def results(folder) -> dict:
    """The only entry of a run's results.json."""
    (entry,) = json.loads((Path(folder) / "results.json").read_text())
    return entry
