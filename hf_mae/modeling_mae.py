"""Masked autoencoder (He et al., arXiv:2111.06377), in the order in which the data flows.

patchify -> mask -> embed what is kept -> encoder -> decoder -> loss; then the models that users load.
"""

# Shape letters in this file
#   B images   C channels   H, W pixels   P, Q patch height and width in pixels   V = P*Q*C numbers in a patch
#   h, w patch grid   N = h*w patches per image   K kept patches   M predicted patches
#   D encoder width   E decoder width

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneMixin
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BackboneOutput, ImageClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils.generic import ModelOutput, can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_mae import SIZES, MAEConfig


class MAEKwargs(TypedDict, total=False):
    """What every `forward` takes besides its own arguments, and besides transformers' `return_dict`."""

    output_hidden_states: bool | None
    output_attentions: bool | None


@dataclass
class MAEModelOutput(ModelOutput):
    """Output of `MAEModel`.

    Args:
        last_hidden_state: (B, 1 + N, D) class token and patch tokens after the last LayerNorm; (B, 1 + K, D), in
            shuffled order, if patches were removed.
        pooler_output: (B, D) mean of the patch tokens, or the class token (`config.pooling`).
        mask: (B, N) 1 = removed, 0 = kept; None without masking.
        ids_restore: (B, N) index that puts a shuffled sequence back in image order; None without masking.
        hidden_states: inputs of all layers and the last one's output, on request.
        attentions: (B, heads, 1 + K, 1 + K) of all layers, on request, with the eager attention.
        features: with `config.decoder_fusion` and a mask, what the decoder reads: (B, 1 + K, D) inputs of all layers,
            then `last_hidden_state`.
    """

    last_hidden_state: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    ids_restore: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    features: tuple[torch.Tensor, ...] | None = None


@dataclass
class MAEForPreTrainingOutput(ModelOutput):
    """Output of `MAEForPreTraining`.

    Args:
        loss: mean squared error on the removed patches (Sec. 3, "Reconstruction target"), or on the part of them that
            `config.prediction_ratio` says.
        logits: (B, N, V) predicted patches, in image order. The "self" decoder predicts visible ones too; with the
            "cross" decoder, zeros stand where nothing was predicted: in visible patches, and in training where
            `config.prediction_ratio` leaves a removed patch out.
        mask: (B, N) 1 = removed, 0 = kept.
        ids_restore: (B, N) index that puts a shuffled sequence back in image order.
        hidden_states: the encoder's, on request.
        attentions: the encoder's, on request, with the eager attention.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    ids_restore: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


# ---------------------------------------------------------------------------------------------- patches


def patchify(pixel_values: torch.Tensor, patch_size: tuple[int, int], ids: torch.Tensor | None = None) -> torch.Tensor:
    """Cut images into patches.

    Args:
        pixel_values: (B, C, H, W).
        patch_size: (height, width) in pixels; must divide H and W.
        ids: (B, M) the patches wanted, the only ones to be copied; all of them, in order, when omitted.

    Returns:
        (B, N or M, P*Q*C) patches from left to right, top to bottom; within one: row, column, channel.
    """
    (B, C, H, W), (P, Q) = pixel_values.shape, patch_size
    h, w = H // P, W // Q
    patches = pixel_values.reshape(B, C, h, P, w, Q).permute(0, 2, 4, 3, 5, 1)
    if ids is None:
        return patches.reshape(B, h * w, P * Q * C)
    images = torch.arange(B, device=ids.device).unsqueeze(1)
    return patches[images, ids // w, ids % w].flatten(2)


def unpatchify(patches: torch.Tensor, patch_size: tuple[int, int], grid_size: tuple[int, int]) -> torch.Tensor:
    """Put patches (B, N, P*Q*C) back together as images (B, C, H, W); the inverse of `patchify`."""
    (B, N, V), (P, Q), (h, w) = patches.shape, patch_size, grid_size
    if N != h * w:
        raise ValueError(f"{N} patches don't fill a {h}x{w} grid of {h * w}; pass the grid_size of these images")
    pixels = patches.reshape(B, h, w, P, Q, V // (P * Q))
    return pixels.permute(0, 5, 1, 3, 2, 4).reshape(B, V // (P * Q), h * P, w * Q)


def take(tokens: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Pick tokens (B, M, D) of (B, N, D) by their indices (B, M)."""
    return tokens.gather(1, ids.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


# ---------------------------------------------------------------------------------------------- masks


def split_by_noise(noise: torch.Tensor, len_keep: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keep the patches with the smallest noise (Sec. 3, "Masking": shuffle, keep the first).

    Args:
        noise: (B, N) sort keys; equal keys stay in image order.
        len_keep: K.

    Returns:
        ids_shuffle: (B, N) patch indices, the K kept ones first.
        mask: (B, N) 1 = removed, 0 = kept, in image order.
        ids_restore: (B, N) index that puts a shuffled sequence back in image order.
    """
    ids_shuffle = noise.argsort(dim=1, stable=True)
    ids_restore = ids_shuffle.argsort(dim=1)
    return ids_shuffle, (ids_restore >= len_keep).to(noise.dtype), ids_restore


def hashed_noise(seed: int, count: int, device: torch.device) -> torch.Tensor:
    """(count,) numbers in [0, 1) that are a function of the seed and of their place: equal on every device.

    A hash of a counter (github.com/skeeto/hash-prospector), because torch.compile takes no new torch.Generator.
    """
    bits = (torch.arange(count, device=device) + seed * 0x9E3779B9 % 2**32) % 2**32
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
        bits = (bits ^ (bits >> shift)) * factor % 2**32
    return ((bits ^ (bits >> 15)) >> 8) / 2**24  # 24 bits: what a float32 holds exactly


def cell_noise(noise: torch.Tensor, grid_size: tuple[int, int], cell: int) -> torch.Tensor:
    """Give all patches of a square cell (cell x cell) the key of the cell's first patch, (B, N) -> (B, N)."""
    h, w = grid_size
    keys = noise.reshape(-1, h, w)[:, ::cell, ::cell]
    return keys.repeat_interleave(cell, dim=1).repeat_interleave(cell, dim=2).flatten(1)


def block_noise(noise: torch.Tensor, grid_size: tuple[int, int]) -> torch.Tensor:
    """Sort keys that remove random rectangles first ("block" in Table 1f, after BEiT, arXiv:2106.08254).

    Each image gets up to 16 rectangles of 8 to 40 % of its area and aspect 0.3 to 3.3, whose numbers are taken
    from its own noise, so that one (B, N) tensor repeats a mask of either kind. A patch is removed the earlier, the
    earlier a rectangle covers it; noise decides within one rectangle and outside of all.
    """
    h, w = grid_size
    blocks = min(16, noise.shape[1] // 4)
    if blocks == 0:
        return noise  # too few numbers, and too few patches, for a rectangle
    area, aspect, top, left = noise[:, : 4 * blocks].reshape(-1, blocks, 4, 1, 1).unbind(2)
    area = (0.08 + 0.32 * area) * h * w
    aspect = 0.3 * (3.3 / 0.3) ** aspect
    height, width = (area * aspect).sqrt().clamp(1, h), (area / aspect).sqrt().clamp(1, w)
    top, left = top * (h - height), left * (w - width)
    rows = torch.arange(h, device=noise.device).view(1, 1, h, 1) + 0.5
    columns = torch.arange(w, device=noise.device).view(1, 1, 1, w) + 0.5
    inside = (rows >= top) & (rows < top + height) & (columns >= left) & (columns < left + width)
    order = torch.arange(blocks, 0, -1, device=noise.device, dtype=noise.dtype).view(1, blocks, 1, 1)
    # The first rectangle has the largest number, and the largest keys are removed.
    return (inside * order).amax(dim=1).flatten(1) + noise


# ---------------------------------------------------------------------------------------------- embedding


def sincos_table(grid_size: tuple[int, int], width: int, device: torch.device | str | None = None) -> torch.Tensor:
    """Fixed 2-D sine-cosine positions, a zero row for the class token first.

    Half of the columns belong to the position along the width and come first, as in the released weights; each half
    holds sines, then cosines, of the position times 10000^(-i / (width / 4)).

    Args:
        grid_size: (h, w) patches.
        width: of the tokens, a multiple of 4.

    Returns:
        (1 + h*w, width) float32, values in [-1, 1].
    """
    h, w = grid_size
    frequency = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64, device=device) / (width // 4))
    rows = torch.arange(h, dtype=torch.float64, device=device).repeat_interleave(w)
    columns = torch.arange(w, dtype=torch.float64, device=device).repeat(h)
    angles = torch.stack([columns, rows], dim=1).unsqueeze(-1) * frequency  # (N, 2, width / 4)
    table = torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)
    return F.pad(table, (0, 0, 1, 0)).to(torch.float32)


class MAEPositions(nn.Module):
    """The position table (1 + N, width) of the encoder or the decoder.

    A persistent float32 buffer: a checkpoint holds it, no optimizer changes it, and a model loaded in bfloat16 keeps
    it exact. With `trainable`, a parameter under the same name.
    """

    def __init__(self, config: MAEConfig, width: int, trainable: bool = False):
        super().__init__()
        self.config = config
        self.grid_size = config.grid_size
        self.table: torch.Tensor
        table = sincos_table(self.grid_size, width)
        if trainable:
            self.table = nn.Parameter(table)
        else:
            self.register_buffer("table", table)

    def forward(self, grid_size: tuple[int, int]) -> torch.Tensor:
        """The table for a patch grid: its own, or one made for that grid (`config.position_resize`)."""
        return self.table if grid_size == self.grid_size else self._resized(grid_size)

    def set_grid_size(self, grid_size: tuple[int, int]) -> None:
        """Move to another patch grid for good."""
        if grid_size != self.grid_size:
            self.table.data = self._resized(grid_size).detach()
            self.grid_size = grid_size

    def _resized(self, grid_size: tuple[int, int]) -> torch.Tensor:
        (h, w), width = self.grid_size, self.table.shape[1]
        how = self.config.position_resize
        if how == "auto":
            # The tolerance lets a table pass that was once rounded to bfloat16.
            exact = sincos_table(self.grid_size, width, self.table.device)
            how = "sincos" if torch.allclose(self.table.float(), exact, rtol=0, atol=5e-3) else "interpolate"
        if how == "sincos":
            return sincos_table(grid_size, width, self.table.device)
        patches = self.table[1:].float().T.reshape(1, width, h, w)
        patches = F.interpolate(patches, size=grid_size, mode="bicubic", align_corners=False)
        return torch.cat([self.table[:1].float(), patches.reshape(width, -1).T])


class MAEPatchEmbed(nn.Conv2d):
    """Linear projection of patches, with the weight of a convolution, (D, C, P, Q), as every ViT stores it."""

    def __init__(self, config: MAEConfig):
        patch_size = config.patch_height_width
        super().__init__(config.num_channels, config.hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """(B, K, V) -> (B, K, D). Works on patches, not on images, so that removed ones cost nothing."""
        return F.linear(patches, self.weight.permute(0, 2, 3, 1).flatten(1), self.bias)


class MAEEmbeddings(nn.Module):
    """Images -> class token and the tokens of the kept patches, with positions."""

    def __init__(self, config: MAEConfig):
        super().__init__()
        self.config = config
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.patch_embed = MAEPatchEmbed(config)
        self.position_embeddings = MAEPositions(config, config.hidden_size, config.trainable_positions)

    def forward(self, pixel_values: torch.Tensor, ids_keep: torch.Tensor | None = None) -> torch.Tensor:
        """(B, C, H, W) -> (B, 1 + K, D); all patches are kept without `ids_keep` (B, K)."""
        (_, _, H, W), (P, Q) = pixel_values.shape, self.config.patch_height_width
        # The parameters' dtype, not the activations': under autocast the residual stream then stays float32.
        dtype = self.cls_token.dtype
        positions = self.position_embeddings((H // P, W // Q)).to(dtype)
        class_position, patch_positions = positions[:1], positions[1:]
        if ids_keep is not None:
            patch_positions = patch_positions[ids_keep]
        tokens = self.patch_embed(patchify(pixel_values.to(dtype), (P, Q), ids_keep)) + patch_positions
        class_token = (self.cls_token + class_position).expand(tokens.shape[0], -1, -1)
        return torch.cat([class_token, tokens], dim=1)


# ---------------------------------------------------------------------------------------------- transformer


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in plain operations, which returns its weights (B, heads, queries, keys)."""
    scores = query @ key.transpose(-2, -1) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class MAEAttention(nn.Module):
    """Multi-head attention: to the tokens themselves or, with `memory_width`, to a memory (B, tokens, memory_width)."""

    is_causal = False

    def __init__(self, config: MAEConfig, width: int, num_heads: int, memory_width: int | None = None):
        super().__init__()
        self.config = config
        self.head_dim = width // num_heads
        self.scaling = self.head_dim**-0.5
        if memory_width is None:
            # Fused, so that Xavier's fan-out is 3 D, as in the original.
            self.qkv = nn.Linear(width, 3 * width, bias=config.qkv_bias)
        else:
            self.q = nn.Linear(width, width, bias=config.qkv_bias)
            self.kv = nn.Linear(memory_width, 2 * width, bias=config.qkv_bias)
        self.proj = nn.Linear(width, width)

    def forward(
        self, hidden_states: torch.Tensor, memory: torch.Tensor | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        B, length, width = hidden_states.shape
        projections = [self.qkv(hidden_states)] if memory is None else [self.q(hidden_states), self.kv(memory)]
        heads = (-1, width // self.head_dim, self.head_dim)
        parts = [part for some in projections for part in some.unflatten(-1, heads).unbind(2)]
        query, key, value = (part.transpose(1, 2) for part in parts)  # each (B, heads, length, head_dim)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation or "eager", eager_attention_forward
        )
        hidden_states, weights = attention(self, query, key, value, None, scaling=self.scaling, dropout=0.0, **kwargs)
        return self.proj(hidden_states.reshape(B, length, width)), weights


class MAEMLP(nn.Module):
    """Linear, activation, linear."""

    def __init__(self, config: MAEConfig, width: int, mlp_width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, mlp_width)
        self.act = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(mlp_width, width)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(hidden_states)))


class MAEDropPath(nn.Module):
    """Stochastic depth (arXiv:1603.09382): drops a residual branch for whole samples, in training only."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, branch: torch.Tensor) -> torch.Tensor:
        if self.rate == 0 or not self.training:
            return branch
        keep = torch.rand(branch.shape[0], 1, 1, device=branch.device) >= self.rate
        return branch * keep / (1 - self.rate)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3g}"


class MAELayer(GradientCheckpointingLayer):
    """Pre-norm transformer block of the encoder or, with its sizes, of a decoder."""

    def __init__(
        self,
        config: MAEConfig,
        width: int,
        num_heads: int,
        mlp_width: int,
        drop_path_rate: float = 0.0,
        memory_width: int | None = None,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.attention = MAEAttention(config, width, num_heads, memory_width)
        self.norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = MAEMLP(config, width, mlp_width)
        self.drop_path = MAEDropPath(drop_path_rate)

    def forward(self, hidden_states: torch.Tensor, memory: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        hidden_states = hidden_states + self.drop_path(self.attention(self.norm1(hidden_states), memory, **kwargs)[0])
        return hidden_states + self.drop_path(self.mlp(self.norm2(hidden_states)))


def encoder_layers(config: MAEConfig) -> nn.ModuleList:
    """The encoder's blocks; drop path rises linearly with depth."""
    last = max(config.num_hidden_layers - 1, 1)
    return nn.ModuleList(
        MAELayer(
            config,
            config.hidden_size,
            config.num_attention_heads,
            config.intermediate_size,
            config.drop_path_rate * index / last,
        )
        for index in range(config.num_hidden_layers)
    )


class MAEDecoder(nn.Module):
    """Tokens of the visible patches -> pixels of all patches (Sec. 3, "MAE decoder")."""

    def __init__(self, config: MAEConfig, memory_width: int | None = None):
        super().__init__()
        E = config.decoder_hidden_size
        P, Q = config.patch_height_width
        if memory_width is None:
            self.decoder_embed = nn.Linear(config.hidden_size, E)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, E))
        self.decoder_pos_embed = MAEPositions(config, E)
        heads, mlp_width = config.decoder_num_attention_heads, config.decoder_intermediate_size
        self.decoder_layers = nn.ModuleList(
            MAELayer(config, E, heads, mlp_width, memory_width=memory_width)
            for _ in range(config.decoder_num_hidden_layers)
        )
        self.decoder_norm = nn.LayerNorm(E, eps=config.layer_norm_eps)
        self.decoder_pred = nn.Linear(E, P * Q * config.num_channels)

    def forward(self, encoded: MAEModelOutput, ids: torch.Tensor, grid_size: tuple[int, int]) -> torch.Tensor:
        """Visible tokens (B, 1 + K, D) in shuffled order -> (B, N, V) in image order, whichever `ids` are wanted."""
        ids_restore = encoded.ids_restore
        assert ids_restore is not None
        tokens = self.decoder_embed(encoded.last_hidden_state)
        class_token, visible = tokens[:, :1], tokens[:, 1:]
        removed = ids_restore.shape[1] - visible.shape[1]
        mask_tokens = self.mask_token.to(tokens.dtype).expand(tokens.shape[0], removed, -1)
        patches = take(torch.cat([visible, mask_tokens], dim=1), ids_restore)
        positions = self.decoder_pos_embed(grid_size).to(self.mask_token.dtype)
        hidden_states = torch.cat([class_token, patches], dim=1) + positions
        for layer in self.decoder_layers:
            hidden_states = layer(hidden_states)
        return self.decoder_pred(self.decoder_norm(hidden_states))[:, 1:]


class MAEFeatureFusion(nn.Module):
    """For each decoder block its own weighted sum of the encoder's features (CrossMAE, "Inter-block attention")."""

    def __init__(self, config: MAEConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.decoder_num_hidden_layers, config.num_hidden_layers + 1))
        self.norms = nn.ModuleList(nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) for _ in self.weight)

    def forward(self, features: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        """(B, 1 + K, D) of the embedding and of each encoder block -> one for each decoder block."""
        fused = self.weight @ torch.stack(features).flatten(1)
        return [norm(memory.view_as(features[0])) for norm, memory in zip(self.norms, fused, strict=True)]


class MAECrossDecoder(MAEDecoder):
    """Each wanted patch by itself, by cross-attention to the visible tokens (CrossMAE, arXiv:2401.14391).

    A query is a mask token with its position. Queries don't see each other: which others are asked for changes nothing.
    """

    def __init__(self, config: MAEConfig):
        super().__init__(config, memory_width=config.hidden_size)
        self.fusion = MAEFeatureFusion(config) if config.decoder_fusion else None

    def forward(self, encoded: MAEModelOutput, ids: torch.Tensor, grid_size: tuple[int, int]) -> torch.Tensor:
        """Visible tokens (B, 1 + K, D) and wanted patches (B, M) -> (B, N, V) in image order, zero where unwanted."""
        shape = (*encoded.ids_restore.shape, self.decoder_pred.out_features)
        if ids.shape[1] == 0:
            return self.mask_token.new_zeros(shape)  # attention takes no empty queries
        positions = self.decoder_pos_embed(grid_size)[1:].to(self.mask_token.dtype)
        hidden_states = self.mask_token + positions[ids]
        if self.fusion is None:
            memories = [encoded.last_hidden_state] * len(self.decoder_layers)
        else:
            memories = self.fusion(encoded.features)
        for layer, memory in zip(self.decoder_layers, memories, strict=True):
            hidden_states = layer(hidden_states, memory)
        predicted = self.decoder_pred(self.decoder_norm(hidden_states))
        return predicted.new_zeros(shape).scatter(1, ids.unsqueeze(-1).expand_as(predicted), predicted)


# ---------------------------------------------------------------------------------------------- models


# What transformers looks for in a repository that brings this code along.
AUTO_MAP = {
    "AutoConfig": "configuration_mae.MAEConfig",
    "AutoModel": "modeling_mae.MAEModel",
    "AutoModelForPreTraining": "modeling_mae.MAEForPreTraining",
    "AutoModelForMaskedImageModeling": "modeling_mae.MAEForPreTraining",
    "AutoModelForImageClassification": "modeling_mae.MAEForImageClassification",
    "AutoBackbone": "modeling_mae.MAEBackbone",
}


class MAEPreTrainedModel(PreTrainedModel):
    """What all MAE models share: initial values, loading at another image size or channel count."""

    config: MAEConfig
    base_model_prefix = "mae"
    main_input_name = "pixel_values"
    input_modalities = "image"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MAEEmbeddings", "MAELayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": MAELayer, "attentions": MAEAttention}
    _input_embed_layer = "patch_embed"
    # An encoder, a classifier or a backbone leaves the decoder in the file, and says nothing about it.
    _keys_to_ignore_on_load_unexpected = [r"^decoder\."]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The original's initial values. Everything goes through `init`, which spares loaded weights."""
        if isinstance(module, nn.Conv2d):
            # Xavier as for the linear layer that it is, on (D, V); the bias keeps a convolution's default.
            fan_in, fan_out = module.weight[0].numel(), module.weight.shape[0]
            bound = (6 / (fan_in + fan_out)) ** 0.5
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.uniform_(module.bias, -(fan_in**-0.5), fan_in**-0.5)
        elif isinstance(module, nn.ConvTranspose2d):
            # Stride and kernel are equal, so that each pixel is one linear layer's output: Xavier as for that one.
            bound = (6 / (module.in_channels + module.out_channels)) ** 0.5
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, MAEEmbeddings):
            init.normal_(module.cls_token, std=self.config.initializer_range)
        elif isinstance(module, MAEDecoder):
            init.normal_(module.mask_token, std=self.config.initializer_range)
        elif isinstance(module, MAEFeatureFusion):
            init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)
        elif isinstance(module, MAEPositions):
            # Again here: after loading on the meta device, what the constructor wrote is gone.
            init.copy_(module.table, sincos_table(module.grid_size, module.table.shape[1]).to(module.table.dtype))

    def save_pretrained(  # type: ignore[override]
        self, save_directory: Any, *args: Any, with_code: bool = False, **kwargs: Any
    ) -> None:
        """transformers' own, with or without the code that loads the model where this package is not installed.

        Args:
            save_directory: folder.
            *args: as for every transformers model.
            with_code: save the code too, and say in config.json what each Auto class finds in it. A folder without
                it says nothing of code, whatever the model was loaded from. Classes that are registered by
                `register_for_auto_class`, as transformers does where it loads such code, are always saved with it.
            **kwargs: as for every transformers model.
        """
        cls, registered = type(self), type(self)._auto_class
        if with_code or kwargs.get("push_to_hub") or registered:
            # Registration alone would name this one class, and leave the other Auto classes without any.
            self.config.auto_map = dict(AUTO_MAP)
            names = [name for name, where in AUTO_MAP.items() if where.endswith(f".{cls.__name__}")]
            cls._auto_class = names[0] if names else registered
        else:
            vars(self.config).pop("auto_map", None)
        try:
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            cls._auto_class = registered
            if not registered:
                vars(self.config).pop("auto_map", None)

    def push_to_hub(  # pyright: ignore[reportIncompatibleVariableOverride]
        self, *args: Any, **kwargs: Any
    ) -> str:
        """transformers' own, with the code that loads the model where this package is not installed."""
        cls, registered = type(self), type(self)._auto_class
        cls._auto_class = registered or "AutoModel"
        try:
            return super().push_to_hub(*args, **kwargs)
        finally:
            cls._auto_class = registered

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: Any, *model_args: Any, config: Any = None, **kwargs: Any
    ) -> Any:
        """Load as every transformers model does; also at another `image_size` or with other `num_channels`.

        The checkpoint is loaded as it is and then moved by `resize_input`, so that nothing is dropped on the way.
        """
        if pretrained_model_name_or_path is None or kwargs.get("state_dict") is not None:
            return super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)
        hub_options = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
        hub_options = {key: kwargs[key] for key in hub_options if key in kwargs}
        settings, _ = MAEConfig.get_config_dict(pretrained_model_name_or_path, **hub_options)
        if settings.get("model_type", "mae") != "mae":
            raise ValueError(
                f"{pretrained_model_name_or_path} is a model of type {settings['model_type']}, not mae; convert it: "
                f"hf-mae convert {pretrained_model_name_or_path} FOLDER"
            )
        stored = MAEConfig.from_dict(settings)
        if isinstance(config, PreTrainedConfig):
            config = copy.deepcopy(config)
            wanted = {key: getattr(config, key) for key in ("image_size", "num_channels")}
            for key in wanted:
                setattr(config, key, getattr(stored, key))
        else:
            wanted = {key: kwargs.pop(key, getattr(stored, key)) for key in ("image_size", "num_channels")}
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded).resize_input(**wanted)
        return loaded

    def resize_input(
        self, image_size: int | list[int] | tuple[int, int] | None = None, num_channels: int | None = None
    ) -> None:
        """Move the model to another image size or channel count, in place.

        Position tables follow `config.position_resize`. Channels follow the rule "mean": every new channel starts
        from the mean of the old channels' filters, scaled so that the sum over channels keeps its size, and the
        decoder predicts for it the mean of what it predicted for the old ones.

        Args:
            image_size: pixels, one side or (height, width); unchanged when omitted.
            num_channels: unchanged when omitted.

        Raises:
            ValueError: if the size is not a multiple of the patch size.
        """
        new = copy.deepcopy(self.config)
        new.image_size = self.config.image_size if image_size is None else image_size
        if isinstance(new.image_size, tuple):
            new.image_size = list(new.image_size)
        new.num_channels = self.config.num_channels if num_channels is None else num_channels
        new._check()
        self.config.image_size, self.config.num_channels = new.image_size, new.num_channels
        for module in self.modules():
            if isinstance(module, MAEPositions):
                module.set_grid_size(new.grid_size)
            elif isinstance(module, MAEPatchEmbed) and module.in_channels != new.num_channels:
                weight = module.weight.data.mean(1, keepdim=True) * (module.in_channels / new.num_channels)
                module.weight.data = weight.expand(-1, new.num_channels, -1, -1).contiguous()
                module.in_channels = new.num_channels
            elif isinstance(module, MAEDecoder):
                _set_predicted_channels(module.decoder_pred, new)

    def _check_pixels(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool) -> tuple[int, int]:
        """The patch grid (h, w) of images (B, C, H, W), or an error that names what doesn't fit."""
        if pixel_values.ndim != 4:
            raise ValueError(
                f"pixel_values have shape {tuple(pixel_values.shape)}; pass (batch, channels, height, width)"
            )
        _, C, H, W = pixel_values.shape
        (height, width), (P, Q) = self.config.image_height_width, self.config.patch_height_width
        if self.config.num_channels != C:
            raise ValueError(
                f"pixel_values have {C} channels, the model {self.config.num_channels}; convert the images, or load "
                f"the model with num_channels={C}"
            )
        if H % P or W % Q:
            raise ValueError(f"an image of {H}x{W} is not a multiple of the patch {P}x{Q}; resize or crop it")
        if not interpolate_pos_encoding and (H, W) != (height, width):
            raise ValueError(
                f"an image of {H}x{W} doesn't fit a model for {height}x{width}; resize it, pass "
                f"interpolate_pos_encoding=True, or load the model with image_size=({H}, {W})"
            )
        return H // P, W // Q


def _set_predicted_channels(decoder_pred: nn.Linear, config: MAEConfig) -> None:
    P, Q = config.patch_height_width
    out_features = P * Q * config.num_channels
    if decoder_pred.out_features != out_features:
        for parameter in (decoder_pred.weight, decoder_pred.bias):
            by_pixel = parameter.data.view(P * Q, -1, *parameter.shape[1:]).mean(1, keepdim=True)
            by_pixel = by_pixel.expand(-1, config.num_channels, *parameter.shape[1:])
            parameter.data = by_pixel.reshape(out_features, *parameter.shape[1:])
        decoder_pred.out_features = out_features


def _refuse_unknown(model: nn.Module, kwargs: MAEKwargs) -> None:
    """A misspelt argument must not be swallowed by the keyword arguments that transformers passes through."""
    known = {*MAEKwargs.__annotations__, "return_dict", "use_cache"}
    if unknown := sorted(set(kwargs) - known):
        raise TypeError(f"{type(model).__name__}.forward() got an unexpected keyword argument '{unknown[0]}'")


class MAEModel(MAEPreTrainedModel):
    """The encoder. Without `mask_ratio`, `noise`, `mask` or `generator` it sees every patch, always alike."""

    def __init__(self, config: MAEConfig, add_final_norm: bool = True):
        super().__init__(config)
        self.embeddings = MAEEmbeddings(config)
        self.layers = encoder_layers(config)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if add_final_norm else nn.Identity()
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor,
        mask_ratio: float | None = None,
        noise: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        bool_masked_pos: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[MAEKwargs],
    ) -> MAEModelOutput:
        """Encode images.

        Args:
            pixel_values: (B, C, H, W) normalised pixels.
            mask_ratio: fraction of patches to remove, in [0, 1).
            noise: (B, N) sort keys, e.g. from U[0, 1): the K patches with the smallest are kept. With `mask_cell`
                above 1 the key of a cell's first patch counts.
            mask: (B, N) the caller's own choice, 1 = removed, 0 = kept; all rows keep the same number.
            generator: draws the noise.
            bool_masked_pos: another name for `mask`, as transformers' masked-image scripts call it.
            interpolate_pos_encoding: accept images of another size than `config.image_size`.
            **kwargs: `output_hidden_states`, `output_attentions`, `return_dict`.

        Raises:
            ValueError: if channels, sizes or masks don't fit; the message names both values and the remedy.
            TypeError: for an unknown argument.
        """
        _refuse_unknown(self, kwargs)
        grid_size = self._check_pixels(pixel_values, interpolate_pos_encoding)
        ids_keep, mask, ids_restore = self.choose_patches(
            pixel_values, grid_size, mask_ratio, noise, _one_mask(mask, bool_masked_pos), generator
        )
        hidden_states = self.embeddings(pixel_values, ids_keep)
        features: list[torch.Tensor] = []
        fused = self.config.decoder_fusion and ids_keep is not None
        for layer in self.layers:
            if fused:
                features.append(hidden_states)
            hidden_states = layer(hidden_states)
        hidden_states = self.norm(hidden_states)
        pooled = hidden_states[:, 0] if self.config.pooling == "cls" else hidden_states[:, 1:].mean(dim=1)
        return MAEModelOutput(
            last_hidden_state=hidden_states,
            pooler_output=pooled,
            mask=mask,
            ids_restore=ids_restore,
            features=(*features, hidden_states) if fused else None,
        )

    def choose_patches(
        self,
        pixel_values: torch.Tensor,
        grid_size: tuple[int, int],
        mask_ratio: float | None = None,
        noise: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Which patches to keep (arguments of `forward`): ids_keep (B, K), mask (B, N), ids_restore (B, N).

        Three times None if nothing asks for a mask.
        """
        if mask_ratio is None and noise is None and mask is None and generator is None:
            return None, None, None
        B, N = pixel_values.shape[0], grid_size[0] * grid_size[1]
        for name, tensor in (("noise", noise), ("mask", mask)):
            if tensor is not None and tuple(tensor.shape) != (B, N):
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}, the images {(B, N)} (images, patches); pass one number "
                    "per patch"
                )
        if mask is not None:
            if noise is not None or mask_ratio is not None or generator is not None:
                raise ValueError(
                    "mask came with mask_ratio, noise or generator, which it makes void; pass one or the other"
                )
            # Sorted by the mask itself: kept patches come first, in image order.
            len_keep, noise = _kept_by(mask), (mask != 0).to(torch.float32)
        else:
            ratio = self.config.mask_ratio if mask_ratio is None else mask_ratio
            len_keep = self.config.num_kept_patches(ratio, grid_size)
            if noise is None:
                device = pixel_values.device if generator is None else generator.device
                noise = torch.rand(B, N, generator=generator, device=device)
            if self.config.mask_strategy == "block":
                noise = block_noise(noise, grid_size)
            if self.config.mask_cell > 1:
                noise = cell_noise(noise, grid_size, self.config.mask_cell)
        ids_shuffle, mask, ids_restore = split_by_noise(noise.to(pixel_values.device), len_keep)
        return ids_shuffle[:, :len_keep], mask, ids_restore


def _one_mask(mask: torch.Tensor | None, bool_masked_pos: torch.Tensor | None) -> torch.Tensor | None:
    if mask is not None and bool_masked_pos is not None:
        raise ValueError("mask and bool_masked_pos are two names of one thing, and both came; pass one of them")
    return mask if bool_masked_pos is None else bool_masked_pos


def _kept_by(mask: torch.Tensor) -> int:
    counts = (mask == 0).sum(dim=1)
    fewest, most = int(counts.min()), int(counts.max())
    if fewest != most:
        raise ValueError(
            f"the mask keeps {fewest} patches in one row and {most} in another; keep the same number in each"
        )
    if fewest == 0:
        raise ValueError(f"the mask keeps 0 of {mask.shape[1]} patches; 0 means kept: leave at least one")
    return fewest


class MAEForPreTraining(MAEPreTrainedModel):
    """Encoder and decoder (`config.decoder_type`): predicts the pixels of removed patches."""

    # The loss is a mean over the batch, whatever a Trainer passes: accumulated steps weigh alike.
    accepts_loss_kwargs = False

    def __init__(self, config: MAEConfig):
        super().__init__(config)
        self.mae = MAEModel(config)
        self.decoder = MAECrossDecoder(config) if config.decoder_type == "cross" else MAEDecoder(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        mask_ratio: float | None = None,
        noise: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        bool_masked_pos: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        return_loss: bool = True,
        **kwargs: Unpack[MAEKwargs],
    ) -> MAEForPreTrainingOutput:
        """Remove patches, encode the rest, predict pixels.

        Args:
            pixel_values: (B, C, H, W) normalised pixels.
            mask_ratio: fraction of patches to remove; `config.mask_ratio` when omitted.
            noise: (B, N) sort keys; drawn from U[0, 1) when omitted: anew in training, and in evaluation the same
                ones for each batch, by `config.eval_mask_seed`.
            mask: (B, N) the caller's own choice, 1 = removed, 0 = kept; all that it removes is predicted.
            generator: draws the noise.
            bool_masked_pos: another name for `mask`.
            interpolate_pos_encoding: accept images of another size than `config.image_size`.
            return_loss: compute the loss. A stock Trainer evaluates without labels only where it finds this name.
            **kwargs: `output_hidden_states`, `output_attentions` (the encoder's), `return_dict`.

        Raises:
            ValueError: as `MAEModel`, and if no patch is removed.
        """
        mask = _one_mask(mask, bool_masked_pos)
        if mask is None and noise is None and generator is None and not self.training:
            noise = self.eval_noise(pixel_values)
        if mask is None and mask_ratio is None:
            mask_ratio = self.config.mask_ratio
        encoded = self.mae(
            pixel_values,
            mask_ratio,
            noise,
            mask,
            generator,
            interpolate_pos_encoding=interpolate_pos_encoding,
            return_dict=True,  # also where the config says False
            **kwargs,
        )
        grid_size = self._check_pixels(pixel_values, interpolate_pos_encoding)
        ids = self.predicted_patches(encoded, grid_size, partly=self.training and mask is None)
        logits = self.decoder(encoded, ids, grid_size)
        loss = self.reconstruction_loss(pixel_values, logits, ids) if return_loss else None
        return MAEForPreTrainingOutput(
            loss=loss,
            logits=logits,
            mask=encoded.mask,
            ids_restore=encoded.ids_restore,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )

    def eval_noise(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, N) from U[0, 1), the same at every call: row i belongs to the i-th image of a batch."""
        (B, _, H, W), (P, Q) = pixel_values.shape, self.config.patch_height_width
        N = (H // P) * (W // Q)
        return hashed_noise(self.config.eval_mask_seed, B * N, pixel_values.device).view(B, N)

    def patch_target(self, pixel_values: torch.Tensor, ids: torch.Tensor | None = None) -> torch.Tensor:
        """What `logits` should be, (B, N, V) float32, or of the patches `ids` (B, M) alone, (B, M, V).

        With `norm_pix_loss` each patch is normalised by itself.
        """
        target = patchify(pixel_values.float(), self.config.patch_height_width, ids)
        return normalize_patches(target) if self.config.norm_pix_loss else target

    def predicted_patches(
        self, encoded: MAEModelOutput, grid_size: tuple[int, int], partly: bool = False
    ) -> torch.Tensor:
        """(B, M) which patches the loss is about: all that were removed.

        With `partly`, as many of them as `config.prediction_ratio` says: those that would have been kept next, so that
        the noise that draws a mask draws them too.
        """
        kept, end = encoded.last_hidden_state.shape[1] - 1, encoded.ids_restore.shape[1]
        if partly and self.config.prediction_ratio is not None:
            end = min(end, kept + end - self.config.num_kept_patches(self.config.prediction_ratio, grid_size))
        return encoded.ids_restore.argsort(dim=1)[:, kept:end]

    def reconstruction_loss(self, pixel_values: torch.Tensor, logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Mean squared error over the pixels of the patches `ids` (B, M), in float32 (Sec. 3).

        Other patches are left out before anything is computed: they cost nothing and get no gradient.
        """
        if ids.shape[1] == 0:
            raise ValueError("mask_ratio 0 removes no patch, so there is nothing to predict; use e.g. 0.75")
        return F.mse_loss(take(logits, ids).float(), self.patch_target(pixel_values, ids))


def normalize_patches(patches: torch.Tensor) -> torch.Tensor:
    """Each patch (..., V) to mean 0 and (unbiased) variance 1 (Sec. 3, "Reconstruction target")."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) / (variance + 1e-6).sqrt()


class MAEForImageClassification(MAEPreTrainedModel):
    """The encoder with a linear head on the pooled tokens, for fine-tuning (Appendix A.1, "End-to-end fine-tuning").

    With mean pooling the pooled vector is normalised (`fc_norm`) instead of the tokens, as in the original.
    """

    # The loss is a mean over the batch, whatever a Trainer passes: accumulated steps weigh alike.
    accepts_loss_kwargs = False
    _keys_to_ignore_on_load_unexpected = [r"^decoder\.", r"^(mae\.)?norm\."]

    def __init__(self, config: MAEConfig):
        super().__init__(config)
        self.num_labels = int(config.num_labels or 0)
        mean = config.pooling == "mean"
        self.mae = MAEModel(config, add_final_norm=not mean)
        self.fc_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if mean else nn.Identity()
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if module is self.classifier:
            init.trunc_normal_(self.classifier.weight, std=self.config.head_initializer_range)
            init.zeros_(self.classifier.bias)
        else:
            super()._init_weights(module)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Unpack[MAEKwargs],
    ) -> ImageClassifierOutput:
        """Classify images, none of their patches removed.

        Args:
            pixel_values: (B, C, H, W) normalised pixels.
            labels: (B,) class indices, or (B, classes) float rows that sum to 1 (mixup, cutmix). With
                `config.problem_type` "multi_label_classification": (B, classes) of 0 and 1; "regression": (B,) or
                (B, num_labels) numbers.
            interpolate_pos_encoding: accept images of another size than `config.image_size`.
            **kwargs: `output_hidden_states`, `output_attentions`, `return_dict`.

        Raises:
            ValueError: if the labels fit none of these.
            TypeError: for an unknown argument, `mask_ratio` among them.
        """
        _refuse_unknown(self, kwargs)
        outputs = self.mae(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, return_dict=True, **kwargs)
        logits = self.classifier(self.fc_norm(outputs.pooler_output))
        loss = None if labels is None else self.classification_loss(logits, labels)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def classification_loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Cross-entropy (hard or soft labels), binary cross-entropy or squared error, by `config.problem_type`."""
        logits, problem = logits.float(), self.config.problem_type
        if problem in ("regression", "multi_label_classification"):
            rows = labels.unsqueeze(1) if problem == "regression" and labels.ndim == 1 else labels
            if rows.shape != logits.shape:
                # The losses would broadcast them.
                raise ValueError(
                    f"labels of shape {tuple(labels.shape)} don't fit {tuple(logits.shape)} (images, num_labels), what "
                    f'problem_type "{problem}" needs; give a row of {logits.shape[1]} an image, or change num_labels'
                )
            loss = F.mse_loss if problem == "regression" else F.binary_cross_entropy_with_logits
            return loss(logits, rows.float())
        if labels.ndim == 1 and not labels.is_floating_point():
            return F.cross_entropy(logits, labels)
        if labels.shape == logits.shape and labels.is_floating_point():
            total = labels.sum(dim=1)
            if torch.allclose(total, torch.ones_like(total), atol=1e-2):
                return F.cross_entropy(logits, labels)
        raise ValueError(
            f"labels of shape {tuple(labels.shape)} and type {labels.dtype} are neither class indices (B,) nor rows of "
            f"{logits.shape[1]} that sum to 1; for several labels or numbers set config.problem_type to "
            '"multi_label_classification" or "regression"'
        )


class MAERescale(nn.Module):
    """A feature map at a power of two times its resolution, D wide as before (arXiv:2203.16527, Fig. 2).

    Up by transposed convolutions that double it, with LayerNorm and activation between two of them; down by max
    pooling.
    """

    def __init__(self, config: MAEConfig, scale: float):
        super().__init__()
        D, doublings = config.hidden_size, round(math.log2(scale))
        self.doublings = nn.ModuleList(nn.ConvTranspose2d(D, D, kernel_size=2, stride=2) for _ in range(doublings))
        self.norms = nn.ModuleList(nn.LayerNorm(D, eps=config.layer_norm_eps) for _ in range(doublings - 1))
        self.act = ACT2FN[config.hidden_act]
        self.pool = 2 ** max(-doublings, 0)

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        """(B, D, h, w) -> (B, D, scale * h, scale * w), rounded down."""
        for index, double in enumerate(self.doublings):
            if index:
                feature_map = self.act(self.norms[index - 1](feature_map.movedim(1, -1))).movedim(-1, 1)
            feature_map = double(feature_map)
        return F.max_pool2d(feature_map, self.pool) if self.pool > 1 else feature_map


class MAEBackbone(BackboneMixin, MAEPreTrainedModel):
    """The encoder as a source of feature maps for dense heads; its stages are the transformer blocks.

    `out_indices=[4, 6, 8, 12]` gives the maps after blocks 4, 6, 8 and 12 (0 is the embedding), all with the patch's
    stride and without a final LayerNorm. `pyramid_scales=[4, 2, 1, 0.5]` gives them strides 4, 8, 16 and 32 (with
    patches of 16 pixels) by layers that no pretraining has trained; with a single one of `out_indices`, all from that
    map. Images of any size that the patch divides are accepted.
    """

    _keys_to_ignore_on_load_unexpected = [r"^decoder\.", r"^(mae\.)?norm\."]

    def __init__(self, config: MAEConfig):
        super().__init__(config)
        self.num_features = [config.hidden_size] * (config.num_hidden_layers + 1)
        self.embeddings = MAEEmbeddings(config)
        self.layers = encoder_layers(config)
        scales = config.pyramid_scales or []
        self._check_pyramid(scales)
        self.pyramid = nn.ModuleList(MAERescale(config, scale) for scale in scales)
        self.post_init()

    def _check_pyramid(self, scales: Sequence[float]) -> None:
        if any(scale <= 0 or math.log2(scale) % 1 for scale in scales):
            raise ValueError(f"pyramid_scales {scales} are not all powers of two; give e.g. [4, 2, 1, 0.5]")
        if scales and len(self.out_features) not in (1, len(scales)):
            raise ValueError(
                f"pyramid_scales {scales} don't go with the {len(self.out_features)} maps of out_indices "
                f"{self.out_indices}; give as many, or one that all come from"
            )
        if scales and not self.config.reshape_hidden_states:
            raise ValueError("pyramid_scales need maps, reshape_hidden_states False gives tokens; leave one out")

    @property
    def channels(self) -> list[int]:
        """Width of each feature map."""
        return [self.config.hidden_size] * (len(self.pyramid) or len(self.out_features))

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, pixel_values: torch.Tensor, **kwargs: Unpack[MAEKwargs]
    ) -> BackboneOutput:
        """Feature maps (B, D, H/P, W/Q), one for each of `out_features` (tokens with `reshape_hidden_states=False`).

        With `pyramid_scales` they are (B, D, scale * H/P, scale * W/Q), one for each scale.

        Args:
            pixel_values: (B, C, H, W) normalised pixels, H and W multiples of the patch.
            **kwargs: `output_hidden_states`, `output_attentions`, `return_dict`.
        """
        _refuse_unknown(self, kwargs)
        h, w = self._check_pixels(pixel_values, interpolate_pos_encoding=True)
        hidden_states = self.embeddings(pixel_values)
        stages = [hidden_states]
        for layer in self.layers:
            hidden_states = layer(hidden_states)
            stages.append(hidden_states)
        maps = [stages[self.stage_names.index(name)] for name in self.out_features]
        if self.config.reshape_hidden_states:
            maps = [tokens[:, 1:].transpose(1, 2).unflatten(2, (h, w)).contiguous() for tokens in maps]
        if self.pyramid:
            sources = maps * len(self.pyramid) if len(maps) == 1 else maps
            maps = [rescale(source) for rescale, source in zip(self.pyramid, sources, strict=True)]
        return BackboneOutput(feature_maps=tuple(maps))


def mae_vit_tiny(**config_overrides: Any) -> MAEForPreTraining:
    """MAE with a ViT-Ti encoder, random weights; keys of `MAEConfig` override the table of sizes."""
    return MAEForPreTraining(MAEConfig(**{**SIZES["tiny"], **config_overrides}))


def mae_vit_small(**config_overrides: Any) -> MAEForPreTraining:
    """MAE with a ViT-S encoder, random weights; keys of `MAEConfig` override the table of sizes."""
    return MAEForPreTraining(MAEConfig(**{**SIZES["small"], **config_overrides}))


def mae_vit_base(**config_overrides: Any) -> MAEForPreTraining:
    """MAE with a ViT-B encoder, random weights; keys of `MAEConfig` override the table of sizes."""
    return MAEForPreTraining(MAEConfig(**{**SIZES["base"], **config_overrides}))


def mae_vit_large(**config_overrides: Any) -> MAEForPreTraining:
    """MAE with a ViT-L encoder, random weights; keys of `MAEConfig` override the table of sizes."""
    return MAEForPreTraining(MAEConfig(**{**SIZES["large"], **config_overrides}))


def mae_vit_huge(**config_overrides: Any) -> MAEForPreTraining:
    """MAE with a ViT-H/14 encoder, random weights; keys of `MAEConfig` override the table of sizes."""
    return MAEForPreTraining(MAEConfig(**{**SIZES["huge"], **config_overrides}))


__all__ = [
    "MAEBackbone",
    "MAEForImageClassification",
    "MAEForPreTraining",
    "MAEForPreTrainingOutput",
    "MAEModel",
    "MAEModelOutput",
    "MAEPreTrainedModel",
    "mae_vit_base",
    "mae_vit_huge",
    "mae_vit_large",
    "mae_vit_small",
    "mae_vit_tiny",
    "patchify",
    "unpatchify",
]
