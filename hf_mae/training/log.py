"""What a run tells: a progress bar, metrics.jsonl, trackers, bad_samples.jsonl."""

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

from ..files import replaced
from ..keys.run_keys import RunRecipe
from ..run_folder import RunFolder
from ..visualize.grid import with_title

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
        self.accelerator, self.folder = accelerator, RunFolder(output_dir)
        self.evaluations: list[dict[str, Any]] = []
        self.quality: dict[str, Any] = {}
        if accelerator.is_main_process:
            # A run that starts anew evaluates before its first step anew.
            last_step = first_step or -1
            self.folder.remove_pictures(last_step)
            for event in self.folder.cut_events(last_step):
                self._remember(event)
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
            self.folder.append_event(event)
        except OSError as error:  # the disk may be full for a while; the run is worth more than this line
            self.say(f"WARNING: a line of {self.folder.metrics_file} is lost: {error.strerror}")
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
        try:
            self.folder.save_picture(step, picture)
        except OSError as error:
            self.say(f"WARNING: {self.folder.picture_file(step)} is lost: {error.strerror}")
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"reconstructions": np.asarray(picture)[None]}, step=step, **options)

    def animation(self) -> str | None:
        """Write reconstructions/all.webp, the pictures one after the other; the path of the last of them.

        None on all but the main process.
        """
        pictures = self.folder.pictures() if self.accelerator.is_main_process else []
        if not pictures:
            return None
        # The first and the last are looked at for longer.
        times = [1500, *[500] * (len(pictures) - 2), 3000][: len(pictures)]
        try:
            frames = [with_title(Image.open(path), f"after step {step:,}") for step, path in pictures]
            with replaced(self.folder.animation_file) as temporary:
                frames[0].save(temporary, save_all=True, append_images=frames[1:], duration=times, loop=0)
        except (OSError, SyntaxError) as error:  # a full disk, or what Pillow raises for a broken picture
            self.say(f"WARNING: {self.folder.animation_file} is lost: {error}")
        return str(pictures[-1][1])

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
        folder: of the run; its file is rewritten as it was at the checkpoint that the run goes on from.
        state: as `state()` gave it.
    """

    def __init__(self, folder: RunFolder, state: dict[str, Any] | None = None):
        self.folder = folder
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
        if self.named or self.folder.bad_file.exists():
            self.folder.write_bad_samples(self.named)


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
