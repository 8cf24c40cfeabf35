"""What AutoImageProcessor loads: the file that `auto_map` names in preprocessor_config.json; see hub_code_mae.py.

A file of its own, so that a model needs no Pillow.
"""

from .image_processing_mae import MAEImageProcessor
from .image_processing_pil_mae import MAEImageProcessorPil

AUTO_CLASSES = {"AutoImageProcessor": {"torchvision": MAEImageProcessor, "pil": MAEImageProcessorPil}}
