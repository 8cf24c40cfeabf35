"""Image -> the model's pixels, step by step: the crop rule, resize and crop, pixel type, normalisation.

    crop_settings, rescale_settings    what an image processor stores of a model's images
    move_crop                          the same crop at another size of the model
    evaluation_spec                    the same, read back from a processor as an ImageSpec
    evaluation_view                    one image, resized and cropped, in the source's pixel type
    make_normalizer                    batches -> pixel_values, on the device

Nothing here is random; training crops are in augment.py. Every command uses these functions. The image processor, with
its own code, which Hub repositories carry, gives the same pixels.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from transformers.image_utils import SizeDict

from ..configuration_mae import MAEConfig
from ..errors import UserError
from ..image_processing_base_mae import center_spans, per_channel, resize_bands, shortest_edge_size
from ..image_processing_mae import MAEImageProcessor
from ..masking_mae import patchify

if TYPE_CHECKING:
    from .decode import BadImage

BICUBIC = Image.Resampling.BICUBIC
LONGEST = 100  # times the shorter side
RATIO = (3 / 4, 4 / 3)  # width/height of training crops, relative to the output's
# Integer pixels times their factor lie in [0, 1]; float images keep their values.
RESCALE_FACTORS = {"uint8": 1 / 255, "uint16": 1 / 65535, "float32": 1.0}


def default_crop_pct(size: tuple[int, int]) -> float:
    """The share of a resized side that the original's crop to `size` keeps: 224 of 256 pixels, and all above 224."""
    return 0.875 if max(size) <= 224 else 1.0


def resize_before_crop(size: tuple[int, int], crop_pct: float) -> int | tuple[int, int]:
    """What to resize to before a centre crop of (height, width): the shorter side for a square one, else both sides.

    The crop is the share `crop_pct` of a resized side, in (0, 1]: 0.875 is 224 of 256 pixels. Sides are rounded down,
    as the original and timm do: 32 pixels at 0.875 are cut out of 36.
    """
    # 224 / (224 / 248) must not become 247.
    height, width = (math.floor(side / crop_pct + 1e-6) for side in size)
    return height if size[0] == size[1] else (height, width)


def crop_settings(size: tuple[int, int], crop_pct: float) -> dict[str, Any]:
    """An image processor's settings of the evaluation crop.

    Args:
        size: (height, width) of the crop in pixels.
        crop_pct: share of a resized side that the crop keeps, in (0, 1].

    Returns:
        `size` (what to resize to, see `resize_before_crop`) and `crop_size`.
    """
    resize = resize_before_crop(size, crop_pct)
    return {
        "size": {"shortest_edge": resize} if isinstance(resize, int) else {"height": resize[0], "width": resize[1]},
        "crop_size": {"height": size[0], "width": size[1]},
    }


def stored_crop_pct(processor: MAEImageProcessor) -> float:
    """The share of a resized side that a processor's crop keeps, in (0, 1].

    Of all shares that give the processor's sizes, a usual one is taken, else the one with the fewest digits.
    """
    size: Any = processor.size
    crop = _crop(processor)
    resize = size.shortest_edge or (size.height, size.width)
    sides = (min(crop), resize) if isinstance(resize, int) else (crop[0], resize[0])
    # Sizes are rounded down: 8 of 9 pixels are 0.875, not 8/9, and 0.77 of 290 are not 224.
    shares = [1.0, 0.875, 0.9, 0.95, *(10**digits * sides[0] // sides[1] / 10**digits for digits in range(2, 7))]
    return next((share for share in shares if resize_before_crop(crop, share) == resize), sides[0] / sides[1])


def _crop(processor: MAEImageProcessor) -> tuple[int, int]:
    size: Any = processor.crop_size
    return size.height, size.width


def move_crop(processor: MAEImageProcessor, size: tuple[int, int]) -> None:
    """Make a processor crop to another (height, width) in pixels, with the same share of a resized side; in place."""
    if size != _crop(processor):
        for name, sides in crop_settings(size, stored_crop_pct(processor)).items():
            setattr(processor, name, SizeDict(**sides))
        processor.do_resize = processor.do_center_crop = True


def rescale_settings(dtype: str) -> dict[str, Any]:
    """An image processor's settings for images of a pixel type."""
    return {"do_rescale": dtype != "float32", "rescale_factor": RESCALE_FACTORS[dtype]}


def pixel_dtype(processor: MAEImageProcessor) -> str:
    """The type of the images that a processor was made for: "uint8", "uint16" or "float32"."""
    factor = processor.rescale_factor if processor.do_rescale else 1.0
    if math.isclose(factor, RESCALE_FACTORS["uint16"], rel_tol=1e-3):
        return "uint16"
    return "uint8" if 1 / 256 < factor < 1 else "float32"  # 1/127.5 is for 8 bits too


def normalization(processor: MAEImageProcessor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel, for rescaled pixels; 0 and 1 if a processor doesn't normalise."""
    channels: int = processor.num_channels
    if not processor.do_normalize:
        return [0.0] * channels, [1.0] * channels
    values: Any = processor.image_mean, processor.image_std
    return list(per_channel("image_mean", values[0], channels)), list(per_channel("image_std", values[1], channels))


@dataclass(frozen=True)
class ImageSpec:
    """What a batch's images are like, and how they are cropped.

    Args:
        size: (height, width) in pixels.
        num_channels: C.
        dtype: of the pixels: "uint8", "uint16" or "float32".
        num_patches: N, for the mask noise.
        crop_scale: smallest and largest fraction of the area that a training crop keeps.
        flip: mirror half of the training crops.
        masks: number of masks drawn for each training image.
        eval_resize: pixels of the shorter side, or (height, width), before the evaluation crop.
        resample: the `PIL.Image.Resampling` filter of the evaluation view.
        one_draw: whether a training crop is drawn only once, see `random_resized_crop_box`.
        nodata: value, in the unit of `dtype`, that stands for a missing pixel besides NaN; None if there is none.
    """

    size: tuple[int, int]
    num_channels: int
    dtype: str
    num_patches: int
    crop_scale: tuple[float, float] = (0.2, 1.0)
    flip: bool = True
    masks: int = 1
    eval_resize: int | tuple[int, int] = 256
    resample: int = BICUBIC
    one_draw: bool = False
    nodata: float | None = None

    @property
    def batch_dtype(self) -> str:
        """Of the pixels in a batch: `dtype`, or "float32" where some may be NaN because of `nodata`."""
        return self.dtype if self.nodata is None else "float32"

    def decode(self, data: "bytes | np.ndarray | BadImage", for_crops: bool = False) -> Image.Image | np.ndarray:
        """`decode_image` with these settings; `for_crops` lets it reduce JPEGs (see `pixels_needed`)."""
        from .decode import decode_image  # here, because conversion needs the crop rule and no decoder

        least = pixels_needed(self.size, self.crop_scale) if for_crops else None
        return decode_image(data, self.num_channels, self.dtype, least, self.nodata)

    def evaluation_view(self, image: Image.Image | np.ndarray) -> np.ndarray:
        """The evaluation view (C, H, W) of a decoded image."""
        return evaluation_view(image, self.eval_resize, self.size, self.resample)


def pixels_needed(size: tuple[int, int], scale: Sequence[float]) -> int:
    """How many pixels an image needs so that no random crop has to be enlarged to the output's size."""
    return math.ceil(size[0] * size[1] * RATIO[1] / scale[0])


def evaluation_spec(config: MAEConfig, processor: MAEImageProcessor) -> ImageSpec:
    """The evaluation view that a processor describes, for the model that it belongs to.

    Raises:
        UserError: if the processor gives images of another size than the model's.
    """
    size: Any = processor.size
    given = _crop(processor) if processor.do_center_crop else (size.height, size.width)
    if not processor.do_resize or given != config.image_height_width:
        how = given if processor.do_resize else "any size (do_resize false)"
        raise UserError(f"the image processor gives images of {how}, not of the model's {config.image_height_width}")
    return ImageSpec(
        size=config.image_height_width,
        num_channels=config.num_channels,
        dtype=pixel_dtype(processor),
        num_patches=config.num_patches,
        eval_resize=size.shortest_edge or (size.height, size.width),
        resample=processor.resample,
        nodata=processor.nodata,
    )


def evaluation_view(
    image: Image.Image | np.ndarray, resize: int | tuple[int, int], size: tuple[int, int], resample: int = BICUBIC
) -> np.ndarray:
    """Resize and centre crop, with exactly the pixels of the Pillow image processor.

    If an image is more than `LONGEST` times as long as it is wide, only its middle is resized. The crop doesn't show
    the rest, and a line of 65,535 x 1 pixels would become 16,776,960 x 256.

    Args:
        image: as `decode_image` returns it.
        resize: pixels of the shorter side, or (height, width), before the crop.
        size: (height, width) of the crop in pixels; zeros surround an image that is smaller.
        resample: a `PIL.Image.Resampling` filter.

    Returns:
        (C, H, W) in the image's dtype, contiguous and writable.
    """
    height, width = size_of(image)
    left = upper = 0
    if isinstance(resize, int):
        left, upper = max(0, (width - LONGEST * height) // 2), max(0, (height - LONGEST * width) // 2)
        height, width = height - 2 * upper, width - 2 * left
        resize = shortest_edge_size(height, width, resize)
    view = _resize(image, resize, (left, upper, left + width, upper + height), resample)
    (rows, columns), zeros = center_spans(*resize, SizeDict(height=size[0], width=size[1]))
    return np.pad(view[rows, columns].transpose(2, 0, 1), ((0, 0), *zeros))


def size_of(image: Image.Image | np.ndarray) -> tuple[int, int]:
    """(height, width) of an image in pixels."""
    return image.shape[:2] if isinstance(image, np.ndarray) else (image.height, image.width)  # type: ignore[return-value]


def _resize(
    image: Image.Image | np.ndarray, size: tuple[int, int], box: tuple[float, float, float, float], resample: int
) -> np.ndarray:
    """The box of an image, resized to (height, width), as (H, W, C)."""
    if isinstance(image, np.ndarray):
        return resize_bands(image, size, resample, box=box)
    view = np.asarray(image.resize((size[1], size[0]), resample, box=box))
    return view if view.ndim == 3 else view[..., None]


def make_normalizer(
    processor: MAEImageProcessor, device: torch.device | str = "cpu"
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function from images (..., C, H, W), on a device, to a processor's pixel_values.

    Images have its `pixel_dtype`, or are float32 in the same unit.

    NaN, a missing pixel, becomes the mean of its channel.
    """
    # In the images' own units, so that scaling and normalising are one pass.
    factor = processor.rescale_factor if processor.do_rescale else 1.0
    mean, std = (torch.tensor(values, device=device).view(-1, 1, 1) / factor for values in normalization(processor))
    # Not a closure: a partial can be sent to a spawned worker.
    return partial(_normalize, mean=mean, std=std)


def _normalize(images: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    values = (images.float() - mean) / std
    return torch.where(values.isnan(), 0.0, values) if images.is_floating_point() else values


def find_no_data(images: torch.Tensor, patch_size: tuple[int, int]) -> torch.Tensor | None:
    """(B, N) True = every pixel of a patch of `images` (B, C, H, W) is NaN; None for integers, which have no NaN."""
    if not images.is_floating_point():
        return None
    return patchify(images.isnan(), patch_size).all(dim=-1)
