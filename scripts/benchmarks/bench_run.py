"""Whole runs: `hf-mae pretrain` on a folder of images against a Trainer as in transformers' run_mae; start-up times.

The Trainer's model gets position tables, which transformers leaves at zero when it builds from a configuration.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_common import in_process, interleaved, spread, table

RUN_MAE, OURS = "Trainer as in run_mae", "hf-mae pretrain"
FAST = "vit_base_in1k_fast"


def run_mae(cell: dict[str, Any]) -> dict[str, Any]:
    """Train as run_mae does, in this process, and time the steps."""
    from bench_loader import collate, run_mae_dataset
    from bench_step import peers
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Clock(TrainerCallback):
        ends: list[float] = []

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=cell["batch"],
            max_steps=cell["steps"],
            learning_rate=1.5e-4,
            weight_decay=0.05,
            adam_beta2=0.95,
            lr_scheduler_type="cosine",
            dataloader_num_workers=cell["workers"],
            dataloader_drop_last=True,
            remove_unused_columns=False,
            bf16=cell["precision"] == "bf16",
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        data = run_mae_dataset(cell["dataset"])
        Trainer(peers(cell["size"])[0], arguments, collate, data, callbacks=[Clock()]).train()
    return _rate([0.0, *(end - start for start, end in itertools.pairwise(Clock.ends))], cell)


def ours(cell: dict[str, Any]) -> dict[str, Any]:
    """Run `hf-mae pretrain`; its metrics.jsonl gives the time of each step."""
    keys = {
        "dataset": cell["dataset"], "model_size": cell["size"], "total_batch_size": cell["batch"], "log_steps": 1,
        "per_device_batch_size": cell["batch"], "total_steps": cell["steps"], "num_workers": cell["workers"],
        "mixed_precision": "bf16" if cell["precision"] == "bf16" else "no", "eval_steps": 10**6, "quality_steps": 0,
        "save_steps": 10**6, "clip_grad": 1.0, "max_eval_samples": 8,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        if cell["recipe"]:
            keys["recipe"] = cell["recipe"]
        words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
        pretrain("--output_dir", f"{folder}/run", *words)
        events = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
    steps = [event for event in events if "images_per_second" in event]
    return _rate([cell["batch"] / event["images_per_second"] for event in steps], cell)


def pretrain(*words: str) -> None:
    """Run `hf-mae pretrain WORDS` in a new process."""
    command = [sys.executable, "-W", "ignore", "-m", "hf_mae.cli", "pretrain", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")


def _rate(seconds: list[float], cell: dict[str, Any]) -> dict[str, Any]:
    """Images per second after the first step, which includes the start of the workers."""
    assert len(seconds) == cell["steps"], f"{len(seconds)} of {cell['steps']} steps were seen"
    return {"images_per_second": (len(seconds) - 1) * cell["batch"] / sum(seconds[1:])}


def end_to_end(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Images per second of whole runs, each in a new process."""
    from hf_mae import PrepareRecipe, prepare

    results = []
    with tempfile.TemporaryDirectory() as folder:
        prepare(PrepareRecipe(dataset=options.dataset, output_dir=str(folder), num_workers=options.workers))
        for precision in options.precisions:
            cell = {
                "size": options.run_size, "precision": precision, "batch": options.batch,
                "steps": options.run_steps, "workers": options.workers, "dataset": options.dataset, "recipe": None,
            }  # fmt: skip
            cells = {
                RUN_MAE: partial(in_process, "bench_run.py", json.dumps(cell)),
                OURS: partial(ours, cell),
                f"{OURS}, prepared": partial(ours, {**cell, "dataset": folder}),
                f"{OURS}, {FAST}": partial(ours, {**cell, "recipe": FAST}),
            }
            found = interleaved(cells, options.repeats)
            rates = {name: [run["images_per_second"] for run in runs] for name, runs in found.items()}
            print(
                f"\nend to end, ViT-{options.run_size}, {precision}, batch {options.batch}, {options.workers} workers"
            )
            table(rates, "images/s", RUN_MAE)
            cell.pop("dataset")
            results += [{"what": "end_to_end", "cell": n, **cell, **spread(v)} for n, v in rates.items()]
    return results


IMPORTS = {
    "import torch, for comparison": "import torch",
    "import hf_mae": "import hf_mae",
    "from hf_mae import MAEForPreTraining": "from hf_mae import MAEForPreTraining",
    "from transformers import ViTMAEForPreTraining": "from transformers import ViTMAEForPreTraining",
}
FIRST_STEP = "hf-mae pretrain --recipe quickstart, one step"


def first_step() -> None:
    """A run of one step, in a new process."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["--total_steps", "1", "--quality_steps", "0", "--num_workers", "0", "--max_eval_samples", "8"]
        pretrain("--recipe", "quickstart", "--output_dir", f"{folder}/run", *words)


def startup(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Wall time of new processes: of imports, and of a run's first step."""

    def seconds(run: Callable[[], Any]) -> float:
        started = time.perf_counter()
        run()
        return time.perf_counter() - started

    runs: dict[str, Callable[[], Any]] = {
        name: partial(subprocess.run, [sys.executable, "-c", code], check=True) for name, code in IMPORTS.items()
    }
    runs[FIRST_STEP] = first_step
    cells = {name: partial(seconds, run) for name, run in runs.items()}
    found = interleaved(cells, options.repeats)
    print("\nstart-up of a process, wall time")
    table(found, "s")
    return [{"what": "startup", "cell": name, **spread(values)} for name, values in found.items()]


if __name__ == "__main__":
    print(json.dumps(run_mae(json.loads(sys.argv[1]))))
