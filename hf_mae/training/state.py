"""Where a run stands: what its checkpoints say besides tensors, in trainer.json and data.json."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import __version__
from ..data.order import StreamPlan
from ..errors import CheckpointError
from ..files import read_json, write_json

TRAINER, DATA = "trainer.json", "data.json"


@dataclass
class RunState:
    """Where a run stands. The loop moves `step`, `images_seen` and `positions`; a save brings the rest up to date.

    Args:
        recipe: the run's keys.
        total_steps: optimizer steps of the whole run.
        plan: how batches are put together.
        positions: rows that each stream has read.
        fingerprint: of the data.
        step: optimizer steps taken.
        images_seen: training images so far, those of skipped steps among them; each once, with any number of masks.
        guard: counters of skipped steps, the keywords of StepGuard.
        bad: samples that could not be decoded, as BadSamples has them.
        scaler: state of the GradScaler of fp16; None without one.
        version: of the package that writes it.
    """

    recipe: dict[str, Any]
    total_steps: int
    plan: StreamPlan
    positions: list[int]
    fingerprint: dict[str, Any]
    step: int = 0
    images_seen: int = 0
    guard: dict[str, int] = field(default_factory=lambda: {"skipped_steps": 0, "skipped_in_a_row": 0})
    bad: dict[str, Any] = field(default_factory=lambda: {"counts": {}, "named": []})
    scaler: dict[str, Any] | None = None
    version: str = __version__

    @classmethod
    def read(cls, checkpoint: Path) -> "RunState":
        """The state that a checkpoint holds.

        Raises:
            CheckpointError: if the folder is a model's rather than a checkpoint, or its files are not JSON.
        """
        try:
            trainer, data = (read_json(checkpoint / name) for name in (TRAINER, DATA))
        except FileNotFoundError as error:
            raise CheckpointError(f"{error.filename} is missing; name a folder checkpoint-STEP of a run") from error
        except ValueError as error:
            raise CheckpointError(
                f"the state in {checkpoint} is not JSON ({error}); name another checkpoint"
            ) from error
        return cls(
            recipe=trainer["recipe"],
            total_steps=trainer["total_steps"],
            plan=StreamPlan(**data["plan"]),
            positions=data["positions"],
            fingerprint=data["fingerprint"],
            step=trainer["step"],
            images_seen=trainer["images_seen"],
            guard=trainer["guard"],
            bad=data["bad"],
            scaler=trainer.get("scaler"),
            version=trainer["version"],
        )

    def write(self, checkpoint: Path) -> None:
        """Write the two files into a folder."""
        trainer = {
            "step": self.step,
            "images_seen": self.images_seen,
            "total_steps": self.total_steps,
            "guard": self.guard,
            "version": self.version,
            "recipe": self.recipe,
        }
        if self.scaler is not None:
            trainer["scaler"] = self.scaler
        data = {
            "plan": vars(self.plan),
            "seed": self.recipe["seed"],
            "positions": self.positions,
            "fingerprint": self.fingerprint,
            "bad": self.bad,
        }
        write_json(trainer, checkpoint / TRAINER)
        write_json(data, checkpoint / DATA)

    def advance(self, images: int) -> None:
        """One more optimizer step, on this many images."""
        self.step += 1
        self.images_seen += images
