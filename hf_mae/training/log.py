"""How a run reports: a progress bar, metrics.jsonl, trackers, pictures, speed."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL import Image
from tqdm.auto import tqdm

from ..errors import one_line
from ..files import replaced
from ..run_folder import RunFolder, is_number
from ..visualize.grid import with_title


class RunLog:
    """The log of a run. Only the main process writes it; on the others, every method does nothing.

    Args:
        accelerator: the run's Accelerator; its trackers get every number.
        output_dir: folder of the run.
        first_step: optimizer steps already taken. Lines and pictures of later steps are removed: they are from a run
            that was interrupted.
        total_steps: optimizer steps of the whole run.
    """

    def __init__(self, accelerator: Accelerator, output_dir: Path, first_step: int, total_steps: int):
        self.accelerator, self.folder, self.events = accelerator, RunFolder(output_dir), list[dict[str, Any]]()
        main = accelerator.is_main_process
        if main:
            # A new run also evaluates at step 0, so it removes the lines of step 0 too.
            last_step = first_step or -1
            self.folder.remove_pictures(last_step)
            for event in self.folder.cut_events(last_step):
                # The file may have been edited, so keep only numbers, and None, which stands for one that isn't finite.
                self.events.append({key: value for key, value in event.items() if value is None or is_number(value)})
        self.bar = tqdm(total=total_steps, initial=first_step, disable=not main, dynamic_ncols=True)

    def event(self, step: int, **values: Any) -> None:
        """Append one JSON object to metrics.jsonl, and send its numbers to the trackers.

        If the line can't be written, a warning is printed, and the run continues.
        """
        if not self.accelerator.is_main_process:
            return
        # JSON has no NaN.
        event = {"step": step, **{key: None if _is_nan(value) else value for key, value in values.items()}}
        self.events.append(event)
        try:
            self.folder.append_event(event)
        except OSError as error:  # for example a full disk; losing one line is better than ending the run
            self.say(f"WARNING: a line of {self.folder.metrics_file} is lost: {one_line(error)}")
        self.accelerator.log({key: value for key, value in values.items() if isinstance(value, int | float)}, step=step)

    def steps(self, step: int, **values: Any) -> None:
        """Log the mean of the steps since the last call, and show it in the bar.

        Args:
            step: optimizer steps taken.
            **values: numbers of the event, `loss`, `lr`, `images_per_second` and `data_wait` (in [0, 1]) among them.
        """
        self.event(step, **values)
        self.bar.n = step
        speed, wait = f"{values['images_per_second']:.0f}", f"{values['data_wait']:.0%}"
        self.bar.set_postfix(loss=f"{values['loss']:.4f}", lr=f"{values['lr']:.2e}", img_s=speed, wait=wait)

    def picture(self, step: int, picture: Image.Image) -> None:
        """Write reconstructions/step-STEP.png, and send it to the trackers that take pictures.

        If the file can't be written, a warning is printed, and the run continues.
        """
        if not self.accelerator.is_main_process:
            return
        try:
            self.folder.save_picture(step, picture)
        except OSError as error:
            self.say(f"WARNING: {self.folder.picture_file(step)} is lost: {one_line(error)}")
        for tracker in self.accelerator.trackers:
            if hasattr(tracker, "log_images"):
                options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({"reconstructions": np.asarray(picture)[None]}, step=step, **options)

    def animation(self) -> str | None:
        """Write reconstructions/all.webp, an animation of all pictures; returns the path of the newest picture.

        Without pictures, and on every process but the main one, it returns None.
        """
        pictures = self.folder.pictures() if self.accelerator.is_main_process else []
        if not pictures:
            return None
        drawn = [frame for step, path in pictures if (frame := _frame(path, f"after step {step:,}"))]
        # A run that was resumed with another number of evaluation images has pictures of two sizes.
        frames = [frame for frame in drawn if frame.size == drawn[-1].size]
        if left_out := len(pictures) - len(frames):
            self.say(f"WARNING: {self.folder.animation_file} lacks {left_out} pictures, broken or of another size")
        # Milliseconds; the first and the last picture are shown longer.
        times = [1500, *[500] * (len(frames) - 2), 3000][: len(frames)]
        try:
            if frames:
                with replaced(self.folder.animation_file) as temporary:
                    frames[0].save(temporary, save_all=True, append_images=frames[1:], duration=times, loop=0)
        except (OSError, ValueError, RuntimeError) as error:  # a full disk, or a picture too large for WebP
            self.say(f"WARNING: {self.folder.animation_file} is lost: {error}")
        return str(pictures[-1][1])

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        if self.accelerator.is_main_process:
            self.bar.write(text)

    def close(self) -> None:
        """Close bar and trackers. Accelerate's `end_training` would also end the process group, which saving needs."""
        self.bar.close()
        for tracker in self.accelerator.trackers:
            tracker.finish()


def _frame(path: Path, title: str) -> Image.Image | None:
    """A picture below its title; None if Pillow can't decode it."""
    try:
        with Image.open(path) as picture:
            return with_title(picture.convert("RGB"), title)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


class Stopwatch:
    """Measures seconds, and how many of them the run waits for data. `total` is the sum of all readings."""

    def __init__(self) -> None:
        self.start, self.waited, self.total = time.perf_counter(), 0.0, 0.0

    def waiting(self, seconds: float) -> None:
        """Count seconds of the running time as spent waiting for data."""
        self.waited += seconds

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """A context whose time doesn't count."""
        before = time.perf_counter()
        yield
        self.start += time.perf_counter() - before

    def restart(self) -> None:
        """Start the next reading now."""
        self.start, self.waited = time.perf_counter(), 0.0

    def read(self) -> tuple[float, float]:
        """Seconds since the last reading, and the share of them spent waiting for data, in [0, 1]; starts the next."""
        elapsed, waited = time.perf_counter() - self.start, self.waited
        self.total += elapsed
        self.restart()
        return elapsed, waited / elapsed
