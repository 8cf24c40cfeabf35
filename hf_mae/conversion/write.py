"""Write our models as folders of other packages, and read each back with its own implementation to check it."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from ..auto_models_mae import AUTO_CLASSES
from ..classifier_mae import MAEForImageClassification
from ..errors import UserError
from ..files import write_json
from ..image_processing_mae import MAEImageProcessor
from ..modeling_mae import MAEForPreTraining
from ..run_folder import CONFIG_NAME, WEIGHTS_NAME
from .compare import Run, run_original, run_ours, run_timm, run_transformers
from .layouts import PEERS, peer_options, shared_settings, to_layout
from .processors import timm_settings, write_transformers_processor
from .reference import EPS

# Writes the model and its processor into the folder; returns the `Run` of the model that is read back from it.
Writer = Callable[[Any, MAEImageProcessor, Path], Run]


def write_ours(model: Any, processor: MAEImageProcessor, folder: Path) -> Run:
    """A model folder of this package."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return partial(run_ours, type(model).from_pretrained(folder).eval())


def write_vit_mae(model: Any, processor: MAEImageProcessor, folder: Path) -> Run:
    """transformers' `ViTMAEForPreTraining`, or `ViTMAEModel` of an encoder alone."""
    config = model.config
    if isinstance(model, MAEForImageClassification):
        raise UserError("ViTMAE has no classifier; use --to timm, or --to vit where the class token is pooled")
    for key in ("image", "patch"):
        height, width = getattr(config, f"{key}_height_width")
        if height != width:
            raise UserError(f"ViTMAE takes squares only, not {key}_size {height}x{width}; use --to vit or --to timm")
        setattr(config, f"{key}_size", height)
    _refuse_cross_attention(model, "ViTMAE")
    if config.mask_strategy != "random" or config.mask_cell != 1:
        raise UserError(
            f"ViTMAE masks patch by patch at random: it can't express mask_strategy {config.mask_strategy} with "
            f"mask_cell {config.mask_cell}; use --to mae or --to original"
        )
    return _write_transformers("vit_mae", model, processor, folder)


def write_vit(model: Any, processor: MAEImageProcessor, folder: Path) -> Run:
    """transformers' `ViTModel` (without its pooler), or `ViTForImageClassification` on the class token."""
    if isinstance(model, MAEForImageClassification) and model.config.pooling != "cls":
        raise UserError("ViTForImageClassification can't express pooling mean, only the class token; use --to timm")
    return _write_transformers("vit", model, processor, folder)


def _write_transformers(kind: str, model: Any, processor: MAEImageProcessor, folder: Path) -> Run:
    name = PEERS[kind][type(model)]
    peer_class, options = getattr(transformers, name), peer_options(name)
    peer = peer_class(peer_class.config_class(**shared_settings(model.config, name)), **options)
    peer.load_state_dict(to_layout(model.state_dict(), "transformers"))
    peer.save_pretrained(folder)
    write_transformers_processor(processor, folder)
    return partial(run_transformers, peer_class.from_pretrained(folder, **options).eval())


def write_timm(model: Any, processor: MAEImageProcessor, folder: Path) -> Run:
    """A folder that `timm.create_model("local-dir:FOLDER", pretrained=True)` loads."""
    import timm

    config = model.config
    _refuse_other_activations(model, "timm's ViT")
    classifier = isinstance(model, MAEForImageClassification)
    num_classes = model.num_labels if classifier else 0
    global_pool = "avg" if classifier and config.pooling == "mean" else "token"
    arguments = {
        "global_pool": global_pool,
        "img_size": list(config.image_height_width),
        "patch_size": list(config.patch_height_width),
        "in_chans": config.num_channels,
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": config.intermediate_size / config.hidden_size,
        "qkv_bias": config.qkv_bias,
    }
    # Any name of a plain ViT works here, because the arguments set everything.
    names = {1024: "vit_large_patch16_224", 1280: "vit_huge_patch14_224"}
    settings = {
        "architecture": names.get(config.hidden_size, "vit_base_patch16_224"),
        "num_classes": num_classes,
        "num_features": config.hidden_size,
        "global_pool": global_pool,
        "model_args": arguments,  # without num_classes, which transformers' TimmWrapper passes too
        "pretrained_cfg": {
            **timm_settings(processor, config),
            "num_classes": num_classes,
            "fixed_input_size": True,
            # Before 1.0.31, timm takes the filters of any `first_conv` for those of 3 channels, and replaces others.
            "first_conv": "patch_embed.proj" if config.num_channels == 3 else None,
            "classifier": "head",
        },
    }
    names = [str(name) for _, name in sorted(config.id2label.items())][:num_classes]
    # Leave out transformers' placeholders: timm and its wrapper know the names of ImageNet's classes themselves.
    if names != [f"LABEL_{i}" for i in range(num_classes)]:
        settings["label_names"] = names
    write_json(folder / CONFIG_NAME, settings)
    _save(model, folder, {})
    return partial(run_timm, timm.create_model(f"local-dir:{folder}", pretrained=True).eval())


def write_original(model: Any, processor: MAEImageProcessor, folder: Path) -> Run:
    """The original's names and shapes in a safetensors file, for `load_state_dict`; a `.pth` would be a pickle."""
    _refuse_other_activations(model, "the original")
    _refuse_cross_attention(model, "the original")
    config = model.config
    metadata = {"num_attention_heads": str(config.num_attention_heads)}
    if isinstance(model, MAEForPreTraining):
        metadata["decoder_num_attention_heads"] = str(config.decoder_num_attention_heads)
        metadata["norm_pix_loss"] = str(config.norm_pix_loss).lower()
    _save(model, folder, metadata)
    processor.save_pretrained(folder)
    return partial(run_original, load_file(folder / WEIGHTS_NAME), config)


def _refuse_cross_attention(model: Any, name: str) -> None:
    if isinstance(model, MAEForPreTraining) and model.config.decoder_attention == "cross":
        raise UserError(
            f"{name} can't express decoder_attention cross; use --to vit or --to timm for the encoder alone"
        )


def _refuse_other_activations(model: Any, name: str) -> None:
    if model.config.hidden_act != "gelu":
        raise UserError(f"{name} can't express hidden_act {model.config.hidden_act}, only gelu; use --to vit_mae")


def _save(model: nn.Module, folder: Path, metadata: dict[str, str]) -> None:
    """Write weights under the original's names. safetensors writes metadata in random order, so sort it here."""
    weights = to_layout(model.state_dict(), "original")
    contiguous = {key: value.detach().contiguous() for key, value in weights.items()}
    save_file(contiguous, folder / WEIGHTS_NAME, {"format": "pt", **metadata})
    with (folder / WEIGHTS_NAME).open("rb+") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= length
        file.seek(8)
        file.write(text.ljust(length))


WRITERS: dict[str, Writer] = {
    "mae": write_ours, "vit_mae": write_vit_mae, "vit": write_vit, "timm": write_timm, "original": write_original,
}  # fmt: skip


def part_for(model: Any, target: str) -> tuple[Any, list[str]]:
    """The part of a model that a target format holds, all or the encoder alone, and the changes made, in words."""
    if target in ("vit", "timm") and isinstance(model, MAEForPreTraining):
        model = model.mae
    eps = model.config.layer_norm_eps
    # These two formats fix the epsilon of their LayerNorms; the default of transformers' ViTMAE is 1e-12.
    if target not in ("timm", "original") or eps == EPS:
        return model, []
    model.config.layer_norm_eps = EPS
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = EPS
    return model, [f"layer_norm_eps {eps:g} -> {EPS:g}, the fixed value of {target}"]


def describe_use(target: str, model: Any, dest: str) -> str:
    """The line of Python that loads the written model."""
    if target == "timm":
        return f'import timm; model = timm.create_model("local-dir:{dest}", pretrained=True)'
    if target == "original":
        return f"from safetensors.torch import load_file; model.load_state_dict(load_file('{dest}/{WEIGHTS_NAME}'))"
    if target == "mae":
        name = next(auto for auto, kind in AUTO_CLASSES.items() if kind is type(model))
        return f"import hf_mae; from transformers import {name}; model = {name}.from_pretrained({dest!r})"
    name = PEERS[target][type(model)]
    options = "".join(f", {key}={value}" for key, value in peer_options(name).items())
    return f"from transformers import {name}; model = {name}.from_pretrained({dest!r}{options})"
