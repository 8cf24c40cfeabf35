"""Our models beside models of transformers that play the same part: 32 pixels, patches of 8 (N = 16), 2 layers.

A client's test is one small program that both must pass, so a failure of ours alone breaks a contract.
"""

import importlib
from typing import Any

import pytest
import torch
from tiny import draw_noise, pixels
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    PreTrainedModel,
    TrainingArguments,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTModel,
)

from hf_mae import MAEConfig, MAEForImageClassification, MAEForPreTraining, MAEModel

SHAPE = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "decoder_hidden_size": 24,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 48,
}
NAMES = {0: "cat", 1: "dog", 2: "owl"}
IDS = {name: number for number, name in NAMES.items()}
CLASSIFIERS = {"ours": (MAEForImageClassification, MAEConfig), "dinov2": (Dinov2ForImageClassification, Dinov2Config)}
PRETRAINERS = {"ours": (MAEForPreTraining, MAEConfig), "vit_mae": (ViTMAEForPreTraining, ViTMAEConfig)}
ENCODERS = {"ours": (MAEModel, MAEConfig), "vit": (ViTModel, ViTConfig)}


def make(kinds: dict[str, tuple[type, type]], name: str, **overrides: Any) -> PreTrainedModel:
    """A model in evaluation mode, all of whose trained weights matter: none is left at zero or one."""
    model_class, config_class = kinds[name]
    model = model_class(config_class(**SHAPE | {"id2label": NAMES, "label2id": IDS} | overrides)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def classifier(name: str, **overrides: Any) -> PreTrainedModel:
    return make(CLASSIFIERS, name, **overrides)


def pretrainer(name: str, **overrides: Any) -> PreTrainedModel:
    return make(PRETRAINERS, name, **overrides)


def encoder(name: str, **overrides: Any) -> PreTrainedModel:
    return make(ENCODERS, name, **overrides)


def labelled_rows(count: int = 8) -> list[dict[str, Any]]:
    """Images with labels."""
    return [{"pixel_values": image, "labels": i % 3} for i, image in enumerate(pixels(count))]


def masked_rows(count: int = 8) -> list[dict[str, Any]]:
    """Images with labels that no pretraining uses, and with the noise that fixes their masks."""
    return [row | {"noise": noise} for row, noise in zip(labelled_rows(count), draw_noise(count), strict=True)]


def batch_of(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """The rows as one batch, without labels if the rows are for pretraining."""
    keys = [key for key in rows[0] if not ("noise" in rows[0] and key == "labels")]
    return {key: torch.stack([torch.as_tensor(row[key]) for row in rows]) for key in keys}


def arguments(folder: Any, **overrides: Any) -> TrainingArguments:
    """Three steps on a CPU, one batch of 8 a step, at a constant rate; nothing saved or reported."""
    settings: dict[str, Any] = {
        "max_steps": 3, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 4, "learning_rate": 1e-2,
        "lr_scheduler_type": "constant", "save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True,
    }  # fmt: skip
    return TrainingArguments(output_dir=str(folder), **settings | overrides)


def need(module: str, package: str | None = None) -> Any:
    """The module, or a skipped test that says what to install."""
    return pytest.importorskip(module, reason=f"{package or module} is not installed: pip install 'hf-mae[clients]'")


def need_names(module: str, *names: str, package: str) -> list[Any]:
    """Names of a module, as `need`."""
    need(module, package)
    return [getattr(importlib.import_module(module), name) for name in names]
