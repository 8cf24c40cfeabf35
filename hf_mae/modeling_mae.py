"""Masked autoencoder (He et al., arXiv:2111.06377): the encoder, and its pretraining.

Images become patches and masks in masking_mae.py; the layers are in layers_mae.py. Fine-tuning continues in
classifier_mae.py and backbone_mae.py.
"""

# Shape letters in this file
#   B images   C channels   H, W pixels   P, Q patch height and width in pixels   V = P*Q*C numbers in a patch
#   h, w patch grid   N = h*w patches per image   K kept patches   M predicted patches   D encoder width

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

import torch
import torch.nn.functional as F
from torch import nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import logging
from transformers.utils.generic import ModelOutput, can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_mae import SIZES, MAEConfig
from .hub_code_mae import SavedWithCode
from .layers_mae import (
    MAEAttention,
    MAECrossDecoder,
    MAEDecoder,
    MAEEmbeddings,
    MAELayer,
    MAEPatchEmbed,
    MAEPositions,
    encoder_layers,
    initialize,
)
from .masking_mae import ChosenPatches, choose_patches, eval_noise, gather_tokens, normalize_patches, one_mask, patchify

logger = logging.get_logger(__name__)


class MAEKwargs(TypedDict, total=False):
    """Keyword arguments of every `forward`, besides its own arguments and transformers' `return_dict`."""

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
        hidden_states: with `output_hidden_states`, one more tensor than there are layers, each shaped like
            `last_hidden_state`: the input of every layer, then the output of the last, before the last LayerNorm.
        attentions: with `output_attentions` and the eager attention, one tensor for each layer: (B, heads, 1 + N,
            1 + N) weights in [0, 1], with K instead of N if patches were removed.
        features: with `config.decoder_fusion` and a mask, what the decoder reads: the input of every layer, then
            `last_hidden_state`, each (B, 1 + K, D).
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
        loss: mean squared error on the removed patches (Sec. 3, "Reconstruction target"), or on those selected by
            `config.prediction_ratio`.
        logits: (B, N, V) predicted patches, in image order. The "self" decoder predicts visible ones too. The
            "cross" decoder leaves zeros in visible patches and, in training, in removed patches that
            `config.prediction_ratio` leaves out.
        mask: (B, N) 1 = removed, 0 = kept.
        ids_restore: (B, N) index that puts a shuffled sequence back in image order.
        hidden_states: those of the encoder, as in `MAEModelOutput`: each (B, 1 + K, D).
        attentions: those of the encoder, as in `MAEModelOutput`: each (B, heads, 1 + K, 1 + K).
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    ids_restore: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class MAEPreTrainedModel(SavedWithCode, PreTrainedModel):  # pyright: ignore[reportIncompatibleVariableOverride]
    """What all MAE models share: initial values, and loading at another image size or channel count."""

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
    # Encoder, classifier and backbone ignore the decoder's weights in the file, without a warning.
    _keys_to_ignore_on_load_unexpected = [r"^decoder\."]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        initialize(module, self.config)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: Any, *model_args: Any, config: Any = None, **kwargs: Any
    ) -> Any:
        """Load like any transformers model, optionally at another `image_size` or with other `num_channels`.

        The checkpoint is loaded at its own size and then changed by `resize_input`, so all weights are kept.

        Args:
            pretrained_model_name_or_path: folder or Hub id of the model.
            *model_args: as in transformers.
            config: configuration to use instead of the stored one.
            **kwargs: as in transformers; keys of the configuration override the stored ones.

        Raises:
            OSError: if there is no model.
            ValueError: if the model isn't an MAE of this package, or a key is out of range.
        """
        if pretrained_model_name_or_path is None or kwargs.get("state_dict") is not None:
            return super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)
        stored = MAEConfig.of_checkpoint(pretrained_model_name_or_path, **kwargs)
        own = {key: getattr(stored, key) for key in ("image_size", "num_channels")}
        if isinstance(config, PreTrainedConfig):
            target = {key: getattr(config, key) for key in own}
            config = copy.deepcopy(config)
            config.update(own)
        else:
            target = {key: kwargs.pop(key, value) for key, value in own.items()}
        loaded = super().from_pretrained(pretrained_model_name_or_path, *model_args, config=config, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded).resize_input(**target)
        return loaded

    def resize_input(
        self, image_size: int | list[int] | tuple[int, int] | None = None, num_channels: int | None = None
    ) -> None:
        """Change the model to another image size or number of channels, in place.

        Position tables follow `config.position_resize`. Each new channel starts with the mean of the old channels'
        filters, scaled to keep the sum over channels. For each, the decoder predicts the mean of its predictions for
        the old channels.

        Args:
            image_size: size in pixels, one side or (height, width); unchanged when omitted.
            num_channels: number of image channels, 1 or more; unchanged when omitted.

        Raises:
            ValueError: if the size is not a multiple of the patch size, doesn't fit the mask settings, or
                `num_channels` is below 1.
        """
        new = copy.deepcopy(self.config)
        if image_size is not None:
            new.image_size = list(image_size) if isinstance(image_size, tuple) else image_size
        if num_channels is not None:
            new.num_channels = num_channels
        new.check()
        self.config.image_size, self.config.num_channels = new.image_size, new.num_channels
        for module in self.modules():
            if isinstance(module, MAEPositions | MAEPatchEmbed | MAEDecoder):
                module.follow(new)

    def _known(self, kwargs: Mapping[str, Any], *ignored: str) -> dict[str, Any]:
        """The keyword arguments that the encoder knows.

        Those that are None or `ignored` are left out: peft passes all arguments of a language model. A misspelt one is
        a TypeError.
        """
        given = {name: value for name, value in kwargs.items() if value is not None and name not in ignored}
        if unknown := sorted(given.keys() - {*MAEKwargs.__annotations__, "return_dict", "use_cache"}):
            raise TypeError(f"{type(self).__name__}.forward() got an unexpected keyword argument '{unknown[0]}'")
        return given

    def _patch_grid(self, pixel_values: torch.Tensor, other_size: bool = False) -> tuple[int, int]:
        """The patch grid (h, w) of a batch; a warning, once, if it isn't the model's and that is not expected."""
        grid_size = self.config.patch_grid(pixel_values.shape)
        if not other_size and grid_size != self.config.grid_size and not torch.compiler.is_compiling():
            size = "{}x{}".format(*self.config.image_height_width)
            logger.warning_once(
                f"images of another size than {size}, the model's: its positions are resized for them. Load the model "
                "with their image_size, or pass interpolate_pos_encoding=True if that is meant"
            )
        return grid_size


class MAEModel(MAEPreTrainedModel):
    """The encoder. Without `mask_ratio`, `noise`, `mask` or `generator` it sees every patch, deterministically."""

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
        chosen: ChosenPatches | None = None,
        **kwargs: Unpack[MAEKwargs],
    ) -> MAEModelOutput:
        """Encode images.

        Args:
            pixel_values: (B, C, H, W) normalised pixels.
            mask_ratio: fraction of patches to remove, in [0, 1).
            noise: (B, N) sort keys, e.g. from U[0, 1): the K patches with the smallest are kept. With `mask_cell`
                above 1, a cell takes the key of its first patch.
            mask: (B, N) the caller's own choice, 1 = removed, 0 = kept; all rows keep the same number.
            generator: random generator that draws the noise.
            bool_masked_pos: another name for `mask`, used by transformers' masked-image scripts.
            interpolate_pos_encoding: don't warn about images whose size differs from `config.image_size`.
            chosen: the patches to encode, as `choose_patches` returns them, instead of the masking arguments.
            **kwargs: `output_hidden_states`, `output_attentions`, `return_dict`.

        Raises:
            ValueError: if channels, sizes or masks don't fit; the message names both values and the remedy.
            TypeError: for an unknown argument.
        """
        self._known(kwargs, "num_items_in_batch")
        if chosen is None:
            grid_size = self._patch_grid(pixel_values, interpolate_pos_encoding)
            mask = one_mask(mask, bool_masked_pos)
            chosen = choose_patches(self.config, pixel_values, grid_size, mask_ratio, noise, mask, generator)
        elif any(given is not None for given in (mask_ratio, noise, mask, bool_masked_pos, generator)):
            raise ValueError("chosen can't be combined with mask_ratio, noise, mask, bool_masked_pos or generator")
        hidden_states = self.embeddings(pixel_values, chosen.grid_size, chosen.ids_keep)
        features: list[torch.Tensor] = []
        fused = self.config.decoder_fusion and chosen.ids_keep is not None
        for layer in self.layers:
            if fused:
                features.append(hidden_states)
            hidden_states = layer(hidden_states)
        hidden_states = self.norm(hidden_states)
        pooled = hidden_states[:, 0] if self.config.pooling == "cls" else hidden_states[:, 1:].mean(dim=1)
        return MAEModelOutput(
            last_hidden_state=hidden_states,
            pooler_output=pooled,
            mask=chosen.mask,
            ids_restore=chosen.ids_restore,
            features=(*features, hidden_states) if fused else None,
        )


class MAEForPreTraining(MAEPreTrainedModel):
    """Encoder and decoder (`config.decoder_attention`): predicts the pixels of removed patches."""

    # The loss is always a mean over the batch, so a Trainer must average accumulated steps.
    accepts_loss_kwargs = False

    def __init__(self, config: MAEConfig):
        super().__init__(config)
        self.mae = MAEModel(config)
        self.decoder = MAECrossDecoder(config) if config.decoder_attention == "cross" else MAEDecoder(config)
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
        return_loss: bool | None = True,
        no_data: torch.Tensor | None = None,
        **kwargs: Unpack[MAEKwargs],
    ) -> MAEForPreTrainingOutput:
        """Remove patches, encode the rest, predict pixels.

        Args:
            pixel_values: (B, C, H, W) normalised pixels.
            mask_ratio: fraction of patches to remove, in [0, 1); `config.mask_ratio` when omitted.
            noise: (B, N) sort keys, drawn at random when omitted. Evaluation draws them by `config.eval_mask_seed`, the
                same for each batch.
            mask: (B, N) 1 = removed, 0 = kept; all removed patches are predicted, ignoring `config.prediction_ratio`.
            generator: random generator that draws the noise.
            bool_masked_pos: another name for `mask`.
            interpolate_pos_encoding: don't warn about images whose size differs from `config.image_size`.
            return_loss: compute the loss. A stock Trainer evaluates without labels only if `forward` has this argument.
            no_data: (B, N) True = a patch without data, which is left out of the loss.
            **kwargs: as for `MAEModel`; hidden states and attentions are the encoder's. `labels` are ignored.

        Raises:
            ValueError: as for `MAEModel`, and if no patch is removed.
            TypeError: as for `MAEModel`.
        """
        # Trainer and peft pass labels if the data has some. A parameter would tell Trainer to look for them.
        known = self._known(kwargs, "labels", "num_items_in_batch")
        grid_size = self._patch_grid(pixel_values, interpolate_pos_encoding)
        mask = one_mask(mask, bool_masked_pos)
        if mask is None:
            mask_ratio = self.config.mask_ratio if mask_ratio is None else mask_ratio
            if noise is None and generator is None and not self.training:
                noise = eval_noise(self.config, pixel_values, grid_size)
        chosen = choose_patches(self.config, pixel_values, grid_size, mask_ratio, noise, mask, generator)
        # return_dict=True also overrides a False in the config.
        encoded = self.mae(pixel_values, chosen=chosen, **known | {"return_dict": True})
        ids = self.predicted_patches(chosen, partly=self.training and mask is None)
        logits = self.decode(encoded, chosen, ids)
        loss = self.reconstruction_loss(pixel_values, logits, ids, no_data) if return_loss is not False else None
        return MAEForPreTrainingOutput(
            loss=loss,
            logits=logits,
            mask=chosen.mask,
            ids_restore=chosen.ids_restore,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )

    def decode(self, encoded: MAEModelOutput, chosen: ChosenPatches, ids: torch.Tensor) -> torch.Tensor:
        """Predict pixels from the encoder's output.

        Args:
            encoded: output of `MAEModel` for these patches.
            chosen: the patches that were encoded.
            ids: (B, M) indices of the patches that the "cross" decoder predicts; the "self" decoder predicts all.

        Returns:
            (B, N, V) predicted patches in image order; zeros in patches that are not predicted.
        """
        if self.config.decoder_attention == "cross":
            return self.decoder(encoded.features or encoded.last_hidden_state, ids, chosen.grid_size)
        return self.decoder(encoded.last_hidden_state, chosen.ids_restore, chosen.grid_size)

    def patch_target(self, pixel_values: torch.Tensor, ids: torch.Tensor | None = None) -> torch.Tensor:
        """What the decoder should predict.

        Args:
            pixel_values: (B, C, H, W) normalised pixels.
            ids: (B, M) indices of patches; all patches when omitted.

        Returns:
            (B, N, V) float32 true patches, or (B, M, V) with `ids`; each has mean 0 and variance 1 with
            `config.norm_pix_loss`.
        """
        target = patchify(pixel_values.float(), self.config.patch_height_width, ids)
        return normalize_patches(target) if self.config.norm_pix_loss else target

    def predicted_patches(self, chosen: ChosenPatches, partly: bool = False) -> torch.Tensor:
        """(B, M) indices of the patches that the loss covers: all removed ones.

        With `partly`, M is only the fraction `config.prediction_ratio` of N: the removed patches with the smallest
        noise, so one noise tensor determines both the mask and these patches.
        """
        assert chosen.ids_shuffle is not None
        kept, end = chosen.ids_keep.shape[1], chosen.ids_shuffle.shape[1]
        if partly and self.config.prediction_ratio is not None:
            end = min(end, kept + end - self.config.num_kept_patches(self.config.prediction_ratio, chosen.grid_size))
        return chosen.ids_shuffle[:, kept:end]

    def reconstruction_loss(
        self, pixel_values: torch.Tensor, logits: torch.Tensor, ids: torch.Tensor, no_data: torch.Tensor | None = None
    ) -> torch.Tensor:
        """() float32 mean squared error over the pixels of the patches `ids` (Sec. 3, "Reconstruction target").

        Other patches are dropped before anything is computed, so they cost nothing and get no gradient.

        Args:
            pixel_values: (B, C, H, W) normalised pixels.
            logits: (B, N, V) predicted patches.
            ids: (B, M) indices of the patches that count.
            no_data: (B, N) True = a patch that doesn't count after all; the loss is 0 if none of `ids` counts.

        Raises:
            ValueError: if M is 0.
        """
        if ids.shape[1] == 0:
            raise ValueError("mask_ratio 0 removes no patch, so there is nothing to predict; use e.g. 0.75")
        predicted, target = gather_tokens(logits, ids).float(), self.patch_target(pixel_values, ids)
        if no_data is None:
            return F.mse_loss(predicted, target)
        counts = ~no_data.gather(1, ids)
        error = F.mse_loss(predicted, target, reduction="none").mean(dim=-1)
        return (error * counts).sum() / counts.sum().clamp(min=1)


def mae_vit_tiny(**config_overrides: Any) -> MAEForPreTraining:
    """MAE with a ViT-Ti encoder and random weights; `config_overrides` are keys of `MAEConfig`."""
    return MAEForPreTraining(MAEConfig(**{**SIZES["tiny"], **config_overrides}))


def mae_vit_small(**config_overrides: Any) -> MAEForPreTraining:
    """MAE with a ViT-S encoder and random weights; `config_overrides` are keys of `MAEConfig`."""
    return MAEForPreTraining(MAEConfig(**{**SIZES["small"], **config_overrides}))


def mae_vit_base(**config_overrides: Any) -> MAEForPreTraining:
    """MAE with a ViT-B encoder and random weights; `config_overrides` are keys of `MAEConfig`."""
    return MAEForPreTraining(MAEConfig(**{**SIZES["base"], **config_overrides}))


def mae_vit_large(**config_overrides: Any) -> MAEForPreTraining:
    """MAE with a ViT-L encoder and random weights; `config_overrides` are keys of `MAEConfig`."""
    return MAEForPreTraining(MAEConfig(**{**SIZES["large"], **config_overrides}))


def mae_vit_huge(**config_overrides: Any) -> MAEForPreTraining:
    """MAE with a ViT-H/14 encoder and random weights; `config_overrides` are keys of `MAEConfig`."""
    return MAEForPreTraining(MAEConfig(**{**SIZES["huge"], **config_overrides}))
