"""Read models of other packages into ours, each with its own implementation to check ours against."""

import re
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from ..classifier_mae import MAEForImageClassification
from ..configuration_mae import SIZES, MAEConfig
from ..errors import UserError, one_line
from ..files import WEIGHT_ENDINGS, local_path, missing_path, read_json, sha256
from ..image_processing_mae import MAEImageProcessor
from ..keys import height_width
from ..keys.publishing_keys import SourceFacts
from ..modeling_mae import MAEForPreTraining, MAEModel
from ..pretrained import loading
from ..run_folder import CONFIG_NAME, WEIGHTS_NAME, RunFolder
from .compare import Run, run_original, run_ours, run_timm, run_transformers
from .layouts import PEERS, load_layout, peer_options, shared_settings
from .processors import evaluation_processor, read_processor, read_timm_processor
from .pth import read_weights
from .reference import depth

NON_COMMERCIAL = "cc-by-nc-4.0"
# Hub repositories with the weights of the original's authors, copies of them, and their folders in the Hub's cache.
_AUTHORS_WEIGHTS = re.compile(r"(^|/|--)(vit-mae-(base|large|huge)|vit_(base|large|huge)_patch1[46]_224\.mae)(/|$)")


@dataclass
class Source:
    """One of our models, in float32 and eval mode, and where it came from."""

    format: str
    model: Any
    processor: MAEImageProcessor
    run: Run  # runs the source's own implementation
    licence: str | None = None
    sha256: dict[str, str] = field(default_factory=dict)  # of its files, by name
    revision: str | None = None  # commit of a Hub repository
    before: dict[str, Any] | None = None  # what an earlier conversion recorded


def open_source(source: str, facts: SourceFacts) -> Source:
    """Read a file, a folder or a repository of the Hub.

    The licence is what the folder states: in conversion.json, or in timm's config.json. If it states none, the authors'
    weights are recognised by their names.

    Raises:
        UserError: if it can't be read, or holds a model of an unknown kind.
    """
    path = _local(source)
    if path.is_dir() and not (path / CONFIG_NAME).exists() and (path / WEIGHTS_NAME).exists():
        path = path / WEIGHTS_NAME
    if path.is_dir():
        folder, result = path, _read_folder(path, source, facts)
        files = sorted(file for file in path.iterdir() if file.suffix in (".safetensors", ".bin", ".pth"))
    else:
        folder, result = path.parent, _read_original(path, facts)
        files = [path]
    if not Path(local_path(source)).exists():
        result.revision = folder.name  # snapshots/COMMIT, in the Hub's cache
    result.sha256 = {file.name: sha256(file) for file in files}
    # This package writes no .pth, so a record beside one belongs to another file.
    record = _record(folder) if path.is_dir() or path.suffix == ".safetensors" else None
    if record is not None:
        result.before, result.licence = record, record.get("licence")
    return result


def _read_folder(folder: Path, source: str, facts: SourceFacts) -> Source:
    for key in ("num_attention_heads", "decoder_num_attention_heads", "norm_pix_loss"):
        if getattr(facts, key) is not None:
            raise UserError(f"{source} records its own {key}; leave --{key} out")
    try:
        config = read_json(folder / CONFIG_NAME)
        kind = "timm" if "architecture" in config else config.get("model_type")
    except (OSError, ValueError, AttributeError) as error:  # AttributeError: it holds JSON other than a table
        raise UserError(f"{source} has no readable {CONFIG_NAME}; name a model") from error
    readers = {"mae": _read_ours, "vit_mae": _read_transformers, "vit": _read_transformers, "timm": _read_timm}
    if kind not in readers:
        raise UserError(f"{source} is a model of type {kind}; give one of type {', '.join(readers)}, or a .pth file")
    with loading(f"{source} can't be read"):
        result = readers[kind](folder, config)
    names = (source, config.get("_name_or_path"))
    if result.licence is None and any(_AUTHORS_WEIGHTS.search(str(name)) for name in names):
        result.licence = NON_COMMERCIAL
    return result


def _local(source: str) -> Path:
    """The path itself, or a folder with the configuration and weights of a Hub repository."""
    path = Path(local_path(source))
    if path.exists():
        return path
    if missing := missing_path(source, WEIGHT_ENDINGS):
        raise UserError(missing)
    try:
        for weights in ("*.safetensors", "pytorch_model*.bin"):
            folder = Path(snapshot_download(source, allow_patterns=["*.json", weights], ignore_patterns=["*/*"]))
            if list(folder.glob(weights)):
                break
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise UserError(f"{source} is neither a path nor on the Hub ({one_line(error)}); check the name") from error
    return folder


def _record(folder: Path) -> dict[str, Any] | None:
    """What an earlier conversion recorded. Reading is strict, so that the licence of the weights can't get lost."""
    file = RunFolder(folder).conversion_file
    if not file.exists():
        return None
    try:
        record = read_json(file)
        if not isinstance(record, dict):
            raise ValueError("it is not a table of keys")
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is broken ({error}); if you know the licence of the weights, remove it") from error
    return record


# ---------------------------------------------------------------------------------------------- ours, transformers'


def _load(model_class: Any, folder: Path, **options: Any) -> Any:
    """`from_pretrained` in float32; a UserError if weights are missing or left over."""
    with loading(f"{model_class.__name__} can't load {folder}"):
        model, report = model_class.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **options)
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        # A ViT's pooler isn't part of the encoder.
        keys = sorted(str(key) for key in report[what] if not str(key).startswith("pooler."))
        if keys:
            raise UserError(
                f"{folder} doesn't fit {model_class.__name__}: {what.replace('_', ' ')} {keys[0]} ({len(keys)}); "
                "give a complete checkpoint"
            )
    return model.eval()


def _named_class(folder: Path, config: dict[str, Any], classes: dict[str, Any]) -> tuple[str, Any]:
    """The class name in a folder's config, and our class for it; the first class if the config names none."""
    name = (config.get("architectures") or list(classes))[0]
    if name not in classes:
        raise UserError(f"{folder} holds a {name}; give one of {', '.join(classes)}")
    return name, classes[name]


def _read_ours(folder: Path, config: dict[str, Any]) -> Source:
    classes = {model.__name__: model for model in (MAEForPreTraining, MAEForImageClassification, MAEModel)}
    model = _load(_named_class(folder, config, classes)[1], folder)
    return Source("mae", model, read_processor(folder, model.config), partial(run_ours, model))


def _read_transformers(folder: Path, config: dict[str, Any]) -> Source:
    kind = config["model_type"]
    name, model_class = _named_class(folder, config, {theirs: ours for ours, theirs in PEERS[kind].items()})
    peer = _load(getattr(transformers, name), folder, **peer_options(name))
    settings = shared_settings(peer.config, name) | ({"pooling": "cls"} if kind == "vit" else {})
    model = make_model(model_class, settings, peer.state_dict(), "transformers")
    return Source(kind, model, read_processor(folder, model.config), partial(run_transformers, peer))


# ---------------------------------------------------------------------------------------------- the original's layout


def _read_original(path: Path, facts: SourceFacts) -> Source:
    weights, metadata = read_weights(path)
    if not {"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight"} <= weights.keys():
        raise UserError(
            f"{path} has no weights with the original's names, but e.g. {', '.join(sorted(weights)[:3])}; "
            "give the original's file, or the folder of a model"
        )
    model_class, settings = _class_and_settings(weights, facts.image_size)
    for prefix in ("", "decoder_") if model_class is MAEForPreTraining else ("",):
        settings[f"{prefix}num_attention_heads"] = _heads(settings, prefix, facts, metadata)
    if model_class is MAEForPreTraining:
        settings["norm_pix_loss"] = _norm_pix_loss(path, facts, metadata)
    model = make_model(model_class, settings, weights, "original")
    ours = RunFolder(path.parent).conversion_file.exists() and path.suffix == ".safetensors"
    processor = read_processor(path.parent, model.config) if ours else evaluation_processor(model.config)
    return Source("original", model, processor, partial(run_original, weights, model.config), NON_COMMERCIAL)


def make_model(model_class: Any, settings: dict[str, Any], weights: dict[str, torch.Tensor], layout: str) -> Any:
    """One of our models with these weights; a UserError if settings and weights don't match."""
    try:
        model = model_class(MAEConfig(**settings)).eval()
    except ValueError as error:
        raise UserError(one_line(error)) from error
    load_layout(model, weights, layout)
    return model


def _class_and_settings(weights: dict[str, torch.Tensor], image_size: Any) -> tuple[Any, dict[str, Any]]:
    """Class and settings, from names and shapes of weights, except the numbers of heads; assumes a square image."""
    D, C, P, Q = weights["patch_embed.proj.weight"].shape
    N = weights["pos_embed"].shape[1] - 1
    side = round(N**0.5)
    if side * side == N:
        size = [side * P, side * Q]
    elif image_size:
        size = list(height_width(image_size))
    else:
        raise UserError(f"{N} patches don't make a square; give height and width with --image_size H W")
    settings = {
        "hidden_size": D,
        "num_hidden_layers": depth(weights, "blocks"),
        "intermediate_size": len(weights["blocks.0.mlp.fc1.weight"]),
        "image_size": size[0] if size[0] == size[1] else size,
        "patch_size": P if P == Q else [P, Q],
        "num_channels": C,
        "qkv_bias": "blocks.0.attn.qkv.bias" in weights,
    }
    if "decoder_pred.weight" in weights:
        settings["decoder_hidden_size"] = len(weights["decoder_embed.weight"])
        settings["decoder_num_hidden_layers"] = depth(weights, "decoder_blocks")
        settings["decoder_intermediate_size"] = len(weights["decoder_blocks.0.mlp.fc1.weight"])
        return MAEForPreTraining, settings
    if "head.weight" in weights:
        settings["num_labels"] = len(weights["head.weight"])
        settings["pooling"] = "mean" if "fc_norm.weight" in weights else "cls"
        return MAEForImageClassification, settings
    return MAEModel, settings


def _heads(settings: dict[str, Any], prefix: str, facts: SourceFacts, metadata: dict[str, Any]) -> int:
    key, width = f"{prefix}num_attention_heads", settings[f"{prefix}hidden_size"]
    # By width: the encoders of the table of sizes, and their common decoder, 512 wide with 16 heads.
    known = {512: 16} if prefix else {size["hidden_size"]: size["num_attention_heads"] for size in SIZES.values()}
    heads = getattr(facts, key) or metadata.get(key) or known.get(width)
    if not heads:
        raise UserError(f"the number of heads for width {width} is not recorded; give --{key} NUMBER")
    return int(heads)


def _norm_pix_loss(path: Path, facts: SourceFacts, metadata: dict[str, Any]) -> bool:
    """The given value, else the recorded one, else the known one for files that the original's authors published."""
    if facts.norm_pix_loss is not None:
        return facts.norm_pix_loss
    if "norm_pix_loss" in metadata:
        return str(metadata["norm_pix_loss"]).lower() == "true"
    if path.name.startswith(("mae_pretrain_vit_", "mae_visualize_vit_")):
        return path.name.startswith("mae_pretrain_vit_")
    raise UserError(f"{path} doesn't record what its decoder predicts; give --norm_pix_loss true or false")


# ---------------------------------------------------------------------------------------------- timm


def _read_timm(folder: Path, config: dict[str, Any]) -> Source:
    import timm

    files = [folder / name for name in (WEIGHTS_NAME, "pytorch_model.bin") if (folder / name).exists()]
    if not files:
        raise UserError(f"{folder} has neither {WEIGHTS_NAME} nor pytorch_model.bin; give a complete model")
    weights, pretrained = read_weights(files[0])[0], config.get("pretrained_cfg", config)
    options = {key: config[key] for key in ("num_classes", "global_pool") if key in config}
    options |= {k: v for k, v in config.get("model_args", {}).items() if not k.startswith(("pretrained", "checkpoint"))}
    try:
        # Build it empty and fill it here, so that timm doesn't open files that the configuration names.
        if not timm.is_model(config["architecture"]):
            raise KeyError(f"no model is called {config['architecture']}")
        peer: Any = timm.create_model(config["architecture"], pretrained=False, **options).eval()
        peer.load_state_dict(weights)
        block, image_size = peer.blocks[0], list(peer.patch_embed.img_size)
        model_class, settings = _class_and_settings(weights, image_size)
        settings |= {"num_attention_heads": block.attn.num_heads, "layer_norm_eps": block.norm1.eps}
    except (RuntimeError, TypeError, AttributeError, KeyError) as error:
        raise UserError(f"{folder} is not a ViT with a class token in timm's layout: {one_line(error)}") from error
    if "head.weight" not in weights:
        settings["pooling"] = "cls" if peer.global_pool == "token" else "mean"
    names = config.get("label_names")
    if isinstance(names, list) and len(names) == settings.get("num_labels"):
        names = [str(name) for name in names]
        settings |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    model = make_model(model_class, settings | {"image_size": image_size}, weights, "original")
    processor = read_timm_processor(pretrained, model.config)
    return Source("timm", model, processor, partial(run_timm, peer), pretrained.get("license"))
