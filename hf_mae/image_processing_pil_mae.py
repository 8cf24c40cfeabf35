"""Images of any kind -> `pixel_values`, on Pillow alone, without torchvision."""

# Shape letters in this file
#   C bands = num_channels   H, W pixels

# transformers' backends redefine the methods of their own base class with other arguments:
# pyright: reportIncompatibleMethodOverride=false

from typing import Any

import numpy as np
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_base import BatchFeature
from transformers.image_utils import SizeDict

from .image_processing_base_mae import MAEImageProcessorBase, center_spans, resize_bands, resized_size


class MAEImageProcessorPil(MAEImageProcessorBase, PilBackend):
    """Images of any kind -> `pixel_values`, by Pillow and NumPy.

    On RGB images it equals the reference evaluation transform bit for bit: torchvision's Resize(256, bicubic),
    CenterCrop(224), ToTensor and Normalize (facebookresearch/mae, `util/datasets.py`).

    `to_bands` and `pil_to_array` describe what `num_channels` does to an image: alpha is composited on white, 16 bits
    are scaled and never clipped, and arrays may have any number of bands.
    """

    def process_image(self, image: Any, **kwargs: Any) -> np.ndarray:
        """(C, H, W) uint8, uint16 or float32 of one image; see `to_bands`."""
        bands = self._to_bands(image, kwargs).numpy(force=True)
        return bands.astype(np.uint16) if bands.dtype == np.int32 else bands

    def resize(self, image: np.ndarray, size: SizeDict, resample: int, **kwargs: Any) -> np.ndarray:
        """Resize (C, H, W) by `resize_bands`."""
        resized = resized_size(image.shape[1], image.shape[2], size)
        return np.moveaxis(resize_bands(np.moveaxis(image, 0, -1), resized, resample), -1, 0)

    def center_crop(self, image: np.ndarray, size: SizeDict, **kwargs: Any) -> np.ndarray:
        """Crop the centre of (C, H, W), padding an image that is too small with zeros."""
        (rows, columns), zeros = center_spans(image.shape[1], image.shape[2], size)
        return np.pad(image[:, rows, columns], ((0, 0), *zeros))

    def _preprocess(self, *args: Any, return_tensors: Any = None, **kwargs: Any) -> BatchFeature:
        """Pixels -> model input, 0 where a pixel is missing (NaN); that is the mean, if pixels are normalised."""
        images = super()._preprocess(*args, return_tensors=None, **kwargs)["pixel_values"]
        images = [np.where(np.isnan(image), 0, image) for image in images]
        return BatchFeature({"pixel_values": images}, tensor_type=return_tensors)
