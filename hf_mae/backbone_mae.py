"""The encoder as a source of feature maps for detection, segmentation and depth."""

# Shape letters in this file
#   B images   C channels   H, W pixels   P, Q patch height and width in pixels   h, w patch grid   N = h*w
#   D encoder width

import math
from collections.abc import Sequence
from typing import Unpack

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_outputs import BackboneOutput
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_mae import MAEConfig
from .layers_mae import MAEEmbeddings, encoder_layers
from .modeling_mae import MAEKwargs, MAEPreTrainedModel


class MAERescale(nn.Module):
    """Rescale a feature map by a power of two, keeping its width D (arXiv:2203.16527, Fig. 2).

    Transposed convolutions double the resolution, with LayerNorm and activation in between; max pooling lowers it.
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

    For a model of 12 blocks, `out_indices=[4, 6, 8, 12]` gives the maps after blocks 4, 6, 8 and 12 (0 is the
    embedding). Without it, there is one map, after the last block. All maps have the patch's stride and no final
    LayerNorm. `pyramid_scales=[4, 2, 1, 0.5]` gives them strides 4, 8, 16 and 32 (with patches of 16 pixels) by new,
    untrained layers; with a single index, all maps come from that block. The image size can be any multiple of the
    patch size.

    Raises:
        ValueError: if `pyramid_scales` is set and `out_indices` has neither one entry nor one per scale, or if
            `reshape_hidden_states` is False.
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
        if scales and len(self.out_features) not in (1, len(scales)):
            raise ValueError(
                f"pyramid_scales {scales} don't match the {len(self.out_features)} maps of out_indices "
                f"{self.out_indices}; give one index per scale, or a single index for all"
            )
        if scales and not self.config.reshape_hidden_states:
            raise ValueError("pyramid_scales needs maps, but reshape_hidden_states False gives tokens; leave one out")

    @property
    def channels(self) -> list[int]:
        """Width D of each feature map."""
        return [self.config.hidden_size] * (len(self.pyramid) or len(self.out_features))

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, pixel_values: torch.Tensor, **kwargs: Unpack[MAEKwargs]
    ) -> BackboneOutput:
        """Encode images; no patch is removed.

        Args:
            pixel_values: (B, C, H, W) normalised pixels, H and W multiples of the patch.
            **kwargs: `output_hidden_states`, `output_attentions`, `return_dict`.

        Returns:
            `feature_maps`: one (B, D, h, w) for each of `out_indices`; with `pyramid_scales`, one
            (B, D, scale * h, scale * w) for each scale; with `reshape_hidden_states=False`, tokens (B, 1 + N, D).

        Raises:
            ValueError: if channels or sizes don't fit; the message names both values and the remedy.
            TypeError: for an unknown argument.
        """
        self._known(kwargs)
        grid_size = self.config.patch_grid(pixel_values.shape)
        hidden_states = self.embeddings(pixel_values, grid_size)
        stages = [hidden_states]
        for layer in self.layers:
            hidden_states = layer(hidden_states)
            stages.append(hidden_states)
        maps = [stages[self.stage_names.index(name)] for name in self.out_features]
        if self.config.reshape_hidden_states:
            maps = [tokens[:, 1:].transpose(1, 2).unflatten(2, grid_size).contiguous() for tokens in maps]
        if self.pyramid:
            sources = maps * len(self.pyramid) if len(maps) == 1 else maps
            maps = [rescale(source) for rescale, source in zip(self.pyramid, sources, strict=True)]
        return BackboneOutput(feature_maps=tuple(maps))
