"""`hf-mae reconstruct`: pictures of what a model makes of any images, by the evaluation crop it was trained with."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from PIL import Image

from ..data.decode import BadImage, decode_image
from ..data.order import Rows
from ..data.sources import DataError, open_source
from ..data.transform import evaluation_spec, evaluation_view, make_normalizer, resize_before_crop, stored_crop_pct
from ..errors import UserError
from ..modeling_mae import MAEForPreTraining
from ..pretrained import load_with_processor
from .grid import reconstruction_grid
from .reconstruction import Statistics, masked_scores, reconstruct


@dataclass
class ReconstructRecipe:
    """Keys of `hf-mae reconstruct`."""

    model: str = field(metadata={"help": "folder or Hub id of a pretrained model"})
    images: list[str] = field(metadata={"help": "image files, folders of them, or data sets as for hf-mae pretrain"})
    out: str = field(default="reconstruction.png", metadata={"help": "picture to write"})
    mask_ratios: list[float] = field(
        default_factory=lambda: [0.75], metadata={"help": "fractions of patches to hide, one after the other"}
    )
    seed: int = field(default=0, metadata={"help": "of the masks"})
    statistics: Statistics = field(
        default="visible",
        metadata={"help": "mean and contrast of hidden patches from the visible ones, the true ones, or none (raw)"},
    )
    max_images: int = field(default=8, metadata={"help": "of each folder or data set, evenly spaced"})
    split: str = field(default="train", metadata={"help": "of a data set"})
    image_size: list[int] | None = field(
        default=None, metadata={"help": "height and width of the crop; the model's when omitted"}
    )
    bands: list[int] | None = field(
        default=None, metadata={"help": "channels to show as red, green, blue, or one, from 0; the first when omitted"}
    )
    cell: int = field(default=128, metadata={"help": "pixels of an image's longer side in the picture"})

    def check(self) -> None:
        """Raise a UserError for a value that can't be."""
        if Path(self.out).suffix.lower() not in (".png", ".webp", ".jpg", ".jpeg"):
            raise UserError(f"out {self.out} is no name of a picture; give it the ending .png, .webp or .jpg")
        if self.statistics not in get_args(Statistics):
            raise UserError(f"statistics {self.statistics} is none of {', '.join(get_args(Statistics))}")
        if self.image_size is not None and len(self.image_size) not in (1, 2):
            raise UserError(f"image_size {self.image_size} has {len(self.image_size)} numbers; give height and width")
        for key, least in (("max_images", 1), ("cell", 16), ("seed", 0)):
            if getattr(self, key) < least:
                raise UserError(f"{key} {getattr(self, key)} is too small; give {least} or more")


class Reconstructor:
    """A pretrained model with its image processor: images of any kind -> pixel_values -> reconstructions.

    Args:
        path: folder or Hub id.
        image_size: height and width of the crop, or one number for both; the model's own when omitted.

    Raises:
        DataError: if there is no model, it has no decoder, or it can't take this size.
    """

    def __init__(self, path: str, image_size: Sequence[int] | None = None):
        overrides = {} if image_size is None else {"image_size": [image_size[0], image_size[-1]]}
        model, self.processor = load_with_processor(MAEForPreTraining, path, **overrides)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model: MAEForPreTraining = model.to(self.device)  # pyright: ignore[reportArgumentType]
        self.spec = evaluation_spec(model.config, self.processor)
        if image_size is not None:
            # What is cut off is the same share as at the processor's own size.
            resize = resize_before_crop(self.spec.size, stored_crop_pct(self.processor))
            self.spec = replace(self.spec, eval_resize=resize)
        self.normalize = make_normalizer(self.processor, self.spec.dtype, self.device)

    def pixel_values(self, images: Sequence[bytes | np.ndarray | Image.Image]) -> torch.Tensor:
        """(B, C, H, W) of files' bytes, arrays (H, W, C) or Pillow images.

        Raises:
            BadImage: if one can't be decoded.
        """
        views = []
        for image in images:
            if not isinstance(image, Image.Image):
                image = decode_image(image, self.spec.num_channels, self.spec.dtype)
            views.append(evaluation_view(image, self.spec.eval_resize, self.spec.size))
        return self.normalize(torch.from_numpy(np.stack(views)).to(self.device))


def reconstruct_files(recipe: ReconstructRecipe) -> dict[str, Any]:
    """Draw the reconstructions of images.

    Returns:
        `path` of the picture; `images` in it; `bad`: (key, reason) of those that can't be decoded; `scores`: for each
        mask ratio, the mean `psnr` (dB) and `ssim` of the hidden part.

    Raises:
        UserError: for what a user can mend; one line with the remedy.
    """
    recipe.check()
    reconstructor = Reconstructor(recipe.model, recipe.image_size)
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
            for ratio in recipe.mask_ratios
        ]
        mean, std = reconstructor.processor.image_mean, reconstructor.processor.image_std
        picture = reconstruction_grid(results, mean, std, recipe.bands, details=True, cell=recipe.cell)
    except ValueError as error:
        raise UserError(str(error)) from error
    try:
        Path(recipe.out).parent.mkdir(parents=True, exist_ok=True)
        picture.save(recipe.out)
    except OSError as error:
        raise UserError(f"{recipe.out} can't be written: {error}") from error
    scores = []
    for result in results:
        psnr, ssim = masked_scores(result, mean, std)
        scores.append({"mask_ratio": result.mask_ratio, "psnr": psnr.mean().item(), "ssim": ssim.mean().item()})
    return {"path": recipe.out, "images": len(pixel_values), "bad": bad, "scores": scores}


def find_images(names: Sequence[str], split: str, most: int) -> Iterator[tuple[str, Any]]:
    """(key, undecoded image) of files, folders and data sets.

    Args:
        names: paths or names of data sets.
        split: of data sets.
        most: images of each folder or data set.

    Raises:
        DataError: if there is no such file or data set.
    """
    for name in names:
        if Path(name).is_file() and Path(name).suffix not in (".parquet", ".tar"):
            yield name, Path(name).read_bytes()
            continue
        if not Path(name).exists() and Path(name).suffix.lower() in Image.registered_extensions():
            raise DataError(f"there is no file {name}; check --images")
        rows = Rows(open_source(name, split=split), max_samples=most)
        for row in rows.read(rows.index):
            yield row.key, row.image
