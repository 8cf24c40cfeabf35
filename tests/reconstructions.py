"""Models of all shapes, a perfect prediction, and masks as pixels: for tests of reconstructions."""

from types import SimpleNamespace

import torch
from tiny import tiny

from hf_mae import MAEForPreTraining, patchify
from hf_mae.masking_mae import normalize_patches

SHAPES = [(1, 32, 32), (2, 32, 32), (3, 32, 32), (13, 32, 32), (3, 16, 48), (1, 48, 16), (13, 16, 48)]


def model_for(channels: int, height: int, width: int, **overrides) -> MAEForPreTraining:
    return tiny(MAEForPreTraining, num_channels=channels, image_size=[height, width], **overrides)


def removed_pixels(mask: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(B, N) -> (B, H, W): the slow way, patch by patch."""
    pixel = torch.zeros(len(mask), height, width, dtype=torch.bool)
    columns = width // 8
    for image in range(len(mask)):
        for patch in range(mask.shape[1]):
            top, left = patch // columns * 8, patch % columns * 8
            pixel[image, top : top + 8, left : left + 8] = mask[image, patch] == 1
    return pixel


def predict_perfectly(model, monkeypatch, wrong_where_visible: bool = True):
    """The model's forward with the true target as prediction, nonsense where nothing is predicted."""
    forward = model.forward

    def perfect(pixel_values, **options):
        output = forward(pixel_values, **options)
        target = patchify(pixel_values, model.config.patch_height_width)
        if model.config.norm_pix_loss:
            target = normalize_patches(target)
        logits = torch.where(output.mask.unsqueeze(-1) == 1, target, torch.full_like(target, 1e6))
        return SimpleNamespace(logits=logits if wrong_where_visible else target, mask=output.mask)

    monkeypatch.setattr(model, "forward", perfect)
