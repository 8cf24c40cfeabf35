"""Names and shapes of weights in the original's (and timm's) layout and in transformers', against ours.

There is one table per layout, from our names to theirs; the way back uses the names that our model expects. Below are
transformers' classes, and the settings that they share with ours.
"""

import re
from typing import Any

import torch
from torch import nn

from ..classifier_mae import MAEForImageClassification
from ..errors import UserError
from ..modeling_mae import MAEForPreTraining, MAEModel

# Our names -> the original's, in this order. timm's encoders and classifiers have the same.
_ORIGINAL = (
    (r"^mae\.", ""),
    (r"^decoder\.", ""),
    (r"^embeddings\.position_embeddings\.table$", "pos_embed"),
    (r"^decoder_pos_embed\.table$", "decoder_pos_embed"),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.patch_embed\.", "patch_embed.proj."),
    (r"^decoder_layers\.", "decoder_blocks."),
    (r"^layers\.", "blocks."),
    (r"\.attention\.", ".attn."),
    (r"^classifier\.", "head."),
)

# Our names -> those of transformers' ViTMAE and ViT; "qkv" becomes three, see `their_names`.
_TRANSFORMERS = (
    (r"^mae\.", "vit."),
    (r"\.table$", ""),
    (r"embeddings\.patch_embed\.", "embeddings.patch_embeddings.projection."),
    (r"^(vit\.|)norm\.", r"\1layernorm."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attention\.proj\.", ".attention.o_proj."),
)

LAYOUTS = {"original": _ORIGINAL, "transformers": _TRANSFORMERS}


def their_names(name: str, layout: str) -> list[str]:
    """The names of our weight, e.g. `mae.layers.0.norm1.bias`, in a layout: three for a fused qkv that it splits."""
    for pattern, replacement in LAYOUTS[layout]:
        name = re.sub(pattern, replacement, name)
    if layout == "transformers" and ".qkv." in name:
        return [name.replace(".qkv.", f".{letter}_proj.") for letter in "qkv"]
    return [name]


def to_layout(ours: dict[str, torch.Tensor], layout: str) -> dict[str, torch.Tensor]:
    """Our weights, or gradients, under a layout's names: tables get a batch axis, a fused qkv may be split."""
    theirs = {}
    for name, value in ours.items():
        names = their_names(name, layout)
        parts = value[None] if name.endswith(".table") else value
        theirs.update(zip(names, parts.chunk(len(names)), strict=True))
    return theirs


def load_layout(model: nn.Module, theirs: dict[str, torch.Tensor], layout: str) -> None:
    """Load weights in another layout into our model, in place.

    Raises:
        UserError: naming the first weight that is missing, left over or of another shape.
    """
    names_of = {name: their_names(name, layout) for name in model.state_dict()}
    expected = {their for names in names_of.values() for their in names}
    for what, keys in (("lacks", expected - theirs.keys()), ("has", theirs.keys() - expected)):
        if keys:
            raise UserError(
                f"the source {what} {sorted(keys)[0]} ({len(keys)} such names), unlike a {type(model).__name__} with "
                "the same settings; only plain ViTs as in the paper can be converted"
            )
    ours = {}
    for name, value in model.state_dict().items():
        tensor = torch.cat([theirs[their] for their in names_of[name]])
        ours[name] = tensor[0] if name.endswith(".table") else tensor
        if ours[name].shape != value.shape:
            raise UserError(
                f"the source's {names_of[name][0]} has shape {tuple(ours[name].shape)}, not {tuple(value.shape)}; "
                "check --image_size and the numbers of heads"
            )
    model.load_state_dict(ours)


# model_type of transformers -> our class -> theirs; a config that names no class means the first of its type.
PEERS: dict[str, dict[Any, str]] = {
    "vit_mae": {MAEForPreTraining: "ViTMAEForPreTraining", MAEModel: "ViTMAEModel"},
    "vit": {MAEModel: "ViTModel", MAEForImageClassification: "ViTForImageClassification"},
}


def peer_options(name: str) -> dict[str, Any]:
    """Keywords for a class of transformers: ViTModel would add a pooler, which our encoder doesn't have."""
    return {"add_pooling_layer": False} if name == "ViTModel" else {}


def shared_settings(config: Any, name: str) -> dict[str, Any]:
    """The settings of a config, ours or theirs, that our class and this class of transformers share."""
    keys = [
        "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
        "initializer_range", "layer_norm_eps", "image_size", "patch_size", "num_channels", "qkv_bias",
    ]  # fmt: skip
    if name.startswith("ViTMAE"):
        keys += [
            "decoder_hidden_size", "decoder_num_hidden_layers", "decoder_num_attention_heads",
            "decoder_intermediate_size", "mask_ratio", "norm_pix_loss",
        ]  # fmt: skip
    if name == "ViTForImageClassification":
        keys += ["id2label", "label2id", "problem_type"]
    return {key: getattr(config, key) for key in keys}
