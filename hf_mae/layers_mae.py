"""The layers in the order of the data flow: positions, embedding, blocks, decoders; then their initial values."""

# Shape letters in this file
#   B images   C channels   H, W pixels   P, Q patch height and width in pixels   V = P*Q*C numbers in a patch
#   h, w patch grid   N = h*w patches per image   K kept patches   M predicted patches
#   D encoder width   E decoder width

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_mae import MAEConfig
from .masking_mae import gather_tokens, patchify

MOST_TABLES = 8  # of other patch grids: detection has a new grid in nearly every step


def sincos_table(grid_size: tuple[int, int], width: int, device: torch.device | str | None = None) -> torch.Tensor:
    """Fixed 2-D sine-cosine positions, with a zero row for the class token first.

    The first half of the columns encodes the position along the width, as in the released weights. Each half holds
    sines, then cosines, of the position times 10000^(-i / (width / 4)).

    Args:
        grid_size: (h, w) patches.
        width: width of the tokens, a multiple of 4.
        device: device of the table.

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
    it exact. With `trainable` it is a parameter with the same name.

    The tables of a few other patch grids are kept, as long as this one stays the same.
    """

    def __init__(self, config: MAEConfig, width: int, trainable: bool = False):
        super().__init__()
        self.config = config
        self.grid_size = config.grid_size
        self.others: dict[tuple[int, int], tuple[Any, torch.Tensor]] = {}  # patch grid -> `_state`, table
        self.table: torch.Tensor
        table = sincos_table(self.grid_size, width)
        if trainable:
            self.table = nn.Parameter(table)
        else:
            self.register_buffer("table", table)

    def forward(self, grid_size: tuple[int, int]) -> torch.Tensor:
        """(1 + h*w, width) table for a patch grid (h, w); for a grid not its own, by `config.position_resize`."""
        if grid_size == self.grid_size:
            return self.table
        if self.table.requires_grad or torch.compiler.is_compiling():
            return self._resized(grid_size)  # part of the graph
        state = self._state()
        known, table = self.others.get(grid_size, (None, self.table))
        if known != state:
            with torch.inference_mode(False), torch.no_grad():
                table = self._resized(grid_size)
            if len(self.others) >= MOST_TABLES:
                self.others.clear()
            self.others[grid_size] = state, table
        return table

    def _state(self) -> tuple[Any, ...]:
        """What the tables of other grids are made from; it differs after every change of this one."""
        table = self.table
        version = None if table.is_inference() else table._version
        return table.data_ptr(), version, table.device, table.dtype, self.grid_size, self.config.position_resize

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"others": {}}

    def follow(self, config: MAEConfig) -> None:
        """Change permanently to the patch grid of `config`."""
        if config.grid_size != self.grid_size:
            self.table.data = self._resized(config.grid_size).detach()
            self.grid_size = config.grid_size

    def _resized(self, grid_size: tuple[int, int]) -> torch.Tensor:
        how, width = self.config.position_resize, self.table.shape[1]
        if how == "auto":
            # The tolerance accepts a table that was once rounded to bfloat16.
            exact = sincos_table(self.grid_size, width, self.table.device)
            how = "sincos" if torch.allclose(self.table.float(), exact, rtol=0, atol=5e-3) else "interpolate"
        return sincos_table(grid_size, width, self.table.device) if how == "sincos" else self._interpolated(grid_size)

    def _interpolated(self, grid_size: tuple[int, int]) -> torch.Tensor:
        (h, w), width = self.grid_size, self.table.shape[1]
        patches = self.table[1:].float().T.reshape(1, width, h, w)
        patches = F.interpolate(patches, size=grid_size, mode="bicubic", align_corners=False)
        return torch.cat([self.table[:1].float(), patches.reshape(width, -1).T])


class MAEPatchEmbed(nn.Module):
    """Linear projection of patches; its weight has a convolution's shape (D, C, P, Q), as in every ViT.

    Not an `nn.Conv2d`: programs that replace convolutions would put a layer here that expects images.
    """

    def __init__(self, config: MAEConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.hidden_size, config.num_channels, *config.patch_height_width))
        self.bias = nn.Parameter(torch.empty(config.hidden_size))
        # A convolution's defaults, for a layer built alone. Keep these draws: a model's initial weights depend on them.
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        bound = self.weight[0].numel() ** -0.5
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """(B, K, V) patches -> (B, K, D) tokens. It takes patches, not images, so removed patches cost nothing."""
        return F.linear(patches, self.weight.permute(0, 2, 3, 1).flatten(1), self.bias)

    def follow(self, config: MAEConfig) -> None:
        """Change permanently to the channels of `config`: each gets the mean filter, scaled to keep the sum."""
        old, new = self.weight.shape[1], config.num_channels
        if old != new:
            mean = self.weight.data.mean(1, keepdim=True) * (old / new)
            self.weight.data = mean.expand(-1, new, -1, -1).contiguous()

    def extra_repr(self) -> str:
        D, C, P, Q = self.weight.shape
        return f"{D}, channels={C}, patch={P}x{Q}"


class MAEEmbeddings(nn.Module):
    """Images -> class token and the tokens of the kept patches, with positions."""

    def __init__(self, config: MAEConfig):
        super().__init__()
        self.config = config
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.patch_embed = MAEPatchEmbed(config)
        self.position_embeddings = MAEPositions(config, config.hidden_size, config.trainable_positions)

    def forward(
        self, pixel_values: torch.Tensor, grid_size: tuple[int, int], ids_keep: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(B, C, H, W) images of h x w patches -> (B, 1 + K, D) tokens, the class token first.

        `ids_keep` (B, K) are the indices of the kept patches; all patches are kept when omitted.
        """
        # Cast to the parameters' dtype, so that the residual stream stays float32 under autocast.
        dtype = self.cls_token.dtype
        positions = self.position_embeddings(grid_size).to(dtype)
        class_position, patch_positions = positions[:1], positions[1:]
        if ids_keep is not None:
            patch_positions = patch_positions[ids_keep]
        tokens = self.patch_embed(patchify(pixel_values.to(dtype), self.config.patch_height_width, ids_keep))
        tokens = tokens + patch_positions
        class_token = (self.cls_token + class_position).expand(tokens.shape[0], -1, -1)
        return torch.cat([class_token, tokens], dim=1)


def eager_attention_forward(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: None, scaling: float, **_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in plain operations, with `query`, `key` and `value` (B, heads, tokens, head_dim).

    Returns:
        (B, queries, heads, head_dim) attended values.
        (B, heads, queries, keys) weights in [0, 1].
    """
    scores = query @ key.transpose(-2, -1) * scaling
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class MAEAttention(nn.Module):
    """Multi-head attention: among the tokens, or with `memory_width` from the tokens to a memory.

    The tokens are (B, tokens, width), a memory (B, other tokens, memory_width).
    """

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
        name = self.config._attn_implementation or "eager"
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
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
    """Pre-norm transformer block of the encoder or a decoder; `sizes` are (width, number of heads, MLP width)."""

    def __init__(
        self, config: MAEConfig, sizes: tuple[int, int, int], drop_path_rate: float, memory_width: int | None = None
    ):
        super().__init__()
        width, num_heads, mlp_width = sizes
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
    sizes = config.hidden_size, config.num_attention_heads, config.intermediate_size
    last = max(config.num_hidden_layers - 1, 1)
    return nn.ModuleList(
        MAELayer(config, sizes, config.drop_path_rate * index / last) for index in range(config.num_hidden_layers)
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
        sizes = E, config.decoder_num_attention_heads, config.decoder_intermediate_size
        self.decoder_layers = nn.ModuleList(
            MAELayer(config, sizes, 0, memory_width) for _ in range(config.decoder_num_hidden_layers)
        )
        self.decoder_norm = nn.LayerNorm(E, eps=config.layer_norm_eps)
        self.decoder_pred = nn.Linear(E, P * Q * config.num_channels)

    def forward(
        self, hidden_states: torch.Tensor, ids_restore: torch.Tensor, grid_size: tuple[int, int]
    ) -> torch.Tensor:
        """Predict the pixels of all patches.

        Args:
            hidden_states: (B, 1 + K, D) class token and visible tokens, in shuffled order.
            ids_restore: (B, N) index that puts a shuffled sequence back in image order.
            grid_size: (h, w) patches of the images.

        Returns:
            (B, N, V) predicted patches in image order.
        """
        tokens = self.decoder_embed(hidden_states)
        class_token, visible = tokens[:, :1], tokens[:, 1:]
        removed = ids_restore.shape[1] - visible.shape[1]
        mask_tokens = self.mask_token.to(tokens.dtype).expand(tokens.shape[0], removed, -1)
        patches = gather_tokens(torch.cat([visible, mask_tokens], dim=1), ids_restore)
        positions = self.decoder_pos_embed(grid_size).to(self.mask_token.dtype)
        hidden_states = torch.cat([class_token, patches], dim=1) + positions
        for layer in self.decoder_layers:
            hidden_states = layer(hidden_states)
        return self.decoder_pred(self.decoder_norm(hidden_states))[:, 1:]

    def follow(self, config: MAEConfig) -> None:
        """Change permanently to the channels of `config`: each starts as the mean of the old channels' predictions."""
        P, Q = config.patch_height_width
        out_features = P * Q * config.num_channels
        if self.decoder_pred.out_features != out_features:
            for parameter in (self.decoder_pred.weight, self.decoder_pred.bias):
                by_pixel = parameter.data.view(P * Q, -1, *parameter.shape[1:]).mean(1, keepdim=True)
                by_pixel = by_pixel.expand(-1, config.num_channels, *parameter.shape[1:])
                parameter.data = by_pixel.reshape(out_features, *parameter.shape[1:])
            self.decoder_pred.out_features = out_features


class MAEFeatureFusion(nn.Module):
    """A learned sum of the encoder's features for each decoder block (CrossMAE, "Inter-block attention")."""

    def __init__(self, config: MAEConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.decoder_num_hidden_layers, config.num_hidden_layers + 1))
        self.norms = nn.ModuleList(nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) for _ in self.weight)

    def forward(self, features: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        """Outputs (B, 1 + K, D) of the embedding and of each encoder block -> one (B, 1 + K, D) per decoder block."""
        fused = self.weight @ torch.stack(features).flatten(1)
        return [norm(memory.view_as(features[0])) for norm, memory in zip(self.norms, fused, strict=True)]


class MAECrossDecoder(MAEDecoder):
    """Predict each requested patch alone, by cross-attention to the visible tokens (CrossMAE, arXiv:2401.14391).

    A query is a mask token with its position. Queries don't see each other, so each prediction is independent.
    """

    def __init__(self, config: MAEConfig):
        super().__init__(config, memory_width=config.hidden_size)
        self.fusion = MAEFeatureFusion(config) if config.decoder_fusion else None

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, memory: torch.Tensor | tuple[torch.Tensor, ...], ids: torch.Tensor, grid_size: tuple[int, int]
    ) -> torch.Tensor:
        """Predict the pixels of the requested patches.

        Args:
            memory: (B, 1 + K, D) class token and visible tokens, in any order. With `config.decoder_fusion`, a tuple of
                them: the outputs of the encoder's embedding and of each block.
            ids: (B, M) indices of the patches to predict.
            grid_size: (h, w) patches of the images.

        Returns:
            (B, N, V) predicted patches in image order; zeros in patches that are not in `ids`.
        """
        shape = (ids.shape[0], grid_size[0] * grid_size[1], self.decoder_pred.out_features)
        if ids.shape[1] == 0:
            return self.mask_token.new_zeros(shape)  # attention can't take zero queries
        positions = self.decoder_pos_embed(grid_size)[1:].to(self.mask_token.dtype)
        hidden_states = self.mask_token + positions[ids]
        memories = [memory] * len(self.decoder_layers) if self.fusion is None else self.fusion(memory)
        for layer, one in zip(self.decoder_layers, memories, strict=True):
            hidden_states = layer(hidden_states, one)
        predicted = self.decoder_pred(self.decoder_norm(hidden_states))
        return predicted.new_zeros(shape).scatter(1, ids.unsqueeze(-1).expand_as(predicted), predicted)


def initialize(module: nn.Module, config: MAEConfig) -> None:
    """Give one layer the original's initial values; transformers' `init` leaves loaded weights unchanged."""
    if isinstance(module, MAEPatchEmbed):
        # As in the original: Xavier on (D, V), as for a linear layer, but the bias of a convolution.
        fan_in, fan_out = module.weight[0].numel(), module.weight.shape[0]
        bound = (6 / (fan_in + fan_out)) ** 0.5
        init.uniform_(module.weight, -bound, bound)
        init.uniform_(module.bias, -(fan_in**-0.5), fan_in**-0.5)
    elif isinstance(module, nn.ConvTranspose2d):
        # Stride and kernel are equal, so each pixel is the output of a linear layer: Xavier for that layer.
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
        init.normal_(module.cls_token, std=config.initializer_range)
    elif isinstance(module, MAEDecoder):
        init.normal_(module.mask_token, std=config.initializer_range)
    elif isinstance(module, MAEFeatureFusion):
        init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)
    elif isinstance(module, MAEPositions):
        # Repeated here, because loading on the meta device loses what the constructor wrote.
        init.copy_(module.table, sincos_table(module.grid_size, module.table.shape[1]).to(module.table.dtype))
