"""What a run tells: a progress bar, metrics.jsonl, trackers, bad_samples.jsonl."""

import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm.auto import tqdm

MOST_NAMED = 100


class RunLog:
    """Writes events on the main process, and nothing on the others.

    Args:
        accelerator: of the run; its trackers get every number.
        output_dir: folder of the run.
        first_step: steps already taken; lines of later steps, written by a run that was cut off, are removed.
        total_steps: of the run.
    """

    def __init__(self, accelerator: Accelerator, output_dir: Path, first_step: int, total_steps: int):
        self.accelerator = accelerator
        self.metrics_file, self.bad_file = output_dir / "metrics.jsonl", output_dir / "bad_samples.jsonl"
        self.evaluations: list[dict[str, Any]] = []
        if accelerator.is_main_process and self.metrics_file.exists():
            events = [json.loads(line) for line in self.metrics_file.read_text().splitlines()]
            # A run that starts anew evaluates before its first step anew.
            events = [event for event in events if event["step"] <= first_step > 0]
            self.evaluations = [event for event in events if "eval_loss" in event]
            self.metrics_file.write_text("".join(json.dumps(event) + "\n" for event in events))
        self.bar = tqdm(
            total=total_steps, initial=first_step, disable=not accelerator.is_main_process, dynamic_ncols=True
        )

    def event(self, step: int, **numbers: Any) -> None:
        """Append one JSON object to metrics.jsonl, and pass its numbers on to the trackers."""
        if not self.accelerator.is_main_process:
            return
        if "eval_loss" in numbers:
            self.evaluations.append({"step": step, **numbers})
        with self.metrics_file.open("a") as file:
            file.write(json.dumps({"step": step, **numbers}) + "\n")
        self.accelerator.log(numbers, step=step)

    def progress(self, step: int, **shown: Any) -> None:
        """Move the bar, which shows the time left, and write `shown` behind it."""
        self.bar.n = step
        self.bar.set_postfix(**shown)

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self.accelerator.is_main_process:
            self.bar.write(text)

    def close(self) -> None:
        """Close bar and trackers, but not the process group, as `end_training` would: the run still saves its end."""
        self.bar.close()
        for tracker in self.accelerator.trackers:
            tracker.finish()


class BadSamples:
    """Counts the samples that can't be decoded, by reason, and names the first hundred in bad_samples.jsonl.

    Args:
        path: the file; it is rewritten as it was at the checkpoint that a run goes on from.
        state: as `state()` gave it.
    """

    def __init__(self, path: Path, state: dict[str, Any] | None = None):
        self.path = path
        self.counts = Counter((state or {}).get("counts", {}))
        self.named: list[dict[str, str]] = list((state or {}).get("named", []))
        self._write()

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def add(self, bad: list[tuple[str, str]]) -> None:
        """Take in (key, reason) of the newest ones."""
        self.counts.update(reason for _, reason in bad)
        if bad and len(self.named) < MOST_NAMED:
            self.named += [{"key": key, "reason": reason} for key, reason in bad][: MOST_NAMED - len(self.named)]
            self._write()

    def state(self) -> dict[str, Any]:
        """What a checkpoint has to remember."""
        return {"counts": dict(self.counts), "named": self.named}

    def _write(self) -> None:
        if self.named or self.path.exists():
            self.path.write_text("".join(json.dumps(sample) + "\n" for sample in self.named))


class Stopwatch:
    """Time since the last reading, and how much of it was spent waiting for data."""

    def __init__(self) -> None:
        self.start, self.waited = time.perf_counter(), 0.0

    def waiting(self, seconds: float) -> None:
        self.waited += seconds

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """What happens meanwhile takes no time."""
        before = time.perf_counter()
        yield
        self.start += time.perf_counter() - before

    def read(self) -> tuple[float, float]:
        """Seconds since the last reading, and the share of them spent waiting for data, in [0, 1]."""
        now = time.perf_counter()
        elapsed, waited = now - self.start, self.waited
        self.start, self.waited = now, 0.0
        return elapsed, waited / elapsed
