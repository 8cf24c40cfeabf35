"""The original's forward pass, on weights with the original's names. Conversions are checked against it.

Written from the paper, on plain tensors and independently of modeling_mae.py; the tests pin it to the original's own
figures.
"""

# Shape letters in this file
#   B images   C channels   H, W pixels   P patch side   N patches   K kept patches   D width   V = P*P*C

import torch
import torch.nn.functional as F

Weights = dict[str, torch.Tensor]
EPS = 1e-6


def encode(weights: Weights, pixel_values: torch.Tensor, heads: int, ids_keep: torch.Tensor | None = None):
    """(B, C, H, W) -> (B, 1 + K, D) after the last block, before any normalisation; all patches by default."""
    kernel = weights["patch_embed.proj.weight"]
    tokens = F.conv2d(pixel_values, kernel, weights["patch_embed.proj.bias"], stride=kernel.shape[2:])
    tokens = tokens.flatten(2).transpose(1, 2) + weights["pos_embed"][:, 1:]
    if ids_keep is not None:
        tokens = torch.stack([row[ids] for row, ids in zip(tokens, ids_keep, strict=True)])
    class_token = weights["cls_token"] + weights["pos_embed"][:, :1]
    return _blocks(weights, "blocks", torch.cat([class_token.expand(len(tokens), -1, -1), tokens], dim=1), heads)


def features(weights: Weights, pixel_values: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, 1 + N, D) normalised tokens of unmasked images, class token first."""
    return _norm(weights, "norm", encode(weights, pixel_values, heads))


def classify(weights: Weights, pixel_values: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, classes): the mean of the patch tokens where the weights have an `fc_norm`, else the class token."""
    tokens = encode(weights, pixel_values, heads)
    if "fc_norm.weight" in weights:
        pooled = _norm(weights, "fc_norm", tokens[:, 1:].mean(dim=1))
    else:
        pooled = _norm(weights, "norm", tokens)[:, 0]
    return _linear(weights, "head", pooled)


def pretrain(
    weights: Weights,
    pixel_values: torch.Tensor,
    mask: torch.Tensor,
    heads: int,
    decoder_heads: int,
    norm_pix_loss: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Predicted patches (B, N, V), and the loss on those that the mask (B, N) removes (1 = removed)."""
    kept = torch.stack([row.eq(0).nonzero()[:, 0] for row in mask])
    tokens = encode(weights, pixel_values, heads, kept)
    tokens = _linear(weights, "decoder_embed", _norm(weights, "norm", tokens))
    full = weights["mask_token"].repeat(*mask.shape, 1)
    for row, ids, visible in zip(full, kept, tokens[:, 1:], strict=True):
        row[ids] = visible
    tokens = torch.cat([tokens[:, :1], full], dim=1) + weights["decoder_pos_embed"]
    tokens = _norm(weights, "decoder_norm", _blocks(weights, "decoder_blocks", tokens, decoder_heads))
    logits = _linear(weights, "decoder_pred", tokens)[:, 1:]
    P, Q = weights["patch_embed.proj.weight"].shape[2:]
    target = pixel_values.unfold(2, P, P).unfold(3, Q, Q).permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
    if norm_pix_loss:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    error = (logits - target).square().mean(dim=-1)
    return logits, (error * mask).sum() / mask.sum()


def depth(weights: Weights, name: str) -> int:
    """The number of blocks whose names begin with "NAME."."""
    return 1 + max(int(key.split(".")[1]) for key in weights if key.startswith(f"{name}."))


def _blocks(weights: Weights, name: str, tokens: torch.Tensor, heads: int) -> torch.Tensor:
    for block in (f"{name}.{index}" for index in range(depth(weights, name))):
        qkv = _linear(weights, f"{block}.attn.qkv", _norm(weights, f"{block}.norm1", tokens))
        query, key, value = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=2))
        scores = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
        attended = (scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2)
        tokens = tokens + _linear(weights, f"{block}.attn.proj", attended)
        hidden = F.gelu(_linear(weights, f"{block}.mlp.fc1", _norm(weights, f"{block}.norm2", tokens)))
        tokens = tokens + _linear(weights, f"{block}.mlp.fc2", hidden)
    return tokens


def _linear(weights: Weights, name: str, tokens: torch.Tensor) -> torch.Tensor:
    return F.linear(tokens, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def _norm(weights: Weights, name: str, tokens: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(tokens, tokens.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], EPS)
