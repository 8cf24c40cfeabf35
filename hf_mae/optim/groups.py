"""Parameter groups: which parameters are decayed, how fast each layer learns, and which layers are frozen."""

import re
from typing import Any

import torch
from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups, with and without weight decay.

    As in the original's pretraining, one-dimensional parameters (biases, LayerNorm) are not decayed; class and mask
    tokens are.

    Args:
        model: the model; only parameters that require a gradient are used.
        weight_decay: weight decay of the first group (0.05 in Table 8).

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
    """AdamW on `parameter_groups`, with a fused kernel that can skip a step by a flag on the device.

    Args:
        model: the model; only parameters that require a gradient are used.
        betas: decays of the running means of the gradient and of its square, in [0, 1); 0.9 and 0.95 in Table 8.
        weight_decay: weight decay of all but one-dimensional parameters, 0 or more; 0.05 in Table 8.

    Returns:
        The optimizer, with learning rate 0: set each group's `lr` before each step.
    """
    return torch.optim.AdamW(parameter_groups(model, weight_decay), lr=0.0, betas=betas, fused=True)


def layer_of(name: str, depth: int) -> int:
    """The layer number of a parameter, from its name in an encoder or classifier of `depth` blocks.

    0 for class token, positions and patch projection, i + 1 for block i, depth + 1 for everything after the blocks.
    """
    if match := re.search(r"(?:^|\.)layers\.(\d+)\.", name):
        return int(match[1]) + 1
    return 0 if re.search(r"(?:^|\.)embeddings\.", name) else depth + 1


def layer_decay_groups(model: Any, lr: float, layer_decay: float, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for fine-tuning: each layer learns `layer_decay` times as fast as the one above it (arXiv:2003.10555).

    As in the original's fine-tuning, one-dimensional parameters, positions and class token are not decayed. The head's
    group comes first, so that a Trainer logs its learning rate `lr`.

    Args:
        model: a classifier or an encoder with `config.num_hidden_layers`; only parameters that require a gradient are
            used.
        lr: learning rate of the head.
        layer_decay: factor from each layer to the one below; 0.65 or 0.75 in the original's recipes, 1 for one rate.
        weight_decay: weight decay of all other parameters (0.05 in Table 9).

    Returns:
        Groups for a torch optimizer, with their own `lr` and `weight_decay`.
    """
    depth: int = model.config.num_hidden_layers
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            spared = parameter.ndim <= 1 or name.endswith(("cls_token", "position_embeddings.table"))
            groups.setdefault((layer_of(name, depth), spared), []).append(parameter)
    return [
        {
            "params": groups[layer, spared],
            "lr": lr * layer_decay ** (depth + 1 - layer),
            "weight_decay": 0.0 if spared else weight_decay,
        }
        for layer, spared in sorted(groups, reverse=True)
    ]


def train_last_blocks(model: Any, blocks: str) -> None:
    """Freeze all but the head and the last blocks: partial fine-tuning (arXiv:2111.06377, Fig. 9).

    The layers after the last block (LayerNorm and classifier) always train.

    Args:
        model: a classifier.
        blocks: "all" (freeze nothing), a number of blocks, or "0.5": only the last block's MLP and its LayerNorm.

    Raises:
        ValueError: for anything else.
    """
    depth: int = model.config.num_hidden_layers
    if blocks == "all":
        return
    if blocks != "0.5" and not (blocks.isdecimal() and int(blocks) <= depth):
        raise ValueError(f"trainable_blocks {blocks} is not possible; choose 0, 0.5, 1 to {depth}, or all")
    frozen = depth - (0 if blocks == "0.5" else int(blocks))  # the last frozen layer
    for name, parameter in model.named_parameters():
        half = blocks == "0.5" and re.search(rf"layers\.{depth - 1}\.(norm2|mlp)\.", name) is not None
        parameter.requires_grad_(half or layer_of(name, depth) > frozen)
