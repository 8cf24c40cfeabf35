"""Frozen encoder -> features, by a pooling rule that every protocol's result states."""

import torch
from torch import nn

from ..data.transform import ImageSpec, evaluation_spec, make_normalizer, pixel_dtype
from ..modeling_mae import MAEModel
from ..pretrained import load_with_processor


def pool(tokens: torch.Tensor, pooling: str) -> torch.Tensor:
    """One vector an image, of the tokens after the encoder's last LayerNorm.

    Args:
        tokens: (B, 1 + N, D), class token first.
        pooling: "cls": the class token; "mean": mean of the patch tokens; "both": one after the other; "patches": all
            patch tokens, in image order.

    Returns:
        (B, D), for "both" (B, 2D), for "patches" (B, N, D); float32.
    """
    tokens = tokens.float()
    parts = {"cls": lambda: tokens[:, 0], "mean": lambda: tokens[:, 1:].mean(dim=1), "patches": lambda: tokens[:, 1:]}
    return torch.cat([parts["cls"](), parts["mean"]()], dim=1) if pooling == "both" else parts[pooling]()


class FrozenEncoder(nn.Module):
    """A pretrained encoder with its image processor's normalisation, all patches visible, nothing trained.

    Args:
        path: folder or Hub id.
        pooling: see `pool`.
        mixed_precision: "no", or "bf16" for autocast.

    Raises:
        DataError: if there is no model, or not all weights of an encoder.
    """

    def __init__(self, path: str, pooling: str, mixed_precision: str = "no"):
        super().__init__()
        self.pooling, self.mixed_precision = pooling, mixed_precision
        encoder, self.processor = load_with_processor(MAEModel, path)
        self.encoder = encoder.requires_grad_(False)
        self.dtype = pixel_dtype(self.processor)

    @property
    def spec(self) -> ImageSpec:
        """The evaluation view that the model was trained for."""
        return evaluation_spec(self.encoder.config, self.processor)

    @property
    def width(self) -> int:
        """Numbers in a pooled vector."""
        return self.encoder.config.hidden_size * (2 if self.pooling == "both" else 1)

    def train(self, mode: bool = True) -> "FrozenEncoder":
        """Stay in evaluation mode, even inside a module that is put into training mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) in the source's dtype -> pooled features, float32."""
        pixel_values = make_normalizer(self.processor, self.dtype, images.device)(images)
        # TF32, cuDNN's default for convolutions, would make features depend on the batch's size in the third digit.
        exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        with exact, torch.autocast(images.device.type, torch.bfloat16, enabled=self.mixed_precision == "bf16"):
            return pool(self.encoder(pixel_values).last_hidden_state, self.pooling)
