"""Every number that shapes a masked autoencoder, and the table of sizes (arXiv:2111.06377)."""

# No `from __future__ import annotations` here: it would turn off the type checks of `strict`.
import math
from collections.abc import Sequence
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import PreTrainedConfig

from .hub_code_mae import NamesCode

# Encoders: base, large and huge as in the paper (Sec. 4), tiny and small as in DeiT (arXiv:2012.12877).
# The decoder is the paper's default for all of them: 8 blocks, 512 wide, 16 heads (Table 1a and 1b).
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768},
    "small": {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    "huge": {
        "hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "intermediate_size": 5120,
        "patch_size": 14,
    },
}  # fmt: skip

# Far above every real model's, so that absurd values are refused before they exhaust memory.
MOST = {
    "hidden_size": 2**15, "num_hidden_layers": 1024, "num_attention_heads": 2**15, "intermediate_size": 2**17,
    "image_size": 2**16, "patch_size": 2**16, "num_channels": 2**14, "num_labels": 2**20, "mask_cell": 2**16,
}  # fmt: skip
MOST |= {f"decoder_{key}": MOST[key] for key in [*MOST][:4]}
MOST_PATCHES, MOST_SCALE = 2**22, 64


@strict
class MAEConfig(NamesCode, BackboneConfigMixin, PreTrainedConfig):
    """Configuration of an MAE; the defaults are ViT-B/16 with the paper's decoder.

    Keys have the names of transformers' `ViTMAEConfig` wherever it has the same setting.

    Args:
        hidden_size: encoder width D, a multiple of 4 (for the sin-cos positions) and of `num_attention_heads`.
        num_hidden_layers: number of encoder blocks.
        num_attention_heads: number of attention heads in each encoder block.
        intermediate_size: width of the encoder's MLPs (4 D in the paper).
        hidden_act: activation function of all MLPs, by its name in transformers.
        layer_norm_eps: epsilon of every LayerNorm (1e-6 in the original).
        initializer_range: standard deviation of the initial class and mask tokens.
        qkv_bias: whether the attention's query, key and value projection has a bias.
        drop_path_rate: stochastic depth of the last encoder block, in [0, 1); rises linearly from 0 at the first block.
            0 in pretraining, 0.1 to 0.3 in fine-tuning (Table 9).
        image_size: size in pixels, one side or (height, width).
        patch_size: size in pixels, one side or (height, width); must divide `image_size`.
        num_channels: C, number of image channels, 1 or more.
        decoder_hidden_size: decoder width E, a multiple of 4 and of `decoder_num_attention_heads` (Table 1b).
        decoder_num_hidden_layers: number of decoder blocks (Table 1a).
        decoder_num_attention_heads: number of attention heads in each decoder block.
        decoder_intermediate_size: width of the decoder's MLPs.
        decoder_attention: "self": self-attention over visible and mask tokens, as in the paper; "cross": each mask
            token attends to visible tokens only, and only removed patches are predicted (CrossMAE, arXiv:2401.14391).
        decoder_fusion: with "cross", each decoder block reads its own learned sum of the outputs of the encoder's
            embedding and blocks, instead of the last block's output ("inter-block attention" in CrossMAE).
        mask_ratio: fraction of patches removed in pretraining, in [0, 1) (Fig. 5).
        prediction_ratio: with "cross", the fraction of all patches predicted in training, in (0, `mask_ratio`] (0.25 in
            CrossMAE's recipe). None predicts all removed patches, and so does evaluation.
        mask_strategy: "random" patches, or "block": random rectangles (Table 1f).
        mask_cell: side, in patches, of the square cells that are kept or removed together; must divide the patch
            grid. 1 in the paper; 2 and 4 make the task harder at high resolution.
        norm_pix_loss: whether to predict pixels normalised by their patch's mean and standard deviation (Table 1d).
        eval_mask_seed: seed of the masks in evaluation, unless noise, a mask or a generator is passed. Equal masks make
            the losses of different evaluations comparable.
        pooling: which vector stands for an image: "mean" of the patch tokens, or "cls", the class token.
        head_initializer_range: std of the classifier's initial weight; 2e-5 in fine-tuning, 0.01 in linear probing.
        trainable_positions: whether to train the position tables, as the original's fine-tuning does.
        position_resize: how the tables adapt to another image size: "sincos" recomputes them, "interpolate" resamples
            them (2-D, bicubic), "auto" recomputes untouched tables and resamples trained or converted ones.
        reshape_hidden_states: whether the backbone returns maps (B, D, H/P, W/P) instead of all tokens (B, 1 + N, D).
        pyramid_scales: resolutions of the backbone's maps relative to the patch grid, powers of two. With patches of 16
            pixels, [4, 2, 1, 0.5] gives strides 4, 8, 16 and 32. `out_indices` names one block for all maps
            (arXiv:2203.16527, Fig. 2), or one for each, as for BEiT and MAE on ADE20K. None: no pyramid.

    Raises:
        ValueError: if a value is out of range or contradicts another; the message names the values and the remedy.
    """

    model_type = "mae"
    code_index, auto_class = "auto_models_mae", "AutoConfig"

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    qkv_bias: bool = True
    drop_path_rate: float | int = 0.0
    image_size: int | list[int] | tuple[int, ...] = 224
    patch_size: int | list[int] | tuple[int, ...] = 16
    num_channels: int = 3
    decoder_hidden_size: int = 512
    decoder_num_hidden_layers: int = 8
    decoder_num_attention_heads: int = 16
    decoder_intermediate_size: int = 2048
    decoder_attention: Literal["self", "cross"] = "self"
    decoder_fusion: bool = False
    mask_ratio: float | int = 0.75
    prediction_ratio: float | int | None = None
    mask_strategy: Literal["random", "block"] = "random"
    mask_cell: int = 1
    norm_pix_loss: bool = False
    eval_mask_seed: int = 0
    pooling: Literal["mean", "cls"] = "mean"
    head_initializer_range: float | int = 2e-5
    trainable_positions: bool = False
    position_resize: Literal["auto", "sincos", "interpolate"] = "auto"
    reshape_hidden_states: bool = True
    pyramid_scales: list[float | int] | tuple[float | int, ...] | None = None
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any):
        out_features, out_indices = kwargs.pop("out_features", None), kwargs.pop("out_indices", None)
        _check_most("num_labels", kwargs.get("num_labels"))  # transformers makes a name for each
        super().__post_init__(**kwargs)
        # JSON turns tuples into lists, and a config must be equal to itself after saving and loading.
        for key in ("image_size", "patch_size", "pyramid_scales"):
            if isinstance(value := getattr(self, key), tuple):
                setattr(self, key, list(value))
        self.check()
        self.stage_names = ["stem"] + [f"stage{i}" for i in range(1, self.num_hidden_layers + 1)]
        self.set_output_features_output_indices(out_features=out_features, out_indices=out_indices)

    @classmethod
    def of_checkpoint(cls, place: Any, **loading: Any) -> "MAEConfig":
        """The configuration of a saved model.

        Args:
            place: the model's folder or Hub id.
            **loading: keyword arguments of the model's `from_pretrained`, such as `revision`.

        Raises:
            OSError: if there is no configuration.
            ValueError: if the model isn't an MAE of this package.
        """
        options = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
        settings, _ = cls.get_config_dict(place, **{key: loading[key] for key in options if key in loading})
        model_type = settings.get("model_type", "mae")
        if model_type != "mae":
            raise ValueError(
                f"{place} is a model of type {model_type}, not mae; convert it: hf-mae convert {place} FOLDER"
            )
        return cls.from_dict(settings)

    def to_dict(self) -> dict[str, Any]:
        """The settings for the JSON file."""
        settings = super().to_dict()
        # What follows from num_hidden_layers is made again at loading: a script may have changed it since, and
        # transformers would refuse a file whose names of stages are those of another depth.
        stages = settings.pop("stage_names", [])
        if settings["out_features"] == stages[-1:]:
            del settings["out_features"], settings["out_indices"]
        return settings

    @property
    def image_height_width(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        return _pair(self.image_size)

    @property
    def patch_height_width(self) -> tuple[int, int]:
        """(height, width) of a patch in pixels."""
        return _pair(self.patch_size)

    @property
    def encoder_stride(self) -> int | list[int] | tuple[int, ...]:
        """Side of a patch in pixels, by the name that transformers' masked-image scripts use."""
        return self.patch_size

    @encoder_stride.setter
    def encoder_stride(self, value: int | list[int] | tuple[int, ...]) -> None:
        if _pair(value) != self.patch_height_width:
            raise ValueError(
                f"encoder_stride {value} differs from patch_size {self.patch_size}; give the same for both"
            )

    @property
    def grid_size(self) -> tuple[int, int]:
        """(h, w) patches from top to bottom and from left to right."""
        (H, W), (P, Q) = self.image_height_width, self.patch_height_width
        return H // P, W // Q

    @property
    def num_patches(self) -> int:
        """N, patches per image."""
        return self.grid_size[0] * self.grid_size[1]

    def check(self) -> None:
        """Check all values; call it after changing some.

        Raises:
            ValueError: if a value is out of range or contradicts another; the message names the values and the remedy.
        """
        for key in MOST:
            _check_most(key, getattr(self, key, None))
        sizes = [f"{part}{name}" for part in ("", "decoder_") for name in ("hidden_size", "num_hidden_layers")]
        for key in (*sizes, "intermediate_size", "decoder_intermediate_size", "num_channels"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} {getattr(self, key)} is not positive; give 1 or more")
        for key in ("layer_norm_eps", "initializer_range", "head_initializer_range", "eval_mask_seed"):
            if not 0 <= (value := getattr(self, key)) < 2**32:
                raise ValueError(f"{key} {value} lies outside [0, 2**32); give e.g. {getattr(MAEConfig, key)}")
        scales = self.pyramid_scales or []
        if not all(1 / MOST_SCALE <= scale <= MOST_SCALE and math.log2(scale).is_integer() for scale in scales):
            raise ValueError(
                f"pyramid_scales {scales} are not all powers of two from 1/{MOST_SCALE} to {MOST_SCALE}; give e.g. "
                "[4, 2, 1, 0.5]"
            )
        self._check_sizes()
        self._check_widths()
        self.num_kept_patches(self.mask_ratio)
        self._check_prediction()
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"drop_path_rate {self.drop_path_rate} lies outside [0, 1); give e.g. 0.1")

    def _check_sizes(self) -> None:
        for key in ("image_size", "patch_size"):
            value = getattr(self, key)
            if isinstance(value, list) and len(value) != 2:
                raise ValueError(f"{key} {value} has {len(value)} numbers; give one, or a height and a width")
            if min(_pair(value)) < 1:
                raise ValueError(f"{key} {value} is not positive; give 1 pixel or more")
        (H, W), (P, Q) = self.image_height_width, self.patch_height_width
        if H % P or W % Q:
            h, w = max(1, round(H / P)), max(1, round(W / Q))
            raise ValueError(
                f"image_size {H}x{W} is not a multiple of patch_size {P}x{Q}; the nearest that fits is {h * P}x{w * Q}"
            )
        if self.num_patches > MOST_PATCHES:
            raise ValueError(
                f"image_size {H}x{W} has {self.num_patches:,} patches of {P}x{Q}, more than {MOST_PATCHES:,}; give a "
                "smaller image_size or larger patches"
            )

    def _check_widths(self) -> None:
        for name in ("", "decoder_"):
            width, heads = getattr(self, f"{name}hidden_size"), getattr(self, f"{name}num_attention_heads")
            if heads < 1 or width % heads or width % 4:
                raise ValueError(
                    f"{name}hidden_size {width} must be a multiple of {name}num_attention_heads {heads}, and of 4 "
                    "for the sin-cos positions; change one of the two"
                )

    def _check_prediction(self) -> None:
        if self.decoder_attention == "self" and (self.decoder_fusion or self.prediction_ratio is not None):
            given = "decoder_fusion" if self.decoder_fusion else f"prediction_ratio {self.prediction_ratio}"
            raise ValueError(
                f"{given} needs decoder_attention cross, not self; leave it out, or change decoder_attention"
            )
        if self.prediction_ratio is not None and not 0 < self.prediction_ratio <= self.mask_ratio:
            raise ValueError(
                f"prediction_ratio {self.prediction_ratio} lies outside (0, mask_ratio {self.mask_ratio}]: only "
                "removed patches are predicted; use e.g. 0.25"
            )

    def patch_grid(self, shape: Sequence[int]) -> tuple[int, int]:
        """The patch grid (h, w) of a batch of images.

        Args:
            shape: (B, C, H, W) of the images; H and W are multiples of the patch.

        Raises:
            ValueError: if the dimensions, the channels or the size don't fit the model.
        """
        if len(shape) != 4:
            raise ValueError(f"pixel_values have shape {tuple(shape)}; pass (batch, channels, height, width)")
        (_, C, H, W), (P, Q) = shape, self.patch_height_width
        if self.num_channels != C:
            raise ValueError(
                f"pixel_values have {C} channels, the model {self.num_channels}; convert the images, or load the model "
                f"with num_channels={C}"
            )
        if H % P or W % Q:
            raise ValueError(f"an image of {H}x{W} is not a multiple of the patch {P}x{Q}; resize or crop it")
        return H // P, W // Q

    def num_kept_patches(self, mask_ratio: float, grid_size: tuple[int, int] | None = None) -> int:
        """K, the number of patches of each image that the encoder sees: `int(N * (1 - mask_ratio))`, in whole cells.

        Args:
            mask_ratio: fraction of patches removed, in [0, 1).
            grid_size: (h, w) patches; the config's own when omitted.

        Raises:
            ValueError: if the ratio lies outside [0, 1) or keeps nothing, or cells don't fit the grid.
        """
        rows, columns = grid_size or self.grid_size
        if self.mask_cell < 1 or rows % self.mask_cell or columns % self.mask_cell:
            raise ValueError(
                f"mask_cell {self.mask_cell} doesn't divide the patch grid {rows}x{columns}; choose a divisor of both"
            )
        cells = (rows // self.mask_cell) * (columns // self.mask_cell)
        if not 0 <= mask_ratio < 1:
            raise ValueError(f"mask_ratio {mask_ratio} lies outside [0, 1); the paper uses 0.75")
        kept = int(cells * (1 - mask_ratio))
        if kept == 0:
            # Tried one by one, because a formula would round: 10 * (1 - 0.9) is below 1 in floating point.
            largest = max(ratio / 1000 for ratio in range(1000) if int(cells * (1 - ratio / 1000)))
            raise ValueError(
                f"mask_ratio {mask_ratio} keeps none of the {cells} {'cells' if self.mask_cell > 1 else 'patches'} "
                f"of a {rows}x{columns} grid; use {largest} or less, or smaller patches"
            )
        return kept * self.mask_cell**2


def _check_most(key: str, value: Any) -> None:
    largest = max(value, default=0) if isinstance(value, (list, tuple)) else value or 0
    if isinstance(largest, (int, float)) and largest > MOST[key]:
        raise ValueError(f"{key} {str(value)[:40]} is more than {MOST[key]:,}; check the value")


def _pair(size: int | list[int] | tuple[int, ...]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
