"""What all processes agree on after each step: to leave out a step whose numbers are not finite, and to stop.

The words of all processes are summed by one small all-reduce. On the device the sum decides at once whether the
optimizer takes the step; the host of a GPU reads it a step later, when it is long there, so that nothing waits.
"""

from collections import deque
from dataclasses import dataclass
from typing import cast

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from ..errors import UserError

MOST_IN_A_ROW = 10


@dataclass
class Verdict:
    """What was agreed on about a step.

    Args:
        step: its number, from 1.
        skipped: whether all processes left it out.
        stop: whether any process was asked to stop.
        samples: keys of the batch of all processes, of a skipped step.
    """

    step: int
    skipped: bool
    stop: bool
    samples: list[str]


class StepGuard:
    """Agrees with the other processes; counts the steps that were left out.

    Args:
        accelerator: of the run.
        skipped_steps: as a checkpoint has it.
        skipped_in_a_row: as a checkpoint has it.
    """

    def __init__(self, accelerator: Accelerator, skipped_steps: int = 0, skipped_in_a_row: int = 0):
        self.accelerator = accelerator
        self.skipped_steps, self.skipped_in_a_row = skipped_steps, skipped_in_a_row
        # Reading the newest word would make the host wait for a GPU; on a CPU it is there.
        self._lag = 1 if accelerator.device.type == "cuda" else 0
        self._words: deque[tuple[int, list[str], torch.Tensor, torch.cuda.Event | None]] = deque()

    def judge(self, step: int, finite: torch.Tensor, stop: bool, keys: list[str]) -> torch.Tensor:
        """Tell the others about a step, before the optimizer takes it.

        Args:
            step: its number.
            finite: () bool, on the device: loss and gradient of this process.
            stop: whether this process was asked to stop.
            keys: of the samples of this process.

        Returns:
            () float32 on the device: 0 to take the step, 1 to leave it out, the same on all processes.
        """
        word = torch.stack([(~finite).float(), torch.full_like(finite, float(stop), dtype=torch.float32)])
        word = cast(torch.Tensor, self.accelerator.reduce(word, "sum"))
        self._words.append((step, keys, *_copied_to_host(word)))
        return (word[0] > 0).float()

    def verdicts(self, up_to_now: bool) -> list[Verdict]:
        """What was agreed on since the last call, on a GPU but for the newest step, unless `up_to_now`.

        All processes call it.
        """
        result = []
        while len(self._words) > (0 if up_to_now else self._lag):
            step, keys, word, copied = self._words.popleft()
            if copied:
                copied.synchronize()
            not_finite, stop = (count > 0 for count in word.tolist())
            result.append(Verdict(step, not_finite, stop, gather_object(keys) if not_finite else []))
            self.skipped_steps += not_finite
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if not_finite else 0
            # All read this at the same step, the newest, and stop after it.
            up_to_now = up_to_now or stop
        return result

    def check(self) -> None:
        """Raise a UserError after ten steps in a row that were left out."""
        if self.skipped_in_a_row >= MOST_IN_A_ROW:
            raise UserError(
                f"{self.skipped_in_a_row} steps in a row had a loss or gradient that is not finite and were left out; "
                "the last checkpoint is the last good one: look at the samples that metrics.jsonl names, or start "
                "again with a lower --blr, with --clip_grad 1, or with --mixed_precision bf16 or no"
            )


def _copied_to_host(word: torch.Tensor) -> tuple[torch.Tensor, torch.cuda.Event | None]:
    """The word where the host reads it, and what to wait for first."""
    if word.device.type != "cuda":
        return word, None
    host = torch.empty_like(word, device="cpu", pin_memory=True)
    host.copy_(word, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return host, copied
