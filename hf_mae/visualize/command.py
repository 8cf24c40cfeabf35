"""`hf-mae reconstruct`: draw a model's reconstructions of images, with the model's evaluation crop."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..data.decode import BadImage
from ..data.order import Rows
from ..data.sources import open_source
from ..data.transform import evaluation_spec, make_normalizer, move_crop, normalization
from ..errors import DataError, UserError
from ..keys import height_width
from ..keys.publishing_keys import ReconstructRecipe
from ..modeling_mae import MAEForPreTraining
from ..pretrained import load_with_processor
from .grid import reconstruction_grid, write_picture
from .reconstruction import masked_scores, reconstruct


class Reconstructor:
    """A pretrained model with its image processor: images of any kind -> pixel_values -> reconstructions.

    Args:
        path: folder or Hub id of the model.
        image_size: height and width of the crop in pixels, or one number for a square; the model's when omitted.

    Raises:
        UserError: if the model can't be loaded, has no decoder, or can't take this size.
    """

    def __init__(self, path: str, image_size: Sequence[int] | None = None):
        overrides = {} if image_size is None else {"image_size": [image_size[0], image_size[-1]]}
        model, self.processor = load_with_processor(MAEForPreTraining, path, **overrides)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model: MAEForPreTraining = model.to(self.device)  # pyright: ignore[reportArgumentType]
        if image_size is not None:
            move_crop(self.processor, model.config.image_height_width)
        self.spec = evaluation_spec(model.config, self.processor)
        self.normalize = make_normalizer(self.processor, self.device)
        self.mean, self.std = normalization(self.processor)  # to show pixel_values

    def pixel_values(self, images: Sequence[bytes | np.ndarray | Image.Image]) -> torch.Tensor:
        """Normalised pixels (B, C, H, W) of encoded files, arrays (H, W, C) or Pillow images.

        Raises:
            BadImage: if one can't be decoded.
        """
        decoded = (image if isinstance(image, Image.Image) else self.spec.decode(image) for image in images)
        views = [self.spec.evaluation_view(image) for image in decoded]
        return self.normalize(torch.from_numpy(np.stack(views)).to(self.device))


def reconstruct_files(recipe: ReconstructRecipe) -> dict[str, Any]:
    """Draw the reconstructions of images.

    Returns:
        `path`: the picture's file; `images`: the number of images in it; `bad`: (key, reason) of images that can't be
        decoded; `scores`: the mean `psnr` (dB) and `ssim` of the hidden part for each mask ratio.

    Raises:
        UserError: if the images, the model or a key can't be used, or the picture can't be written.
    """
    size = None if recipe.image_size is None else height_width(recipe.image_size)
    reconstructor = Reconstructor(recipe.model, size)
    values, bad = [], []
    for key, data in find_images(recipe.images, recipe.split, recipe.max_images):
        try:
            values.append(reconstructor.pixel_values([data]))
        except BadImage as error:
            bad.append((key, str(error)))
    if not values:
        raise DataError(f"{bad[0][0]} can't be shown: {bad[0][1]}; give an image file")
    pixel_values = torch.cat(values)
    try:
        results = [
            reconstruct(reconstructor.model, pixel_values, ratio, recipe.seed, statistics=recipe.statistics)
            for ratio in recipe.mask_ratios or [reconstructor.model.config.mask_ratio]
        ]
        mean, std = reconstructor.mean, reconstructor.std
        picture = reconstruction_grid(results, mean, std, recipe.bands, details=True, cell=recipe.cell)
    except ValueError as error:
        raise UserError(str(error)) from error
    write_picture(picture, recipe.output)
    scores = []
    for result in results:
        psnr, ssim = (score.mean().item() for score in masked_scores(result, mean, std))
        scores.append({"mask_ratio": result.mask_ratio, "psnr": psnr, "ssim": ssim})
    return {"path": recipe.output, "images": len(pixel_values), "bad": bad, "scores": scores}


def find_images(names: Sequence[str], split: str, most: int) -> Iterator[tuple[str, Any]]:
    """(key, undecoded image) of files, folders and data sets; at most `most` images of each folder or data set."""
    for name in names:
        path = Path(name)
        if path.is_file() and path.suffix not in (".parquet", ".tar"):
            yield name, path.read_bytes()
            continue
        if not path.exists() and path.suffix.lower() in Image.registered_extensions():
            raise DataError(f"there is no file {name}; check --images")
        rows = Rows(open_source(name, split=split), max_samples=most)
        for row in rows.read(rows.index):
            yield row.key, row.image
