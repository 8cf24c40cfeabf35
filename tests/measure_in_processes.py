"""Probe and online quality of a model, in however many processes run it: `python measure_in_processes.py MODEL OUT`."""

import json
import sys

import numpy as np
import torch
from accelerate import Accelerator
from memory_source import MemorySource
from torch.distributed.fsdp import fully_shard

from hf_mae import MAEForPreTraining
from hf_mae.data.labels import CommonClasses, common_classes, labels_of
from hf_mae.data.order import Rows
from hf_mae.evaluation.encoder import FrozenEncoder
from hf_mae.evaluation.linear_probe import ProbeRun
from hf_mae.evaluation.online import OnlineEvaluator
from hf_mae.evaluation.table import encoded_batches, even_batches, extract_table
from hf_mae.keys.evaluation_keys import LinearProbeRecipe


def bright_rows(n: int, seed: int = 0, labels: bool = True, classes: int = 3) -> Rows:
    """Gray images whose class shows in their brightness; the labels have gaps."""
    rng = np.random.default_rng(seed)
    numbers = [int(label) for label in rng.integers(0, classes, n)]
    images = [np.clip(rng.normal(60 + 60 * label, 12, (10, 9, 1)), 0, 255).astype(np.uint8) for label in numbers]
    return Rows(MemorySource([images], labels=[7 * label for label in numbers] if labels else None))


def classes_of(rows: Rows) -> CommonClasses:
    labels = labels_of(rows)
    return common_classes(labels, rows, labels, rows)


def normalize(images: torch.Tensor) -> torch.Tensor:
    return (images.float() / 255 - 0.3) / 0.4


def quality_of(folder: str, accelerator: Accelerator, bank: Rows, queries: Rows, **options) -> OnlineEvaluator:
    view = FrozenEncoder(folder, "mean").spec
    return OnlineEvaluator(bank, queries, view, normalize, 16, 0, accelerator, **options)


def measure(folder: str, accelerator: Accelerator, per_device: int) -> dict:
    """What all processes together find; the same on each but for `quality` and `sharded`, which the first one has."""
    encoder = FrozenEncoder(folder, "cls")
    recipe = LinearProbeRecipe(
        model=folder, dataset="", total_batch_size=32, epochs=1, warmup_epochs=0, blr=20, num_workers=0
    )
    rows, eval_rows = bright_rows(900), bright_rows(101, 1)
    run = ProbeRun(encoder, rows, classes_of(rows), recipe, per_device, 0, accelerator)
    run.train()
    batches = even_batches(eval_rows, encoder.spec, 16, 0, accelerator)
    table = extract_table(eval_rows, encoded_batches(encoder, batches))
    quality = quality_of(folder, accelerator, rows, eval_rows, samples=201)
    found = {
        "weights": accelerator.unwrap_model(run.head)[1].weight.tolist(),
        "images": run.accuracy(eval_rows)[1],
        "keys": table.keys,
        "labels": table.labels,
        "features": table.values.tolist(),
        "quality": quality.measure(accelerator.prepare(MAEForPreTraining.from_pretrained(folder))),
    }
    if accelerator.num_processes > 1:
        model = MAEForPreTraining.from_pretrained(folder)
        for layer in [*model.mae.layers, *model.decoder.decoder_layers]:
            fully_shard(layer)
        fully_shard(model)
        pixel_values = torch.zeros(2, 1, 8, 8)
        found["sharded_before"] = quality.measure(model)
        model(pixel_values).loss.backward()
        found["sharded"] = quality.measure(model)
        model(pixel_values).loss.backward()  # goes on as before
    return found


if __name__ == "__main__":
    accelerator = Accelerator()
    found = measure(sys.argv[1], accelerator, 16)
    if accelerator.is_main_process:
        with open(sys.argv[2], "w") as file:
            json.dump({**found, "processes": accelerator.num_processes}, file)
    accelerator.end_training()
