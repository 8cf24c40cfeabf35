"""Masked autoencoders (He et al., arXiv:2111.06377) as Hugging Face Transformers models.

Importing this package registers its classes with transformers' Auto classes. The public names are listed in
__init__.pyi and imported on first use.
"""

import sys
from pathlib import Path

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ += ["register"]


def register() -> None:
    """Register `model_type` "mae" with transformers' Auto classes and pipelines; calling it again is harmless."""
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


# `hf-mae --help` must not wait for the import of torch, so each command registers the classes when its work starts.
if not _is_command_line():
    register()
