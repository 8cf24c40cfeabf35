"""The quality of an encoder during its training: kNN, a linear classifier and RankMe on a few images."""

from collections.abc import Callable
from copy import copy
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import register_fsdp_forward_method

from ..data.order import Rows
from ..data.transform import ImageSpec
from ..errors import DataError
from .fast_linear import fast_linear_accuracy
from .knn import knn_accuracy
from .table import Table, encoded_batches, extract_table, rankme, with_class_numbers

NEIGHBOURS = 20


class OnlineEvaluator:
    """Measures an encoder during its training.

    Args:
        bank_rows: images to learn from; evenly spaced ones are taken, or the first of a source without random access.
        query_rows: images to classify, chosen in the same way.
        spec: of their evaluation crops.
        normalize: pixels in the source's dtype -> pixel_values.
        batch_size: images at once, on each process.
        num_workers: loader processes.
        accelerator: of the run.
        samples: maximum number of images in the bank; there are half as many queries.

    Attributes:
        notice: a line for the user about the last measurement, if something was left out.
    """

    def __init__(
        self,
        bank_rows: Rows,
        query_rows: Rows,
        spec: ImageSpec,
        normalize: Callable[[torch.Tensor], torch.Tensor],
        batch_size: int,
        num_workers: int,
        accelerator: Accelerator,
        samples: int = 2000,
    ):
        self.bank_rows, self.query_rows = subset(bank_rows, samples), subset(query_rows, max(1, samples // 2))
        self.normalize, self.accelerator = normalize, accelerator
        self.loading = spec, batch_size, num_workers, accelerator
        self.notice: str | None = None

    def measure(self, model: nn.Module) -> dict[str, float]:
        """The encoder's figures. Every process takes part, and every module stays in its mode.

        Args:
            model: MAEForPreTraining, wrapped as it is trained.

        Returns:
            On the main process `knn_top1` (20 neighbours) and `linear_top1` (the fast protocol) in percent, and
            `rankme` of the bank. Without labels, `rankme` alone; nothing if the features are not finite. On the other
            processes nothing.
        """
        unwrapped: Any = self.accelerator.unwrap_model(model)
        modes = [(module, module.training) for module in unwrapped.modules()]
        unwrapped.eval()

        def encode(images: torch.Tensor) -> torch.Tensor:
            with self.accelerator.autocast():
                return unwrapped.mae(self.normalize(images)).pooler_output

        # With FSDP, the encoder's weights outside its layers are sharded with the whole model, whose hooks gather them
        # for its own methods alone.
        unwrapped.encode = encode
        register_fsdp_forward_method(unwrapped, "encode")
        try:
            bank, queries = (
                extract_table(rows, encoded_batches(unwrapped.encode, rows, *self.loading))
                for rows in (self.bank_rows, self.query_rows)
            )
        finally:
            del unwrapped.encode
            for module, training in modes:
                module.training = training
        return self._figures(bank, queries) if self.accelerator.is_main_process else {}

    def _figures(self, bank: Table, queries: Table) -> dict[str, float]:
        self.notice = None
        if not (bank.values.isfinite().all() and queries.values.isfinite().all()):
            self.notice = "features are not finite numbers: their quality is not measured"
            return {}
        figures = {"rankme": rankme(bank.values)}
        try:
            train, test = with_class_numbers(bank, self.bank_rows, queries, self.query_rows, all_known=False)
        except DataError as error:
            self.notice = f"knn_top1 and linear_top1 are not measured: {error}"
            return figures
        device = self.accelerator.device
        knn = knn_accuracy(train, test, (NEIGHBOURS,), device=device)
        linear = fast_linear_accuracy(train, test, device=device)
        return {"knn_top1": knn[f"knn_top1_k{NEIGHBOURS}"], "linear_top1": linear["linear_top1"], **figures}


def subset(rows: Rows, most: int) -> Rows:
    """At most this many of the rows: evenly spaced ones of a source with random access, otherwise the first."""
    part = copy(rows)  # its blocks, which only an order of training needs, stay as they are
    if len(rows) > most:
        even = np.linspace(0, len(rows) - 1, most).round().astype(np.int64)
        part.index = rows.index[even if rows.source.random_access else slice(most)]
    return part
