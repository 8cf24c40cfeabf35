"""A model that runs in milliseconds, and inputs for it: 32 pixels, patches of 8 (N = 16), 4 and 2 layers."""

import torch
from torch import nn

from hf_mae import (
    MAEBackbone,
    MAEConfig,
    MAEForImageClassification,
    MAEForPreTraining,
    MAEImageProcessor,
    MAEImageProcessorPil,
    MAEModel,
)

# What each of transformers' Auto classes, and each backend of its AutoImageProcessor, makes of ours.
AUTO_MODELS = {
    "AutoModel": MAEModel,
    "AutoModelForPreTraining": MAEForPreTraining,
    "AutoModelForMaskedImageModeling": MAEForPreTraining,
    "AutoModelForImageClassification": MAEForImageClassification,
    "AutoBackbone": MAEBackbone,
}
PROCESSORS = {"torchvision": MAEImageProcessor, "pil": MAEImageProcessorPil}
TINY = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "decoder_hidden_size": 32,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 64,
}


def tiny_config(**overrides) -> MAEConfig:
    return MAEConfig(**{**TINY, **overrides})


def tiny(model_class: type, **overrides):
    """A tiny model in eval mode, all of whose parameters matter: none is left at zero or one."""
    model = model_class(tiny_config(**overrides)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "position" not in name:
                # A classifier that starts at 2e-5 would hide everything behind it.
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def pixels(batch: int = 2, channels: int = 3, height: int = 32, width: int | None = None, seed: int = 1):
    """(B, C, H, W) smooth images with noise, of mean 0 and standard deviation about 1."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(batch, channels, 4, 4, generator=generator)
    size = (height, width or height)
    smooth = nn.functional.interpolate(coarse, size=size, mode="bicubic")
    return smooth + 0.2 * torch.randn(batch, channels, *size, generator=generator)


def draw_noise(batch: int = 2, patches: int = 16, seed: int = 2):
    return torch.rand(batch, patches, generator=torch.Generator().manual_seed(seed))


def save_model(folder, channels=1, size=(8, 8), patch=4, dtype_factor=1 / 255, **keys):
    """A tiny pretrained model with its image processor; the folder's name."""
    torch.manual_seed(0)
    model = tiny(MAEForPreTraining, image_size=list(size), patch_size=patch, num_channels=channels, **keys)
    model.save_pretrained(folder)
    MAEImageProcessor(
        num_channels=channels,
        size={"height": size[0], "width": size[1]} if size[0] != size[1] else {"shortest_edge": size[0]},
        crop_size={"height": size[0], "width": size[1]},
        image_mean=[0.3] * channels,
        image_std=[0.4] * channels,
        rescale_factor=dtype_factor,
    ).save_pretrained(folder)
    return str(folder)
