"""Pictures of reconstructions."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageOps

from ..files import writing
from .reconstruction import Reconstruction, masked_psnr, masked_ssim, to_unit_range

GRAY = 0.5
Column = tuple[str, list[Image.Image], list[str] | None]  # title, pictures, a caption for each
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
    """A picture with one row for each image: original | masked | predicted patches | visible and predicted patches.

    Args:
        reconstructions: of the same images with the same `statistics`, e.g. with several mask ratios; all columns but
            the first are repeated for each.
        image_mean: (C,) mean that the normalisation subtracted.
        image_std: (C,) standard deviation that the normalisation divided by.
        bands: one channel or three (red, green, blue) to show, from 0. When omitted, the first three, or the first.
        details: also show an error map of the hidden patches (white: none, dark red: a quarter of the range or more),
            and PSNR and SSIM of the hidden part below each row.
        cell: longer side of an image in the picture, in pixels; small images are enlarged without smoothing.
        pairs: number of images side by side in the picture.

    Raises:
        ValueError: if the images lack a channel in `bands`, or `bands` isn't one channel or three.
    """
    images = reconstructions[0].pixel_values
    original = shown_bands(images, images, image_mean, image_std, bands)
    columns: list[Column] = [("original", to_pictures(original, cell), None)]
    for result in reconstructions:
        star = "*" if result.statistics == "true" else ""
        pasted, removed = shown_bands(result.pasted, images, image_mean, image_std, bands), result.removed
        masked, predicted = torch.where(removed, GRAY, pasted), torch.where(removed, pasted, GRAY)
        scores = zip(masked_psnr(original, pasted, removed), masked_ssim(original, pasted, removed), strict=True)
        captions = [f"{psnr.item():.1f} dB, SSIM {ssim.item():.2f}" for psnr, ssim in scores]
        columns += [
            (f"masked {result.mask_ratio:.0%}", to_pictures(masked, cell), None),
            (f"predicted patches{star}", to_pictures(predicted, cell), None),
            (f"visible + predicted{star}", to_pictures(pasted, cell), captions),
        ]
        if details:
            columns.append(("error (red = large)", to_pictures(_error_map(original, pasted, removed), cell), None))
    return _arrange(columns, details, FOOTERS.get(reconstructions[0].statistics), min(pairs, len(images)))


def shown_bands(
    images: torch.Tensor,
    like: torch.Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    bands: Sequence[int] | None = None,
) -> torch.Tensor:
    """`to_unit_range` of the channels to show, (B, 1 or 3, H, W); see `reconstruction_grid`."""
    channels = images.shape[1]
    chosen = list(range(3 if channels >= 3 else 1)) if bands is None else list(bands)
    if len(chosen) not in (1, 3) or not all(0 <= band < channels for band in chosen):
        raise ValueError(f"bands {chosen} can't be shown; give one or three numbers from 0 to {channels - 1}")
    mean, std = ([float(values[band]) for band in chosen] for values in (mean, std))
    return to_unit_range(images[:, chosen], like[:, chosen], mean, std)


def _error_map(images: torch.Tensor, others: torch.Tensor, removed: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W): white for no error, dark red for a quarter of the range or more, grey where nothing was hidden."""
    error = ((images - others).abs().mean(dim=1, keepdim=True) * 4).clamp(0, 1)
    colours = torch.cat([1 - 0.3 * error, 1 - error, 1 - error], dim=1)
    return torch.where(removed, colours, GRAY)


def to_pictures(images: torch.Tensor, cell: int) -> list[Image.Image]:
    """(B, 1 or 3, H, W) in [0, 1] -> RGB, longer side `cell` pixels; small images are enlarged without smoothing."""
    H, W = images.shape[-2:]
    size = max(1, round(W * cell / max(H, W))), max(1, round(H * cell / max(H, W)))
    how = Image.Resampling.NEAREST if max(H, W) <= cell else Image.Resampling.BICUBIC
    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).expand(-1, -1, -1, 3).cpu().numpy()
    return [Image.fromarray(image).resize(size, how) for image in pixels]


def _arrange(columns: Sequence[Column], captions: bool, footer: str | None, pairs: int) -> Image.Image:
    """Put the columns into one picture."""
    width, height = columns[0][1][0].size
    across, down = width + MARGIN, height + MARGIN + (CAPTION if captions else 0)
    step, count = len(columns) * across + 2 * MARGIN, len(columns[0][1])
    grid = Image.new("RGB", (pairs * step, HEADER + -(-count // pairs) * down), "white")
    draw = ImageDraw.Draw(grid)
    for number, (title, pictures, texts) in enumerate(columns):
        for index, picture in enumerate(pictures):
            left, top = index % pairs * step + MARGIN + number * across, HEADER + index // pairs * down
            if index < pairs:
                draw.text((left, 5), title, fill="black", font_size=11)
            grid.paste(picture, (left, top))
            if captions and texts:
                draw.text((left, top + height + 1), texts[index], fill="black", font_size=11)
    if footer:
        # The picture may be narrower than the footer.
        missing = max(0, 2 * MARGIN + math.ceil(draw.textlength(footer, font_size=12)) - grid.width)
        grid = ImageOps.expand(grid, (0, 0, missing, HEADER), "white")
        ImageDraw.Draw(grid).text((MARGIN, grid.height - HEADER + 2), footer, fill="black", font_size=12)
    return grid


def write_picture(picture: Image.Image, output: str) -> None:
    """Write the file that a user named by `--output`; a UserError if it can't be written."""
    with writing(output, "--output"):
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        picture.save(output)


def with_title(picture: Image.Image, text: str) -> Image.Image:
    """The picture below a line of text."""
    taller = ImageOps.expand(picture, (0, HEADER, 0, 0), "white")
    ImageDraw.Draw(taller).text((MARGIN, 5), text, fill="black", font_size=12)
    return taller
