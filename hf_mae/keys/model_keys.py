"""The keys of `MAEConfig` as a command takes them, without importing transformers."""

from dataclasses import dataclass
from typing import Any, Literal

from . import ImageSize, key


def _mae_key(default: Any, help_text: str, group: str = "model") -> Any:
    """A key that is None unless it is given; the help shows the default of `MAEConfig`."""
    return key(None, help_text, group=group, shown=default)


@dataclass
class ModelKeys:
    """The keys of `MAEConfig` that pretraining uses, in its order; None means that a key was not given."""

    hidden_size: int | None = _mae_key(768, "width of the encoder's tokens; overrides model_size")
    num_hidden_layers: int | None = _mae_key(12, "number of encoder blocks; overrides model_size")
    num_attention_heads: int | None = _mae_key(12, "attention heads of an encoder block; overrides model_size")
    intermediate_size: int | None = _mae_key(3072, "hidden width of the encoder's MLPs; overrides model_size")
    hidden_act: str | None = _mae_key("gelu", "activation function of all MLPs, by transformers' name")
    layer_norm_eps: float | None = _mae_key(1e-6, "epsilon added to the variance in every LayerNorm")
    initializer_range: float | None = _mae_key(0.02, "standard deviation of the initial class and mask tokens")
    qkv_bias: bool | None = _mae_key(True, "add a bias to the query, key and value projections")
    drop_path_rate: float | None = _mae_key(
        0.0, "probability of skipping the last encoder block; rises linearly from 0 at the first"
    )
    image_size: ImageSize | None = _mae_key(224, "size of the model's images in pixels, such as 224 or 208x320")
    patch_size: ImageSize | None = _mae_key(16, "size of a patch in pixels, such as 16 or 16x8")
    num_channels: int | None = _mae_key("as in the data", "number of channels of each image, such as 3 for RGB")
    decoder_hidden_size: int | None = _mae_key(512, "width of the tokens in the decoder")
    decoder_num_hidden_layers: int | None = _mae_key(8, "number of blocks in the decoder")
    decoder_num_attention_heads: int | None = _mae_key(16, "number of attention heads in a decoder block")
    decoder_intermediate_size: int | None = _mae_key(2048, "hidden width of the MLPs in the decoder")
    decoder_attention: Literal["self", "cross"] | None = _mae_key(
        "self", "what mask tokens attend to: all tokens, or only visible ones as in CrossMAE"
    )
    decoder_fusion: bool | None = _mae_key(
        False, "with decoder_attention cross, feed each decoder block a learned sum of all encoder blocks"
    )
    mask_ratio: float | None = _mae_key(0.75, "fraction of patches removed from each image, in [0, 1)", "masking")
    prediction_ratio: float | None = _mae_key(
        None,
        "with decoder_attention cross, fraction of patches predicted in training; all removed ones when omitted",
        "masking",
    )
    mask_strategy: Literal["random", "block"] | None = _mae_key(
        "random", "remove patches at random, or whole random rectangles", "masking"
    )
    mask_cell: int | None = _mae_key(
        1, "side, in patches, of the square cells that are kept or removed together", "masking"
    )
    norm_pix_loss: bool | None = _mae_key(
        False, "predict the pixels of each patch normalised by its mean and standard deviation"
    )
    eval_mask_seed: int | None = _mae_key(0, "random seed of the masks that evaluations use", "masking")
    pooling: Literal["mean", "cls"] | None = _mae_key(
        "mean", "feature vector of an image: mean of the patch tokens, or class token"
    )
    trainable_positions: bool | None = _mae_key(False, "train the position tables instead of keeping them fixed")
    position_resize: Literal["auto", "sincos", "interpolate"] | None = _mae_key(
        "auto",
        "how position tables adapt to another image size: sincos recomputes them, interpolate resizes them, auto "
        "recomputes unchanged tables and resizes trained ones",
    )

    def given_model_keys(self) -> dict[str, Any]:
        """The keys that were given, as `MAEConfig` takes them."""
        return {name: value for name in MODEL_KEYS if (value := getattr(self, name)) is not None}


MODEL_KEYS = list(ModelKeys.__dataclass_fields__)
