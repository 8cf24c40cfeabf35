"""The state of a run: all that its checkpoints hold besides tensors, in trainer.json and data.json."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from .. import __version__
from ..data.decode import BadSample
from ..data.order import StreamPlan
from ..errors import CheckpointError
from ..files import read_json, write_json

TRAINER, DATA = "trainer.json", "data.json"
MOST_NAMED = 100


@dataclass
class RunState:
    """The state of a run. The loop advances `step` and `images_seen`; a save updates the rest."""

    recipe: dict[str, Any]
    total_steps: int  # optimizer steps of the whole run
    plan: StreamPlan
    positions: list[int]  # rows read, by stream
    fingerprint: dict[str, Any]  # fingerprint of the data
    step: int = 0  # optimizer steps taken
    images_seen: int = 0  # includes skipped steps; counts each image once, however many masks it has
    guard: dict[str, int] = field(default_factory=lambda: {"skipped_steps": 0, "skipped_in_a_row": 0})  # StepGuard's
    # Samples that could not be decoded: counts by reason, and `key` and `reason` of the first hundred.
    bad: dict[str, Any] = field(default_factory=lambda: {"counts": {}, "named": []})
    scaler: dict[str, Any] | None = None  # state of the GradScaler of fp16
    version: str = __version__  # version of the package that writes it

    @classmethod
    def read(cls, folder: Path) -> "RunState":
        """Read the state from a checkpoint's folder.

        Raises:
            CheckpointError: if a file is missing, is not JSON, or lacks a part of the state.
        """
        try:
            stored = {**read_json(folder / TRAINER), **read_json(folder / DATA)}
        except FileNotFoundError as error:
            raise CheckpointError(f"{error.filename} is missing; name a checkpoint-STEP folder of a run") from error
        except ValueError as error:
            raise CheckpointError(f"the state in {folder} is not JSON ({error}); name another checkpoint") from error
        stored.setdefault("scaler", None)  # only fp16 has one
        try:
            stored["plan"] = StreamPlan(**stored["plan"])
            return cls(**{one.name: stored[one.name] for one in fields(cls)})
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"the state in {folder} is incomplete ({error}); name another checkpoint") from error

    def write(self, folder: Path) -> None:
        """Write the two files into a checkpoint's folder."""
        names = ["step", "images_seen", "total_steps", "guard", "version", "recipe"]
        names += [] if self.scaler is None else ["scaler"]
        write_json(folder / TRAINER, {name: getattr(self, name) for name in names})
        data = {
            "plan": vars(self.plan),
            "seed": self.recipe["seed"],
            "positions": self.positions,
            "fingerprint": self.fingerprint,
            "bad": self.bad,
        }
        write_json(folder / DATA, data)

    def advance(self, images: int) -> None:
        """Count one more optimizer step, on `images` images."""
        self.step += 1
        self.images_seen += images

    def add_bad(self, samples: list[BadSample]) -> None:
        """Add (key, reason) of samples that could not be decoded."""
        counts = self.bad["counts"]
        for _, reason in samples:
            counts[reason] = counts.get(reason, 0) + 1
        named = self.bad["named"] + [{"key": key, "reason": reason} for key, reason in samples]
        self.bad["named"] = named[:MOST_NAMED]
