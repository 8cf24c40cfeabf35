"""Benchmarks, side by side in one run, interleaved and repeated; medians and ranges as a table and as JSON.

    python scripts/benchmarks/benchmark.py CELL [--dataset DATA]

    all --dataset PHOTOS          everything below, on a folder of JPEGs
    step                          training steps: ours, transformers' ViTMAE, lightly's MAE
    memory                        peak memory of training by batch size
    loader --dataset PHOTOS       the data path alone: ours, ours from prepared shards, run_mae's
    end_to_end --dataset PHOTOS   hf-mae pretrain against a Trainer as in run_mae
    cost                          parameters and FLOPs of every size, on the meta device
    startup                       import, first step
    resume --dataset DATA         time to the first batch of a resumed run, early and late

Pin it to cores that nothing else uses, e.g. `taskset -c 1`, with OMP_NUM_THREADS set to their number.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from bench_common import header
from bench_cost import cost
from bench_loader import loader, resume
from bench_run import end_to_end, startup
from bench_step import memory_by_batch, step

BENCHMARKS = {
    "step": step, "memory": memory_by_batch, "loader": loader, "end_to_end": end_to_end, "cost": cost,
    "startup": startup, "resume": resume,
}  # fmt: skip
NEED_DATA = ("loader", "end_to_end", "resume")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["all", *BENCHMARKS])
    parser.add_argument("--dataset", help="a folder of JPEGs; for resume, any data set")
    parser.add_argument("--split", default="train")
    parser.add_argument("--streaming", action="store_true", help="resume: also read in place, block by block")
    parser.add_argument("--workers", type=int, default=0, help="number of loader processes")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each cell")
    parser.add_argument("--batches", type=int, default=3, help="loader: batches of 64 images per measurement")
    parser.add_argument("--sizes", nargs="+", default=["tiny", "base", "large"], help="step, memory: model sizes")
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--ways", nargs="+", default=["eager", "compiled"], choices=["eager", "compiled"])
    parser.add_argument("--batch", type=int, default=8, help="images per step")
    parser.add_argument("--memory_batches", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--steps", type=int, default=3, help="step: timed steps in each process")
    parser.add_argument("--warmup", type=int, default=1, help="step: untimed steps before them")
    parser.add_argument("--run_size", default="small", help="end_to_end: size of the model")
    parser.add_argument("--run_steps", type=int, default=6, help="end_to_end: steps in each run")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmark.json"))
    options = parser.parse_args()
    chosen = list(BENCHMARKS) if options.what == "all" else [options.what]
    if options.dataset is None and any(name in NEED_DATA for name in chosen):
        parser.error(f"{options.what} needs --dataset")
    facts = header()
    print(json.dumps(facts, indent=1))
    results: list[dict[str, Any]] = []
    for name in chosen:
        results += BENCHMARKS[name](options)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        settings = {key: value for key, value in vars(options).items() if key not in ("output", "dataset")}
        options.output.write_text(json.dumps({"header": facts, "settings": settings, "results": results}, indent=1))
    print(f"\nwritten to {options.output}")


if __name__ == "__main__":
    main()
