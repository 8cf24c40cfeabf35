"""What a model makes of masked images, and pictures of it: original | masked | reconstruction (Pillow alone)."""

# Shape letters in this file
#   B images   C channels   H, W pixels   N patches per image   V numbers in a patch

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from .masking_mae import patchify, unpatchify
from .modeling_mae import MAEForPreTraining

Statistics = Literal["visible", "true", "raw"]
GRAY = 0.5
Column = tuple[str, list[Image.Image], list[str] | None]  # title, pictures, a caption of each
MARGIN, HEADER, CAPTION = 6, 22, 16
# What a picture says of each way back.
FOOTERS: dict[str | None, str] = {
    "visible": "mean and contrast of hidden patches: estimated from the visible patches around them",
    "true": "* uses ground truth: mean and contrast of hidden patches come from the original",
    "raw": "raw: hidden patches without their mean and contrast",
}


@dataclass
class Reconstruction:
    """Images, what a model was shown of them, and what it made of that.

    Args:
        pixel_values: (B, C, H, W) the images, normalised, as all that follow.
        masked: (B, C, H, W) the visible patches, zero elsewhere.
        predicted: (B, C, H, W) what the model gives for every patch, also the visible ones, which no loss trains.
        pasted: (B, C, H, W) predictions where patches were removed, the image elsewhere.
        removed: (B, 1, H, W) True where a patch was removed.
        mask_ratio: fraction of patches that were removed.
        statistics: where mean and contrast of removed patches are from; None where the model predicts them.
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

    - "visible": with the mean and contrast of the visible patches around, the nearest first. Reads no hidden pixel.
    - "true": with the hidden patch's own, as if they were known. Uses ground truth: say so wherever you show it
      (`reconstruction_grid` does).
    - "raw": with none: every patch has mean 0 and variance 1 of the normalised pixels, and the picture looks blocky.

    For a model trained on plain pixels they are all the same.

    Args:
        model: in evaluation mode.
        pixel_values: (B, C, H, W) normalised pixels, of any size that patches divide.
        mask_ratio: fraction of patches to hide; the config's when omitted.
        seed: draws the masks: image i gets the same one in every batch, and a higher ratio hides more of the same.
            Without it, `mask` and `noise`, they are the model's evaluation masks.
        mask: (B, N) the caller's own choice, 1 = removed, the same number in each row.
        noise: (B, N) sort keys of patches, as the model takes them.
        statistics: the way back.

    Raises:
        ValueError: as the model's forward, and for another way back.
    """
    if statistics not in get_args(Statistics):
        raise ValueError(f"statistics {statistics!r} is none of {', '.join(get_args(Statistics))}")
    patch_size, (B, _, H, W) = model.config.patch_height_width, pixel_values.shape
    grid_size = H // patch_size[0], W // patch_size[1]
    if seed is not None:
        if mask is not None or noise is not None:
            raise ValueError("seed came with mask or noise, which make it void; pass one of them")
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
    pixels = patch_size[0] * patch_size[1]
    masked, predicted, pasted = (
        unpatchify(part, patch_size, grid_size)
        for part in (patches.masked_fill(removed, 0), predicted, torch.where(removed, predicted, patches))
    )
    return Reconstruction(
        pixel_values=pixel_values.float(),
        masked=masked,
        predicted=predicted,
        pasted=pasted,
        removed=unpatchify(removed.expand(B, -1, pixels), patch_size, grid_size),
        mask_ratio=output.mask.mean().item(),
        statistics=statistics if model.config.norm_pix_loss else None,
    )


def seeded_noise(seed: int, images: int, patches: int) -> torch.Tensor:
    """(images, patches) float32 from U[0, 1): row i is the same however many rows there are."""
    rows = [np.random.default_rng((seed, index)).random(patches, np.float32) for index in range(images)]
    return torch.from_numpy(np.stack(rows))


def from_visible_neighbours(values: torch.Tensor, removed: torch.Tensor, grid_size: tuple[int, int]) -> torch.Tensor:
    """Replace numbers of removed patches by a mean over the visible ones, weighted by a Gaussian one patch wide.

    Args:
        values: (B, N, K) numbers of every patch; those of removed ones are not read.
        removed: (B, N, 1) True where a patch was removed.
        grid_size: (h, w), N = h * w.
    """
    rows, columns = torch.meshgrid(*(torch.arange(side, device=values.device) for side in grid_size), indexing="ij")
    places = torch.stack([rows.flatten(), columns.flatten()], dim=1).float()
    nearness = (-0.5 * torch.cdist(places, places) ** 2).masked_fill(removed.transpose(1, 2), -math.inf)  # (B, N, N)
    guess = nearness.softmax(dim=-1) @ values.masked_fill(removed, 0)
    return torch.where(removed, guess, values)


# ------------------------------------------------------------------------------------------ scores


def masked_psnr(images: torch.Tensor, others: torch.Tensor, removed: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB over the removed pixels, (B,); inf where there is no difference.

    Args:
        images: (B, C, H, W) in [0, 1].
        others: (B, C, H, W) in [0, 1].
        removed: (B, 1, H, W) True where pixels count; some in every image.
    """
    return -10 * _mean_where((images - others) ** 2, removed).log10()


def masked_ssim(images: torch.Tensor, others: torch.Tensor, removed: torch.Tensor) -> torch.Tensor:
    """Structural similarity (Wang et al., 2004) with a window of 7 x 7 pixels, mean over the removed pixels, (B,).

    Args:
        images: (B, C, H, W) in [0, 1], 4 pixels or more a side.
        others: (B, C, H, W) in [0, 1].
        removed: (B, 1, H, W) True where pixels count; some in every image.
    """
    return _mean_where(_ssim_map(images, others), removed)


def masked_scores(
    result: Reconstruction, image_mean: Sequence[float], image_std: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """`masked_psnr` and `masked_ssim` of reconstructions, over all channels, (B,) each."""
    images, others = (
        to_unit_range(values, result.pixel_values, image_mean, image_std)
        for values in (result.pixel_values, result.pasted)
    )
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
    """Normalised pixels as they are shown, in [0, 1].

    Args:
        images: (B, C, H, W) normalised.
        like: (B, C, H, W) the originals. Where these don't fill [0, 1] (16 bits, floats, dark images), their own range
            becomes it, for `images` alike.
        image_mean: per channel, to undo the normalisation.
        image_std: per channel.
    """
    mean, std = (torch.tensor(list(v), device=images.device).view(1, -1, 1, 1) for v in (image_mean, image_std))
    images, like = images.float() * std + mean, like.float() * std + mean
    low, high = like.amin(dim=(1, 2, 3), keepdim=True), like.amax(dim=(1, 2, 3), keepdim=True)
    fits = (low >= -0.01) & (high <= 1.01) & (high > 0.2)
    return torch.where(fits, images, (images - low) / (high - low).clamp_min(1e-8)).clamp(0, 1)


# ------------------------------------------------------------------------------------------ pictures


def reconstruction_grid(
    reconstructions: Sequence[Reconstruction],
    image_mean: Sequence[float],
    image_std: Sequence[float],
    bands: Sequence[int] | None = None,
    details: bool = False,
    cell: int = 128,
    pairs: int = 1,
) -> Image.Image:
    """A picture with one row an image: original | masked | reconstruction | reconstruction with the visible patches.

    Args:
        reconstructions: of the same images, in the same way, e.g. with several mask ratios; the last three columns are
            repeated for each.
        image_mean: per channel, to undo the normalisation.
        image_std: per channel.
        bands: one channel or three (red, green, blue) to show, from 0; the first three when omitted, or the first.
        details: also show where the error is, and the scores of the hidden part.
        cell: pixels of an image's longer side in the picture; small images are enlarged without smoothing.
        pairs: rows side by side.

    Raises:
        ValueError: if there are no such channels.
    """
    original = reconstructions[0].pixel_values
    chosen = _check_bands(bands, original.shape[1])

    def shown(images: torch.Tensor) -> torch.Tensor:
        kept = [[float(values[band]) for band in chosen] for values in (image_mean, image_std)]
        return to_unit_range(images[:, chosen], original[:, chosen], *kept)

    columns: list[Column] = [("original", to_pictures(shown(original), cell), None)]
    for result in reconstructions:
        star = "*" if result.statistics == "true" else ""
        pasted = shown(result.pasted)
        masked, predicted = torch.where(result.removed, GRAY, pasted), torch.where(result.removed, pasted, GRAY)
        columns += [
            (f"masked {result.mask_ratio:.0%}", to_pictures(masked, cell), None),
            (f"reconstruction{star}", to_pictures(predicted, cell), None),
            (f"with visible{star}", to_pictures(pasted, cell), _scores(shown(original), pasted, result.removed)),
        ]
        if details:
            columns.append(("error", to_pictures(_error_map(shown(original), pasted, result.removed), cell), None))
    return _arrange(columns, details, FOOTERS.get(reconstructions[0].statistics), min(pairs, len(original)))


def _check_bands(bands: Sequence[int] | None, channels: int) -> list[int]:
    chosen = list(range(3 if channels >= 3 else 1)) if bands is None else list(bands)
    if len(chosen) not in (1, 3) or not all(0 <= band < channels for band in chosen):
        raise ValueError(f"bands {chosen} can't be shown; give one or three of 0 to {channels - 1}")
    return chosen


def _scores(images: torch.Tensor, others: torch.Tensor, removed: torch.Tensor) -> list[str]:
    psnr, ssim = masked_psnr(images, others, removed), masked_ssim(images, others, removed)
    return [f"{p:.1f} dB, SSIM {s:.2f}" for p, s in zip(psnr.tolist(), ssim.tolist(), strict=True)]


def _error_map(images: torch.Tensor, others: torch.Tensor, removed: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W): white without an error, red from a quarter of the range on, gray where nothing was hidden."""
    error = ((images - others).abs().mean(dim=1, keepdim=True) * 4).clamp(0, 1)
    colours = torch.cat([1 - 0.3 * error, 1 - error, 1 - error], dim=1)
    return torch.where(removed, colours, GRAY)


def to_pictures(images: torch.Tensor, cell: int) -> list[Image.Image]:
    """(B, 1 or 3, H, W) in [0, 1] -> RGB with this longer side; small images are enlarged without smoothing."""
    longest = max(images.shape[-2:])
    size = (max(1, round(images.shape[-1] * cell / longest)), max(1, round(images.shape[-2] * cell / longest)))
    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    pictures = [
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).convert("RGB") for image in pixels
    ]
    how = Image.Resampling.NEAREST if longest <= cell else Image.Resampling.BICUBIC
    return [picture.resize(size, how) for picture in pictures]


def _arrange(columns: Sequence[Column], captions: bool, footer: str | None, pairs: int) -> Image.Image:
    """Columns in one picture."""
    width, height = columns[0][1][0].size
    across, down = width + MARGIN, height + MARGIN + (CAPTION if captions else 0)
    step, count = len(columns) * across + 2 * MARGIN, len(columns[0][1])
    grid = Image.new("RGB", (pairs * step, HEADER + -(-count // pairs) * down), "white")
    draw = ImageDraw.Draw(grid)
    for number, (title, pictures, texts) in enumerate(columns):
        for index, picture in enumerate(pictures):
            left, top = index % pairs * step + MARGIN + number * across, HEADER + index // pairs * down
            if index < pairs:
                draw.text((left, 5), title, fill="black", font_size=12)
            grid.paste(picture, (left, top))
            if captions and texts:
                draw.text((left, top + height + 1), texts[index], fill="black", font_size=11)
    return _with_footer(grid, footer) if footer else grid


def with_title(picture: Image.Image, text: str) -> Image.Image:
    """The picture below a line of text."""
    taller = Image.new("RGB", (picture.width, picture.height + HEADER), "white")
    taller.paste(picture, (0, HEADER))
    ImageDraw.Draw(taller).text((MARGIN, 5), text, fill="black", font_size=12)
    return taller


def _with_footer(grid: Image.Image, text: str) -> Image.Image:
    # A picture of one image is narrower than the text.
    width = 2 * MARGIN + math.ceil(ImageDraw.Draw(grid).textlength(text, font_size=12))
    taller = Image.new("RGB", (max(grid.width, width), grid.height + HEADER), "white")
    taller.paste(grid, (0, 0))
    ImageDraw.Draw(taller).text((MARGIN, grid.height + 2), text, fill="black", font_size=12)
    return taller
