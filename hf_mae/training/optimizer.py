"""Parameter groups: what weight decay applies to."""

from typing import Any

import torch
from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups, with and without weight decay.

    As in the original's pretraining, every one-dimensional parameter (biases, LayerNorm) goes without; class and mask
    tokens are decayed.

    Args:
        model: its parameters that require a gradient are taken.
        weight_decay: of the first group (0.05 in Table 8).

    Returns:
        Groups for a torch optimizer; an empty one is left out.
    """
    decayed, spared = [], []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (spared if parameter.ndim <= 1 else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def adamw(model: nn.Module, betas: tuple[float, float], weight_decay: float) -> torch.optim.AdamW:
    """AdamW (Table 8: betas 0.9 and 0.95 in pretraining); its learning rate is set before each step.

    The fused kernel is used where all parameters are on a device that has it: it is one launch a step, and reads no
    number back.
    """
    return torch.optim.AdamW(parameter_groups(model, weight_decay), lr=0.0, betas=betas, fused=True)
