"""Benchmarks, side by side in one run, interleaved and repeated; medians and ranges as a table.

python scripts/benchmark.py resume --dataset DATA    time to the first batch after a resume, early and late in a run
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

from hf_mae.data.sources import open_source
from hf_mae.data.stream import Rows, StreamPlan, TrainingStream, View, make_loader

BATCH = 64


def interleaved(cells: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Measure each cell once, then each once more, ...: what slows the machine down for a while slows all of them."""
    figures: dict[str, list[float]] = {name: [] for name in cells}
    for _ in range(repeats):
        for name, measure in cells.items():
            figures[name].append(measure())
    return figures


def table(figures: dict[str, list[float]], unit: str) -> None:
    for name, values in figures.items():
        print(f"{name:42} {statistics.median(values):9.3f} {unit}   ({min(values):.3f} to {max(values):.3f})")


def first_batch_after(step: int, rows: Rows, plan: StreamPlan, workers: int) -> float:
    """Seconds from the start of the loader to its first batch, for a run that goes on after `step` steps."""
    # Where the streams stand then: each has had its turn, with a chunk of rows, in every `groups`-th step.
    chunk = plan.total_batch_size // plan.chunks
    turns = [step // plan.groups + (stream // plan.chunks < step % plan.groups) for stream in range(plan.num_streams)]
    view = View(size=(224, 224), num_channels=3, dtype="uint8", num_patches=196)
    stream = TrainingStream(rows, plan, view, 0, [turn * chunk for turn in turns], step, step + 100)
    started = time.perf_counter()
    batches = iter(make_loader(stream, workers))
    next(batches)
    seconds = time.perf_counter() - started
    if workers:
        batches._shutdown_workers()  # type: ignore[attr-defined]
    return seconds


def resume(options: argparse.Namespace) -> None:
    for streaming in (None, True) if options.streaming else (None,):
        rows = Rows(open_source(options.dataset, split=options.split, streaming=streaming))
        plan = StreamPlan.choose(BATCH, 1, options.workers, len(rows), rows.source.random_access)
        cells = {
            f"first batch of {BATCH}, resumed at step {step:,}": partial(
                first_batch_after, step, rows, plan, options.workers
            )
            for step in (10, 10_000)
        }
        print(f"{len(rows):,} images, {'random access' if rows.source.random_access else 'streamed'}, {plan}")
        table(interleaved(cells, options.repeats), "s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["resume"])
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--split", default="train")
    parser.add_argument("--streaming", action="store_true", help="also read in place, block by block")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    {"resume": resume}[options.what](options)


if __name__ == "__main__":
    main()
