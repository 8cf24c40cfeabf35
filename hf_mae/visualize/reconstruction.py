"""Mask images, predict what is hidden, and score the prediction."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch
import torch.nn.functional as F

from ..keys.publishing_keys import Statistics
from ..masking_mae import patchify, unpatchify
from ..modeling_mae import MAEForPreTraining


@dataclass
class Reconstruction:
    """Images, their visible part, and a model's prediction from it.

    Args:
        pixel_values: (B, C, H, W) the normalised images.
        masked: (B, C, H, W) the visible patches, normalised; zero elsewhere.
        predicted: (B, C, H, W) the model's output for every patch, normalised; the loss doesn't train visible ones.
        pasted: (B, C, H, W) predictions where patches were removed, the image elsewhere, normalised.
        removed: (B, 1, H, W) True where a patch was removed.
        mask_ratio: fraction of patches that were removed, in (0, 1).
        statistics: where mean and contrast of removed patches come from; None if the model predicts them.
    """

    pixel_values: torch.Tensor
    masked: torch.Tensor
    predicted: torch.Tensor
    pasted: torch.Tensor
    removed: torch.Tensor
    mask_ratio: float
    statistics: Statistics | None


@torch.no_grad()
def reconstruct(
    model: MAEForPreTraining,
    pixel_values: torch.Tensor,
    mask_ratio: float | None = None,
    seed: int | None = None,
    mask: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    statistics: Statistics = "visible",
) -> Reconstruction:
    """Mask images and predict what is hidden.

    A model trained with `norm_pix_loss` predicts each patch without its mean and contrast (Sec. 3, "Reconstruction
    target"). There are three ways back to pixels:

    - "visible": use the mean and contrast of visible patches, mainly the nearest ones. Reads no hidden pixel.
    - "true": use the hidden patch's true mean and contrast. This is ground truth: say so wherever you show it
      (`reconstruction_grid` does).
    - "raw": use none. Every patch has mean 0 and variance 1 in normalised pixels, so the picture looks blocky.

    For a model trained on plain pixels, all three give the same result.

    Args:
        model: the model, in evaluation mode.
        pixel_values: (B, C, H, W) normalised pixels; the patch size divides H and W.
        mask_ratio: fraction of patches to hide, in (0, 1); the config's when omitted.
        seed: seed of the masks. Image i gets the same mask in every batch, and a higher ratio hides additional patches.
            Without `seed`, `mask` and `noise`, the model's evaluation masks are used.
        mask: (B, N) 1 = removed, 0 = kept; the same number removed in each row.
        noise: (B, N) sort keys of patches; those with the smallest are kept.
        statistics: the way back to pixels: "visible", "true" or "raw".

    Raises:
        ValueError: if the model's forward refuses the arguments, statistics are unknown, or the mask hides nothing.
    """
    if statistics not in get_args(Statistics):
        raise ValueError(f"statistics {statistics!r} is unknown; use one of {', '.join(get_args(Statistics))}")
    patch_size, (B, _, H, W) = model.config.patch_height_width, pixel_values.shape
    grid_size = H // patch_size[0], W // patch_size[1]
    if seed is not None:
        if mask is not None or noise is not None:
            raise ValueError("seed can't be combined with mask or noise; pass one of them")
        noise = seeded_noise(seed, B, grid_size[0] * grid_size[1]).to(pixel_values.device)
    output = model(
        pixel_values, mask_ratio=mask_ratio, mask=mask, noise=noise, interpolate_pos_encoding=True, return_loss=False
    )
    patches, predicted = patchify(pixel_values.float(), patch_size), output.logits.float()
    removed = (output.mask == 1).unsqueeze(-1)
    if not removed.any():
        raise ValueError(f"mask_ratio {mask_ratio} hides none of {removed.shape[1]} patches; use e.g. 0.75")
    if model.config.norm_pix_loss and statistics != "raw":
        variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        mean_and_std = torch.cat([mean, (variance + 1e-6).sqrt()], dim=-1)
        if statistics == "visible":
            mean_and_std = from_visible_neighbours(mean_and_std, removed, grid_size)
        predicted = predicted * mean_and_std[..., 1:] + mean_and_std[..., :1]
    masked, predicted, pasted = (
        unpatchify(part, patch_size, grid_size)
        for part in (patches.masked_fill(removed, 0), predicted, torch.where(removed, predicted, patches))
    )
    return Reconstruction(
        pixel_values=pixel_values.float(),
        masked=masked,
        predicted=predicted,
        pasted=pasted,
        removed=unpatchify(removed.expand(B, -1, math.prod(patch_size)), patch_size, grid_size),
        mask_ratio=output.mask.mean().item(),
        statistics=statistics if model.config.norm_pix_loss else None,
    )


def seeded_noise(seed: int, images: int, patches: int) -> torch.Tensor:
    """(images, patches) float32 from U[0, 1); row i doesn't depend on the number of rows."""
    rows = [np.random.default_rng((seed, index)).random(patches, np.float32) for index in range(images)]
    return torch.from_numpy(np.stack(rows))


def from_visible_neighbours(values: torch.Tensor, removed: torch.Tensor, grid_size: tuple[int, int]) -> torch.Tensor:
    """Replace values (B, N, K) of removed patches (B, N, 1) by a weighted mean of the visible ones, N = h * w.

    The weights are a Gaussian of the distance, with a standard deviation of one patch. Removed values are not read.
    """
    rows, columns = torch.meshgrid(*(torch.arange(side, device=values.device) for side in grid_size), indexing="ij")
    places = torch.stack([rows.flatten(), columns.flatten()], dim=1).float()
    nearness = (-0.5 * torch.cdist(places, places) ** 2).masked_fill(removed.transpose(1, 2), -math.inf)  # (B, N, N)
    guess = nearness.softmax(dim=-1) @ values.masked_fill(removed, 0)
    return torch.where(removed, guess, values)


def masked_psnr(images: torch.Tensor, others: torch.Tensor, removed: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB, (B,), of images (B, C, H, W) in [0, 1]; inf if there is no difference.

    Only pixels where `removed` (B, 1, H, W) is True count; every image needs at least one.
    """
    return -10 * _mean_where((images - others) ** 2, removed).log10()


def masked_ssim(images: torch.Tensor, others: torch.Tensor, removed: torch.Tensor) -> torch.Tensor:
    """Structural similarity (Wang et al., 2004), (B,), in windows of 7 x 7 pixels: the mean over the removed pixels.

    The arguments are those of `masked_psnr`; each side of the images has at least 4 pixels.
    """
    return _mean_where(_ssim_map(images, others), removed)


def masked_scores(
    result: Reconstruction, image_mean: Sequence[float], image_std: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """`masked_psnr` and `masked_ssim` of reconstructions, over all channels, (B,) each."""
    like = result.pixel_values
    images, others = (to_unit_range(values, like, image_mean, image_std) for values in (like, result.pasted))
    return masked_psnr(images, others, result.removed), masked_ssim(images, others, result.removed)


def _ssim_map(images: torch.Tensor, others: torch.Tensor, window: int = 7) -> torch.Tensor:
    c1, c2, unbiased = 0.01**2, 0.03**2, window**2 / (window**2 - 1)

    def mean(values: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(F.pad(values, [window // 2] * 4, mode="reflect"), window, stride=1)

    x, y = images.double(), others.double()
    mean_x, mean_y = mean(x), mean(y)
    var_x, var_y, cov = ((mean(a * b) - mean(a) * mean(b)) * unbiased for a, b in ((x, x), (y, y), (x, y)))
    return (2 * mean_x * mean_y + c1) * (2 * cov + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))


def _mean_where(values: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    where = where.expand_as(values)
    return (values * where).sum(dim=(1, 2, 3)) / where.sum(dim=(1, 2, 3))


def to_unit_range(
    images: torch.Tensor, like: torch.Tensor, image_mean: Sequence[float], image_std: Sequence[float]
) -> torch.Tensor:
    """Convert normalised pixels (B, C, H, W) to [0, 1] for display.

    If an original in `like` doesn't fit [0, 1] (16 bits, floats) or is dark, its own range is stretched to [0, 1].
    Mean and standard deviation, one number per channel, undo the normalisation.
    """
    mean, std = (torch.tensor(list(v), device=images.device).view(1, -1, 1, 1) for v in (image_mean, image_std))
    images, like = images.float() * std + mean, like.float() * std + mean
    low, high = like.amin(dim=(1, 2, 3), keepdim=True), like.amax(dim=(1, 2, 3), keepdim=True)
    fits = (low >= -0.01) & (high <= 1.01) & (high > 0.2)
    return torch.where(fits, images, (images - low) / (high - low).clamp_min(1e-8)).clamp(0, 1)
