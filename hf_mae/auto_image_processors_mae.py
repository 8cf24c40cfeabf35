"""AutoImageProcessor loads this file, named by `auto_map` in preprocessor_config.json; see hub_code_mae.py.

Separate from auto_models_mae.py, so that a model doesn't need Pillow.
"""

from .image_processing_mae import MAEImageProcessor
from .image_processing_pil_mae import MAEImageProcessorPil

AUTO_CLASSES = {"AutoImageProcessor": {"torchvision": MAEImageProcessor, "pil": MAEImageProcessorPil}}
