"""What a run tells: a progress bar, metrics.jsonl, trackers, bad_samples.jsonl."""

import json
import logging
import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL import Image
from tqdm.auto import tqdm

from ..files import write_text
from ..keys.run_keys import RunRecipe
from ..run_folder import picture_step, read_events
from ..visualize.grid import with_title

logger = logging.getLogger(__name__)

MOST_NAMED = 100


class RunLog:
    """Writes events on the main process, and nothing on the others.

    Args:
        accelerator: of the run; its trackers get every number.
        output_dir: folder of the run.
        first_step: steps already taken; lines and pictures of later steps, by a run that was cut off, are removed.
        total_steps: of the run.
    """

    def __init__(self, accelerator: Accelerator, output_dir: Path, first_step: int, total_steps: int):
        self.accelerator = accelerator
        self.metrics_file, self.bad_file = output_dir / "metrics.jsonl", output_dir / "bad_samples.jsonl"
        self.pictures = output_dir / "reconstructions"
        self.evaluations: list[dict[str, Any]] = []
        self.quality: dict[str, Any] = {}
        if accelerator.is_main_process:
            for path in self.pictures.glob("step-*.png"):
                if picture_step(path) > first_step or first_step == 0:
                    path.unlink()
        if accelerator.is_main_process and self.metrics_file.exists():
            # A run that starts anew evaluates before its first step anew.
            events = [event for event in read_events(self.metrics_file) if event["step"] <= first_step > 0]
            for event in events:
                self._remember(event)
            write_text(self.metrics_file, "".join(json.dumps(event) + "\n" for event in events))
        self.bar = tqdm(
            total=total_steps, initial=first_step, disable=not accelerator.is_main_process, dynamic_ncols=True
        )

    def event(self, step: int, **values: Any) -> None:
        """Append one JSON object to metrics.jsonl, and pass its numbers on to the trackers."""
        if not self.accelerator.is_main_process:
            return
        # JSON has no NaN.
        event = {"step": step, **{key: None if _is_nan(value) else value for key, value in values.items()}}
        self._remember(event)
        try:
            with self.metrics_file.open("a") as file:
                file.write(json.dumps(event) + "\n")
        except OSError as error:  # the disk may be full for a while; the run is worth more than this line
            self.say(f"WARNING: a line of {self.metrics_file} is lost: {error.strerror}")
        self.accelerator.log({key: value for key, value in values.items() if isinstance(value, int | float)}, step=step)

    def _remember(self, event: dict[str, Any]) -> None:
        """Keep what the end of the run tells."""
        if "eval_loss" in event:
            self.evaluations.append(event)
        if "rankme" in event:
            self.quality = event

    def picture(self, step: int, picture: Image.Image) -> None:
        """Write reconstructions/step-STEP.png, and show it to the trackers that take pictures."""
        if not self.accelerator.is_main_process:
            return
        path = self.pictures / f"step-{step}.png"
        try:
            path.parent.mkdir(exist_ok=True)
            picture.save(path)
        except OSError as error:
            self.say(f"WARNING: {path} is lost: {error.strerror}")
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"reconstructions": np.asarray(picture)[None]}, step=step, **options)

    def animation(self) -> str | None:
        """Write reconstructions/all.webp, the pictures one after the other; the path of the last of them.

        None on all but the main process.
        """
        paths = sorted(self.pictures.glob("step-*.png"), key=picture_step)
        if not self.accelerator.is_main_process or not paths:
            return None
        frames = [with_title(Image.open(path), f"after step {picture_step(path):,}") for path in paths]
        # The first and the last are looked at for longer.
        times = [1500, *[500] * (len(frames) - 2), 3000][: len(frames)]
        frames[0].save(self.pictures / "all.webp", save_all=True, append_images=frames[1:], duration=times, loop=0)
        return str(paths[-1])

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


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def start_trackers(accelerator: Accelerator, recipe: RunRecipe) -> None:
    """Start the trackers that a recipe names, if any, with its numbers and words."""
    if recipe.log_with:
        plain = {key: value for key, value in recipe.to_dict().items() if isinstance(value, int | float | str | bool)}
        accelerator.init_trackers("hf_mae", config=plain)


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
            write_text(self.path, "".join(json.dumps(sample) + "\n" for sample in self.named))


class Stopwatch:
    """Time since the last reading, and how much of it was spent waiting for data; `total` seconds of all readings."""

    def __init__(self) -> None:
        self.start, self.waited, self.total = time.perf_counter(), 0.0, 0.0

    def waiting(self, seconds: float) -> None:
        self.waited += seconds

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """What happens meanwhile takes no time."""
        before = time.perf_counter()
        yield
        self.start += time.perf_counter() - before

    def restart(self) -> None:
        """Forget the time until now."""
        self.start, self.waited = time.perf_counter(), 0.0

    def read(self) -> tuple[float, float]:
        """Seconds since the last reading, and the share of them spent waiting for data, in [0, 1]."""
        elapsed, waited = time.perf_counter() - self.start, self.waited
        self.total += elapsed
        self.restart()
        return elapsed, waited / elapsed
