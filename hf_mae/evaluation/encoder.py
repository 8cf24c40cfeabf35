"""Frozen encoder -> features, with a pooling rule that every protocol's result states."""

import torch
from torch import nn

from ..data.transform import evaluation_spec, make_normalizer
from ..modeling_mae import MAEModel
from ..pretrained import load_with_processor


def pool(tokens: torch.Tensor, pooling: str) -> torch.Tensor:
    """Features from the (B, 1 + N, D) tokens after the encoder's last LayerNorm, class token first; float32.

    Returns:
        For "cls" the class token, (B, D); for "mean" the mean of the patch tokens, (B, D); for "both" these two
        concatenated, (B, 2D); for "patches" all patch tokens in image order, (B, N, D).
    """
    cls, patches = tokens[:, 0].float(), tokens[:, 1:].float()
    if pooling == "cls":
        return cls
    if pooling == "patches":
        return patches
    mean = patches.mean(dim=1)
    return torch.cat([cls, mean], dim=1) if pooling == "both" else mean


class FrozenEncoder(nn.Module):
    """A pretrained encoder with its image processor's normalisation, all patches visible, nothing trained.

    Args:
        path: folder or Hub id of the model.
        pooling: "cls", "mean", "both" or "patches", as in `pool`.
        mixed_precision: "no", or "bf16" for autocast.

    Raises:
        UserError: if there is no model, or some of the encoder's weights are missing.
    """

    def __init__(self, path: str, pooling: str, mixed_precision: str = "no"):
        super().__init__()
        self.pooling, self.mixed_precision = pooling, mixed_precision
        encoder, self.processor = load_with_processor(MAEModel, path)
        self.encoder = encoder.requires_grad_(False)
        self.spec = evaluation_spec(encoder.config, self.processor)
        self.width = encoder.config.hidden_size * (2 if pooling == "both" else 1)  # length of a pooled vector

    def train(self, mode: bool = True) -> "FrozenEncoder":
        """Stay in evaluation mode, even inside a module that is put into training mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) in the source's dtype -> pooled features, float32."""
        pixel_values = make_normalizer(self.processor, images.device)(images)
        # TF32, cuDNN's default for convolutions, would make features depend on the batch's size in the third digit.
        exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
        with exact, torch.autocast(images.device.type, torch.bfloat16, enabled=self.mixed_precision == "bf16"):
            return pool(self.encoder(pixel_values).last_hidden_state, self.pooling)
