"""The learning rate as a pure function of the step: nothing to save, nothing that depends on the ranks."""

import math


def lr_at(step: float, lr: float, warmup_steps: float, total_steps: float, min_lr: float = 0.0) -> float:
    """Linear warm-up from 0, then half a cosine down to `min_lr` (arXiv:2111.06377, Table 8).

    Args:
        step: optimizer steps taken before this one, from 0; the original counts epochs, and any unit will do.
        lr: the highest learning rate, `blr * total_batch_size / 256`.
        warmup_steps: length of the warm-up.
        total_steps: where the cosine ends.
        min_lr: what it ends at.

    Returns:
        The learning rate of the step.
    """
    if step < warmup_steps:
        return lr * step / warmup_steps
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1e-9)
    return min_lr + (lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
