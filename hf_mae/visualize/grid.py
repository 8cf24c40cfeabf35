"""Pictures of reconstructions."""

import math
from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw

from .reconstruction import Reconstruction, masked_psnr, masked_ssim, to_unit_range

GRAY = 0.5
Column = tuple[str, list[Image.Image], list[str] | None]  # title, pictures, a caption of each
MARGIN, HEADER, CAPTION = 6, 22, 16
# Footers that say where the mean and contrast of hidden patches come from.
FOOTERS: dict[str | None, str] = {
    "visible": "mean and contrast of hidden patches: estimated from the visible patches around them",
    "true": "* uses ground truth: mean and contrast of hidden patches come from the original",
    "raw": "raw: hidden patches without their mean and contrast",
}


def reconstruction_grid(
    reconstructions: Sequence[Reconstruction],
    image_mean: Sequence[float],
    image_std: Sequence[float],
    bands: Sequence[int] | None = None,
    details: bool = False,
    cell: int = 128,
    pairs: int = 1,
) -> Image.Image:
    """A picture with one row for each image: original | masked | reconstruction | reconstruction with visible patches.

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
