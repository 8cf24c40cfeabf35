"""LARS, the optimizer of linear probing."""

from typing import Any

import torch


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (arXiv:1708.03888), as linear probing uses it (arXiv:2111.06377, Table 10).

    For a parameter p with two or more dimensions, the update u = gradient + weight_decay * p is scaled to the length
    trust_coefficient * |p|; one-dimensional parameters (biases) are neither scaled nor decayed. Then
    buffer = momentum * buffer + u and p = p - lr * buffer. If |p| or |u| is 0, u is not scaled.

    `lr` is set before each step.
    """

    def __init__(
        self,
        parameters: Any,
        lr: float = 0.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
    ):
        keys = {"momentum": momentum, "weight_decay": weight_decay, "trust_coefficient": trust_coefficient}
        super().__init__(parameters, {"lr": lr, **keys})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                update = parameter.grad
                if parameter.ndim > 1:
                    update = update + group["weight_decay"] * parameter
                    length, target = update.norm(), group["trust_coefficient"] * parameter.norm()
                    # torch.where works on the device, so nothing is read back.
                    update = update * torch.where((length > 0) & (target > 0), target / length, 1.0)
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                state["momentum_buffer"].mul_(group["momentum"]).add_(update)
                parameter.sub_(group["lr"] * state["momentum_buffer"])
