"""In each step, all processes agree whether to skip it because a number is not finite, and whether to stop after it.

One small all-reduce sums the flags of all processes. From the sum, the device decides at once whether the optimizer
takes the step. The host of a GPU reads the sum one step later and never blocks.
"""

import signal
from collections import deque
from typing import NamedTuple, cast

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from ..errors import UserError

MOST_IN_A_ROW = 10


class Verdict(NamedTuple):
    """What the processes agreed for a step."""

    step: int  # from 1
    skipped: bool  # by all processes
    stop: bool  # whether any process has to stop
    samples: list[str]  # keys of the whole batch, on all processes; empty unless the step was skipped


class StepGuard:
    """Agrees with the other processes, and counts skipped steps: all of the run's, and the latest in a row."""

    def __init__(self, accelerator: Accelerator, skipped_steps: int = 0, skipped_in_a_row: int = 0):
        self.accelerator = accelerator
        self.skipped_steps, self.skipped_in_a_row = skipped_steps, skipped_in_a_row
        # Reading the newest flags would make the host wait for a GPU.
        self._lag = 1 if accelerator.device.type == "cuda" else 0
        self._flags: deque[tuple[int, list[str], torch.Tensor, torch.cuda.Event | None]] = deque()

    def judge(self, step: int, finite: torch.Tensor, stop: bool, keys: list[str]) -> torch.Tensor:
        """Share a step's flags with the other processes, before the optimizer takes the step. All must call it.

        Args:
            step: number of the step, from 1.
            finite: () bool, on the device: whether loss and gradient of this process are finite.
            stop: whether this process has to stop.
            keys: keys of this process's samples.

        Returns:
            () float32 on the device: 0 to take the step, 1 to skip it, the same on all processes.
        """
        flags = torch.stack([(~finite).float(), torch.full_like(finite, float(stop), dtype=torch.float32)])
        flags = cast(torch.Tensor, self.accelerator.reduce(flags, "sum"))
        self._flags.append((step, keys, *_copied_to_host(flags)))
        return (flags[0] > 0).float()

    def verdicts(self, up_to_now: bool) -> list[Verdict]:
        """The verdicts since the last call. Every process must call it.

        Args:
            up_to_now: include the newest step, which makes the host wait for a GPU.
        """
        result = []
        while len(self._flags) > (0 if up_to_now else self._lag):
            step, keys, flags, copied = self._flags.popleft()
            if copied:
                copied.synchronize()
            not_finite, stop = (count > 0 for count in flags.tolist())
            result.append(Verdict(step, not_finite, stop, gather_object(keys) if not_finite else []))
            self.skipped_steps += not_finite
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if not_finite else 0
            # All processes read the stop at the same step, so all read up to the newest step and stop after it.
            up_to_now = up_to_now or stop
        return result

    def counters(self) -> dict[str, int]:
        """Keyword arguments of a `StepGuard` that continues from here."""
        return {"skipped_steps": self.skipped_steps, "skipped_in_a_row": self.skipped_in_a_row}

    def check(self) -> None:
        """Raise a UserError after ten skipped steps in a row."""
        if self.skipped_in_a_row >= MOST_IN_A_ROW:
            raise UserError(
                f"{self.skipped_in_a_row} steps in a row were skipped, because loss or gradient was not finite; "
                "the last checkpoint is good: check the samples that metrics.jsonl names, or start again "
                "with a lower --blr, with --clip_grad 1, or with --mixed_precision bf16 or no"
            )


class StopSignals:
    """A context that turns SIGTERM and SIGUSR1 into a request to stop after the current step."""

    received = False

    def __enter__(self) -> "StopSignals":
        self._previous = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGUSR1)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, *_: object) -> None:
        self.received = True


def _copied_to_host(flags: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    """The flags on the host, and the event to wait for before reading them."""
    if flags.device.type != "cuda":
        return flags, None
    host = torch.empty_like(flags, device="cpu", pin_memory=True)
    host.copy_(flags, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return host, copied
