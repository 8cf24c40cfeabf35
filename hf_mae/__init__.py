"""Masked autoencoders (He et al., arXiv:2111.06377) as Hugging Face Transformers models.

Importing this package registers its classes with transformers' Auto classes.
"""

import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backbone_mae import MAEBackbone
    from .classifier_mae import MAEForImageClassification
    from .configuration_mae import MAEConfig
    from .image_processing_mae import MAEImageProcessor
    from .image_processing_pil_mae import MAEImageProcessorPil
    from .masking_mae import patchify, unpatchify
    from .modeling_mae import (
        MAEForPreTraining,
        MAEModel,
        mae_vit_base,
        mae_vit_huge,
        mae_vit_large,
        mae_vit_small,
        mae_vit_tiny,
    )

__version__ = "0.1.0"

_MODULES = {
    "backbone_mae": ("MAEBackbone",),
    "classifier_mae": ("MAEForImageClassification",),
    "configuration_mae": ("MAEConfig",),
    "image_processing_mae": ("MAEImageProcessor",),
    "image_processing_pil_mae": ("MAEImageProcessorPil",),
    "masking_mae": ("patchify", "unpatchify"),
    "modeling_mae": (
        "MAEForPreTraining",
        "MAEModel",
        "mae_vit_base",
        "mae_vit_huge",
        "mae_vit_large",
        "mae_vit_small",
        "mae_vit_tiny",
    ),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "MAEBackbone",
    "MAEConfig",
    "MAEForImageClassification",
    "MAEForPreTraining",
    "MAEImageProcessor",
    "MAEImageProcessorPil",
    "MAEModel",
    "mae_vit_base",
    "mae_vit_huge",
    "mae_vit_large",
    "mae_vit_small",
    "mae_vit_tiny",
    "patchify",
    "register",
    "unpatchify",
]


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def register() -> None:
    """Make transformers' Auto classes and pipelines know `model_type` "mae"; repeating it changes nothing."""
    import transformers

    from . import auto_image_processors_mae, auto_models_mae

    models = dict(auto_models_mae.AUTO_CLASSES)
    config_class = models.pop("AutoConfig")
    transformers.AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    for name, model_class in models.items():
        getattr(transformers, name).register(config_class, model_class, exist_ok=True)
    backends = auto_image_processors_mae.AUTO_CLASSES["AutoImageProcessor"]
    transformers.AutoImageProcessor.register(config_class, image_processor_classes=backends, exist_ok=True)


def _is_command_line() -> bool:
    """Whether this process is `hf-mae` or `python -m hf_mae.cli`."""
    program = sys.argv[0] if sys.argv else ""
    return Path(program).stem == "hf-mae" or (program == "-m" and "hf_mae.cli" in sys.orig_argv)


# `hf-mae --help` must answer before torch could even be imported; the command registers when it starts to work.
if not _is_command_line():
    register()
