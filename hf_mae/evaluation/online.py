"""The quality of an encoder during training: kNN, a linear classifier and RankMe on a few images."""

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import register_fsdp_forward_method

from ..data.labels import has_labels
from ..data.order import Rows, spread
from ..data.transform import ImageSpec
from ..errors import DataError
from .fast_linear import fast_linear_accuracy
from .knn import knn_accuracy
from .table import Table, encoded_batches, even_batches, extract_table, with_class_numbers

NEIGHBOURS = 20


@dataclass
class OnlineEvaluator:
    """Measures an encoder during training."""

    bank_rows: Rows  # images to learn from
    query_rows: Rows  # images to classify
    spec: ImageSpec  # of their evaluation crops
    normalize: Callable[[torch.Tensor], torch.Tensor]  # pixels in the source's dtype -> pixel_values
    batch_size: int  # images at once, on each process
    num_workers: int
    accelerator: Accelerator
    samples: int = 2000  # maximum number of images in the bank; there are half as many queries
    notice: str | None = None  # a line for the user if the last measurement left something out for the first time
    known_notices: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.bank_rows = subset(self.bank_rows, self.samples)
        self.query_rows = subset(self.query_rows, max(1, self.samples // 2))

    @cached_property
    def unlabelled(self) -> Rows | None:
        """The bank or the queries, if none of these images has a label; then there is only `rankme`."""
        return next((rows for rows in (self.bank_rows, self.query_rows) if not has_labels(rows)), None)

    def measure(self, model: nn.Module) -> dict[str, float]:
        """Measure the encoder. All processes must call this together; every module keeps its mode.

        Args:
            model: MAEForPreTraining, wrapped as for training.

        Returns:
            On the main process `knn_top1` (20 neighbours) and `linear_top1` (the fast protocol) in percent, and
            `rankme` of the bank; without labels, only `rankme`. Empty on other processes or for non-finite features.
        """
        unwrapped: Any = self.accelerator.unwrap_model(model)
        modes = [(module, module.training) for module in unwrapped.modules()]
        unwrapped.eval()

        def encode(images: torch.Tensor) -> torch.Tensor:
            with self.accelerator.autocast():
                return unwrapped.mae(self.normalize(images)).pooler_output

        def table_of(rows: Rows) -> Table:
            batches = even_batches(rows, self.spec, self.batch_size, self.num_workers, self.accelerator)
            return extract_table(rows, encoded_batches(unwrapped.encode, batches))

        # FSDP shards encoder weights outside the layers with the whole model, and gathers them only for its methods.
        unwrapped.encode = encode
        register_fsdp_forward_method(unwrapped, "encode")
        try:
            bank, queries = table_of(self.bank_rows), table_of(self.query_rows)
        finally:
            del unwrapped.encode
            for module, training in modes:
                module.training = training
        return self._figures(bank, queries) if self.accelerator.is_main_process else {}

    def _figures(self, bank: Table, queries: Table) -> dict[str, float]:
        self.notice = None
        if not (bank.values.isfinite().all() and queries.values.isfinite().all()):
            self._notify("features are not finite numbers: their quality is not measured")
            return {}
        figures = {"rankme": rankme(bank.values)}
        if self.unlabelled:
            return figures
        try:
            train, test = with_class_numbers(bank, self.bank_rows, queries, self.query_rows, all_known=False)
        except DataError as error:
            self._notify(f"knn_top1 and linear_top1 are not measured: {error}")
            return figures
        device = self.accelerator.device
        knn = knn_accuracy(train, test, (NEIGHBOURS,), device=device)
        linear = fast_linear_accuracy(train, test, device=device)
        return {"knn_top1": knn[f"knn_top1_k{NEIGHBOURS}"], "linear_top1": linear["linear_top1"], **figures}

    def _notify(self, line: str) -> None:
        self.notice = None if line in self.known_notices else line
        self.known_notices.add(line)


def subset(rows: Rows, most: int) -> Rows:
    """Up to `most` of the rows, chosen by `spread`. `blocks`, which only training needs, is not updated."""
    part = copy(rows)
    part.index = spread(rows.index, most, rows.source)
    return part


def rankme(values: torch.Tensor) -> float:
    """RankMe (arXiv:2210.02885) of (n, D) features: exp of the entropy of their normalised singular values.

    The features are not centred. The result is in [1, min(n, D)]; the paper uses 25,600 rows.
    """
    singular = torch.linalg.svdvals(values.double())
    share = singular / singular.sum() + 1e-7  # the paper's epsilon
    return float(torch.exp(-(share * share.log()).sum()))
