"""The contact sheet of `hf-mae inspect`: some images of each split below a summary of what was found."""

from collections.abc import Sequence
from textwrap import wrap
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ..data.inspect import Tile, describe_split, describe_whole
from .grid import CAPTION, MARGIN, write_picture

ACROSS, SIDE = 12, 96  # images in a row, and the longer side of each in pixels
LINE = 15  # pixels of a line of text
WIDTH = ACROSS * (SIDE + MARGIN) + MARGIN
CHARACTERS = WIDTH // 6  # of a line of text
RED = "#b00020"


def write_contact_sheet(output: str, found: dict[str, Any], tiles: dict[str, list[Tile]]) -> None:
    """Draw the result of `inspect` into a file; a UserError if it can't be written."""
    parts = [_text(describe_whole(found), "black")]
    for name, shown in tiles.items():
        split = found["splits"][name]
        parts += [_text(describe_split(name, split), "black"), _mosaic(shown, split["bands"])]
    faults = [f"! {fault}" for fault in found["faults"]]
    parts.append(_text(faults, RED) if faults else _text(["nothing wrong was found"], "black"))
    sheet = Image.new("RGB", (WIDTH, sum(part.height for part in parts)), "white")
    top = 0
    for part in parts:
        sheet.paste(part, (0, top))
        top += part.height
    write_picture(sheet, output)


def _text(lines: Sequence[str], fill: str) -> Image.Image:
    wrapped = [piece for line in lines for piece in wrap(line, CHARACTERS) or [""]]
    picture = Image.new("RGB", (WIDTH, len(wrapped) * LINE + 2 * MARGIN), "white")
    draw = ImageDraw.Draw(picture)
    for number, line in enumerate(wrapped):
        draw.text((MARGIN, MARGIN + number * LINE), line, fill=fill, font_size=11)
    return picture


def _mosaic(tiles: Sequence[Tile], bands: list[dict[str, Any]]) -> Image.Image:
    down = SIDE + CAPTION
    picture = Image.new("RGB", (WIDTH, -(-len(tiles) // ACROSS) * down), "white")
    draw = ImageDraw.Draw(picture)
    for number, tile in enumerate(tiles):
        left, top = MARGIN + number % ACROSS * (SIDE + MARGIN), number // ACROSS * down
        if tile.pixels is None:
            draw.rectangle((left, top, left + SIDE - 1, top + SIDE - 1), outline=RED)
            draw.text((left + 4, top + SIDE // 2 - 6), "can't be decoded", fill=RED, font_size=10)
        else:
            image = to_picture(tile.pixels, bands)
            picture.paste(image, (left, top))
        draw.text((left, top + SIDE + 1), tile.caption[-15:], fill="black", font_size=10)
    return picture


def to_picture(pixels: np.ndarray, bands: list[dict[str, Any]]) -> Image.Image:
    """(h, w, C) -> RGB with a longer side of `SIDE`: the first three bands, or the first.

    8-bit pixels are shown as they are. Others are stretched from the 1st to the 99th percentile of their band; missing
    pixels are black.
    """
    shown = pixels[:, :, : 3 if pixels.shape[2] >= 3 else 1]
    if shown.dtype != np.uint8:
        low, high = (np.array([band[key] or 0 for band in bands[: shown.shape[2]]]) for key in ("p1", "p99"))
        shown = (shown - low) / np.where(high > low, high - low, 1)
        shown = (np.nan_to_num(shown, nan=0).clip(0, 1) * 255).round().astype(np.uint8)
    image = Image.fromarray(np.broadcast_to(shown, (*shown.shape[:2], 3)).copy())
    scale = SIDE / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size, Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BICUBIC)
