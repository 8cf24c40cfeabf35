"""Pictures of what a model makes of masked images: original | masked | reconstruction (Pillow alone)."""

import math

import torch
from PIL import Image, ImageDraw

from .modeling_mae import MAEForPreTraining, patchify, unpatchify

GRAY = 0.5
MARGIN, HEADER = 6, 22


@torch.no_grad()
def reconstruct(
    model: MAEForPreTraining, pixel_values: torch.Tensor, noise: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mask images and predict what is hidden.

    With `norm_pix_loss` a model predicts each patch without its mean and contrast; they are then put back from the
    image itself, which uses ground truth: say so wherever you show it (`reconstruction_grid` does).

    Args:
        model: in evaluation mode for repeatable masks.
        pixel_values: (B, C, H, W) normalised pixels.
        noise: (B, N) mask noise; the model's evaluation masks when omitted.

    Returns:
        masked: (B, C, H, W) the visible patches, zero elsewhere.
        reconstruction: (B, C, H, W) predictions where patches were removed, the image elsewhere.
        removed: (B, 1, H, W) 1 where a patch was removed.
    """
    patch_size, (B, _, H, W) = model.config.patch_height_width, pixel_values.shape
    grid_size = H // patch_size[0], W // patch_size[1]
    output = model(pixel_values, noise=noise, return_loss=False)
    patches = patchify(pixel_values.float(), patch_size)
    predicted = output.logits.float()
    if model.config.norm_pix_loss:
        variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        predicted = predicted * (variance + 1e-6).sqrt() + mean
    mask = output.mask.unsqueeze(-1)
    pixels = patch_size[0] * patch_size[1]
    return (
        unpatchify(patches * (1 - mask), patch_size, grid_size),
        unpatchify(patches * (1 - mask) + predicted * mask, patch_size, grid_size),
        unpatchify(mask.expand(B, -1, pixels), patch_size, grid_size),
    )


def reconstruction_grid(
    model: MAEForPreTraining,
    pixel_values: torch.Tensor,
    image_mean: list[float],
    image_std: list[float],
    noise: torch.Tensor | None = None,
    cell: int = 128,
    pairs: int = 2,
) -> Image.Image:
    """A picture with one row an image: original | masked | reconstruction.

    Args:
        model: in evaluation mode.
        pixel_values: (B, C, H, W) normalised pixels.
        image_mean: per channel, to undo the normalisation.
        image_std: per channel.
        noise: (B, N) mask noise; the model's evaluation masks when omitted.
        cell: pixels of an image's longer side in the picture; small images are enlarged without smoothing.
        pairs: images side by side in a row of the picture.

    Returns:
        An RGB picture. Of images that have neither one nor three channels, the first three (or the first) are shown.
    """
    masked, reconstruction, removed = reconstruct(model, pixel_values, noise)
    mean = torch.tensor(image_mean, device=pixel_values.device).view(1, -1, 1, 1)
    std = torch.tensor(image_std, device=pixel_values.device).view(1, -1, 1, 1)
    bands = slice(0, 3 if pixel_values.shape[1] >= 3 else 1)
    shown = [(image * std + mean)[:, bands] for image in (pixel_values.float(), masked, reconstruction)]
    shown = [_stretch(images, shown[0]) for images in shown]
    shown[1] = torch.where(removed > 0, GRAY, shown[1])
    columns = [_to_pictures(images, cell) for images in shown]

    width, height = columns[0][0].size
    pairs = min(pairs, len(columns[0]))
    rows = -(-len(columns[0]) // pairs)
    step = 3 * (width + MARGIN) + 2 * MARGIN
    grid = Image.new("RGB", (pairs * step, HEADER + rows * (height + MARGIN)), "white")
    draw = ImageDraw.Draw(grid)
    truth = ["original", "masked", "reconstruction*" if model.config.norm_pix_loss else "reconstruction"]
    for pair in range(pairs):
        for column, title in enumerate(truth):
            draw.text((pair * step + MARGIN + column * (width + MARGIN), 5), title, fill="black", font_size=12)
    for index, pictures in enumerate(zip(*columns, strict=True)):
        left, top = index % pairs * step + MARGIN, HEADER + index // pairs * (height + MARGIN)
        for column, picture in enumerate(pictures):
            grid.paste(picture, (left + column * (width + MARGIN), top))
    if model.config.norm_pix_loss:
        return _with_footer(grid, "* uses ground truth: each patch's mean and contrast come from the original")
    return grid


def _stretch(images: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    """Bring images whose pixels don't fill [0, 1] (16-bit, float, dark) to it, by the original's own range."""
    low, high = original.amin(dim=(1, 2, 3), keepdim=True), original.amax(dim=(1, 2, 3), keepdim=True)
    fits = (low >= -0.01) & (high <= 1.01) & (high > 0.2)
    return torch.where(fits, images, (images - low) / (high - low).clamp_min(1e-8))


def _to_pictures(images: torch.Tensor, cell: int) -> list[Image.Image]:
    longest = max(images.shape[-2:])
    size = (round(images.shape[-1] * cell / longest), round(images.shape[-2] * cell / longest))
    pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    pictures = [
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).convert("RGB") for image in pixels
    ]
    how = Image.Resampling.NEAREST if longest <= cell else Image.Resampling.BICUBIC
    return [picture.resize(size, how) for picture in pictures]


def _with_footer(grid: Image.Image, text: str) -> Image.Image:
    # A picture of one image is narrower than the text.
    width = 2 * MARGIN + math.ceil(ImageDraw.Draw(grid).textlength(text, font_size=12))
    taller = Image.new("RGB", (max(grid.width, width), grid.height + HEADER), "white")
    taller.paste(grid, (0, 0))
    ImageDraw.Draw(taller).text((MARGIN, grid.height + 2), text, fill="black", font_size=12)
    return taller
