"""What the studies share: cells that may take several calls to finish, and their table and plot."""

import argparse
import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NEVER = 10**9  # a run is also scored after its last step
SHORT_RUN = 12  # steps; the second half of them is timed
# Protocol of results.json -> figure that a table shows, and its heading.
FIGURES = {
    "fine-tuning": ("top1", "fine-tuned"),
    "linear_probe_fast": ("linear_top1", "linear probe (fast)"),
    "knn": ("knn_top1_k20", "kNN, k = 20"),
}


@dataclass
class Cell:
    """One setting of a study.

    Args:
        name: folder of the cell.
        label: first column of the table.
        keys: flags of `hf-mae pretrain` that differ from the recipe.
    """

    name: str
    label: str
    keys: Sequence[str]


def parser(description: str, output_dir: str) -> argparse.ArgumentParser:
    """Flags of every study."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--dataset", required=True, help="labelled images with a split for evaluation")
    result.add_argument("--recipe", default="cifar10_vit_tiny", help="recipe of the pretraining")
    result.add_argument("--finetune_recipe", default="finetune_cifar10_tiny", help="none skips fine-tuning")
    result.add_argument("--total_steps", type=int, default=1200, help="pretraining steps of each cell")
    result.add_argument("--minutes", type=float, default=None, help="equal time for each cell, instead of equal steps")
    result.add_argument("--finetune_epochs", type=float, default=5)
    result.add_argument("--max_samples", type=int, default=None, help="labelled images for fine-tuning and probes")
    result.add_argument("--max_minutes_per_cell", type=float, default=None, help="time limit; the next call continues")
    result.add_argument("--output_dir", type=Path, default=Path(output_dir))
    return result


class OutOfTime(Exception):
    """The time of a cell is up."""


class Sitting:
    """Runs the commands of a cell that are not done yet.

    Args:
        folder: the cell's folder.
        minutes: time limit of the cell; None for no limit.
    """

    def __init__(self, folder: Path, minutes: float | None):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.deadline = time.monotonic() + 60 * minutes if minutes else None

    def run(self, words: Sequence[Any]) -> None:
        """Run `hf-mae WORDS`; its output goes to a log.

        Raises:
            OutOfTime: if it was stopped; the next call with `--resume auto` continues.
        """
        command = [sys.executable, "-m", "hf_mae.cli", *map(str, words)]
        with (self.folder / "log").open("a") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
            try:
                code = process.wait(None if self.deadline is None else max(1, self.deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGTERM)
                process.wait()
                raise OutOfTime from None
        if code:
            sys.exit(f"hf-mae {words[0]} failed; see {self.folder / 'log'}")


def figures_of(*files: Path) -> dict[str, float]:
    """Heading -> figure in percent, from the results.json files that exist."""
    found = {}
    for file in files:
        for entry in json.loads(file.read_text()) if file.exists() else []:
            name = entry["protocol"]["name"]
            if name in FIGURES and FIGURES[name][0] in entry["figures"]:
                found[FIGURES[name][1]] = entry["figures"][FIGURES[name][0]]
    return found


def measure(sitting: Sitting, model: Path, options: argparse.Namespace) -> dict[str, float]:
    """Measure a pretrained model by linear probe, kNN and fine-tuning, unless that is already done."""
    tuned = sitting.folder / "finetune"
    few = ["--max_samples", options.max_samples] if options.max_samples else []
    for heading, words in (
        ("kNN, k = 20", ["evaluate", "knn", "--model", model, *few]),
        ("linear probe (fast)", ["evaluate", "linear-probe", "--model", model, *few]),
        ("fine-tuned", ["finetune", "--model", model, "--recipe", options.finetune_recipe, "--output_dir", tuned,
                        "--epochs", options.finetune_epochs, "--eval_steps", NEVER, "--resume", "auto", *few]),
    ):  # fmt: skip
        left_out = heading == "fine-tuned" and options.finetune_recipe == "none"
        if not left_out and heading not in figures_of(model / "results.json", tuned / "results.json"):
            sitting.run([*words, "--dataset", options.dataset])
    return figures_of(model / "results.json", tuned / "results.json")


def pretrained(sitting: Sitting, cell: Cell, options: argparse.Namespace) -> Path:
    """The cell's model, pretrained unless it exists."""
    model = sitting.folder / "pretrain"
    if not (model / "model.safetensors").exists():
        steps = options.total_steps if options.minutes is None else steps_that_fit(sitting, cell, options)
        sitting.run([*command_of(cell, options), model, "--total_steps", steps, "--resume", "auto"])
    return model


def command_of(cell: Cell, options: argparse.Namespace) -> list[Any]:
    return ["pretrain", "--recipe", options.recipe, "--dataset", options.dataset, *cell.keys, "--output_dir"]


def steps_that_fit(sitting: Sitting, cell: Cell, options: argparse.Namespace) -> int:
    """The number of steps that `hf-mae pretrain` takes in `options.minutes`, measured once by a short run."""
    short, file = sitting.folder / "short", sitting.folder / "steps.json"
    if not file.exists():
        quick = ["--log_steps", 1, "--quality_steps", 0, "--eval_steps", SHORT_RUN, "--save_steps", SHORT_RUN]
        sitting.run([*command_of(cell, options), short, "--total_steps", SHORT_RUN, *quick])
        events = [event for event in read_log(short) if "loss" in event]
        seconds = [e["images_seen"] / e["step"] / e["images_per_second"] for e in events[SHORT_RUN // 2 :]]
        file.write_text(json.dumps(max(SHORT_RUN, round(60 * options.minutes / statistics.median(seconds)))))
    return json.loads(file.read_text())


def read_log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def run_study(cells: Sequence[Cell], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Pretrain and measure every cell; returns the table's rows of the finished cells."""
    rows = []
    # All speeds are measured right after each other, so that other work on the machine doesn't favour a cell.
    for cell in cells if options.minutes else []:
        steps_that_fit(Sitting(options.output_dir / cell.name, None), cell, options)
    for cell in cells:
        sitting = Sitting(options.output_dir / cell.name, options.max_minutes_per_cell)
        try:
            model = pretrained(sitting, cell, options)
            row = {"cell": cell.label, **of_the_log(model), **measure(sitting, model, options)}
        except OutOfTime:
            print(f"{cell.label}: its time is up; repeat the command to continue", flush=True)
            continue
        print(f"{cell.label}: {row}", flush=True)
        rows.append(row)
    return rows


def of_the_log(model: Path) -> dict[str, Any]:
    """The final figures in the run's log."""
    last: dict[str, Any] = {}
    for event in read_log(model):
        last |= event
    return {"images seen": f"{last['images_seen']:,}", "evaluation loss": last["eval_loss"]}


def write_table(rows: list[dict[str, Any]], output_dir: Path, notes: str) -> None:
    """Write and print `table.md`: the rows, and notes on what to compare them with."""
    headings = list(dict.fromkeys(heading for row in rows for heading in row))
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    for row in rows:
        cells = [row.get(heading, "") for heading in headings]
        lines.append("| " + " | ".join(f"{v:.2f}" if isinstance(v, float) else str(v) for v in cells) + " |")
    text = "\n".join([*lines, "", notes.strip(), ""])
    (output_dir / "table.md").write_text(text)
    print(text)


def plot(rows: list[dict[str, Any]], x_label: str, output_dir: Path) -> None:
    """`figure.png`: each accuracy over the cells."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for _, heading in FIGURES.values():
        values = [(row["cell"], row[heading]) for row in rows if heading in row]
        if values:
            axes.plot(*zip(*values, strict=True), marker="o", label=heading)
    axes.set(xlabel=x_label, ylabel="top-1 accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(output_dir / "figure.png", dpi=150)
    pyplot.close(figure)
    print(f"plot     {output_dir / 'figure.png'}")


def main(cells: Sequence[Cell], options: argparse.Namespace, x_label: str, notes: str) -> None:
    """Run a study and show what it has so far."""
    rows = run_study(cells, options)
    if rows:
        write_table(rows, options.output_dir, notes)
        plot(rows, x_label, options.output_dir)
