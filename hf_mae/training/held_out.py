"""The evaluation images of a pretraining run: their loss, each with its own fixed mask, and pictures of a few."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from torch import nn

from ..data.decode import BadSample
from ..data.loader import EvaluationSet
from ..data.order import Rows
from ..data.transform import ImageSpec, find_no_data
from ..errors import DataError
from ..evaluation.table import even_batches
from ..image_processing_mae import MAEImageProcessor
from ..modeling_mae import MAEForPreTraining
from ..visualize.grid import reconstruction_grid
from ..visualize.reconstruction import reconstruct

PICTURES = 12


@dataclass
class HeldOut:
    """The evaluation rows of a run."""

    rows: Rows
    spec: ImageSpec  # their evaluation crops
    normalize: Callable[[torch.Tensor], torch.Tensor]  # pixels in the source's dtype -> pixel_values
    batch_size: int  # images per batch, on each process
    num_workers: int
    accelerator: Accelerator
    mask_seed: int  # a row's mask depends on this and on its index
    patch_size: tuple[int, int]  # (height, width) in pixels

    @torch.no_grad()
    def loss(self, model: nn.Module) -> tuple[float, list[BadSample]]:
        """Mean loss, and (key, reason) of the images that can't be decoded; every process must call it.

        Raises:
            DataError: if no image can be decoded.
        """
        accelerator, bad = self.accelerator, list[BadSample]()
        total = torch.zeros(2, device=accelerator.device, dtype=torch.float64)
        model.eval()
        batches = even_batches(
            self.rows, self.spec, self.batch_size, self.num_workers, accelerator, mask_seed=self.mask_seed
        )
        with closing(batches):
            for batch, images, noise in batches:
                bad += batch.bad
                no_data = find_no_data(images, self.patch_size)
                loss = model(self.normalize(images), noise=noise, no_data=no_data).loss
                if count := len(batch.keys):
                    total += torch.stack([loss.double() * count, torch.tensor(count).to(loss)])
        model.train()
        loss_sum, seen = cast(torch.Tensor, accelerator.reduce(total, "sum")).tolist()
        if not seen:
            raise DataError("none of the evaluation images can be decoded; check the data")
        return loss_sum / seen, gather_object(bad)

    def picture(self, model: MAEForPreTraining, processor: MAEImageProcessor) -> Image.Image:
        """Original, masked and reconstructed images, the same ones each time; every process must call it."""
        device = self.accelerator.device
        images, noise = self._shown
        model.eval()
        result = reconstruct(model, self.normalize(images.to(device)), noise=noise.to(device))
        model.train()
        return reconstruction_grid([result], processor.image_mean, processor.image_std, pairs=2)

    @cached_property
    def _shown(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The first images that can be decoded, and the noise of their masks."""
        batch = next(batch for batch in EvaluationSet(self.rows, self.spec, PICTURES, self.mask_seed) if batch.keys)
        return batch.images, batch.noise
