"""Images of any kind -> `pixel_values`, batched by torchvision, on any device."""

# Shape letters in this file
#   B images   C bands = num_channels   H, W pixels

# transformers' backends redefine the methods of their own base class with other arguments:
# pyright: reportIncompatibleMethodOverride=false

from typing import Any

import torch
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_utils import SizeDict

from .image_processing_base_mae import MAEImageProcessorBase, center_spans, resize_present, resized_size


class MAEImageProcessor(MAEImageProcessorBase, TorchvisionBackend):
    """Images of any kind -> `pixel_values`, by torchvision.

    Differs from `MAEImageProcessorPil`, and so from the reference evaluation transform, by at most one step of uint8
    (or uint16) in 1 % of the pixels, because the two libraries' filters round differently; on noise, by two steps in
    one pixel of 100,000.

    `to_bands` and `pil_to_array` describe what `num_channels` does to an image: alpha is composited on white, 16 bits
    are scaled and never clipped, and arrays and tensors may have any number of bands.
    """

    def process_image(self, image: Any, **kwargs: Any) -> torch.Tensor:
        """(C, H, W) uint8, int32 (16 bits) or float32 of one image, on `device`; see `to_bands`."""
        return self._to_bands(image, kwargs).contiguous().to(kwargs["device"])

    def resize(self, image: torch.Tensor, size: SizeDict, resample: Any = None, **kwargs: Any) -> torch.Tensor:
        """Resize (B, C, H, W) to the same size that the Pillow backend computes."""
        height, width = resized_size(image.shape[-2], image.shape[-1], size)
        resize = super().resize
        exact = SizeDict(height=height, width=width)
        image = resize_present(image, lambda bands: resize(bands, exact, resample, **kwargs))
        # bicubic overshoots; torchvision only clamps uint8
        return image.clamp(0, 65535) if image.dtype == torch.int32 else image

    def center_crop(self, image: torch.Tensor, size: SizeDict, **kwargs: Any) -> torch.Tensor:
        """Crop the centre of (B, C, H, W), padding images that are too small with zeros."""
        (rows, columns), (zero_rows, zero_columns) = center_spans(image.shape[-2], image.shape[-1], size)
        return torch.nn.functional.pad(image[..., rows, columns], (*zero_columns, *zero_rows))

    def rescale_and_normalize(self, images: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Pixels -> model input, 0 where a pixel is missing (NaN); that is the mean, if pixels are normalised.

        16-bit images that are neither rescaled nor normalised are returned as uint16.
        """
        images = super().rescale_and_normalize(images, *args, **kwargs)
        images = images.masked_fill(images.isnan(), 0)
        return images.to(torch.uint16) if images.dtype == torch.int32 else images
