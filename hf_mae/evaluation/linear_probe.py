"""Linear probing: the paper's protocol, which trains a head on augmented crops, and a fast one on a feature table."""

# Shape letters in this file
#   B images of a micro-batch   D width of the features   K classes   n rows of a table

from collections.abc import Generator
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from tqdm.auto import tqdm

from ..data.labels import class_numbers
from ..data.loader import TrainingStream, each_batch, make_loader
from ..data.order import Rows, StreamPlan
from ..optim.lars import LARS
from ..optim.schedule import lr_at
from .encoder import FrozenEncoder
from .table import Features, encoded_batches, report_bad, top_k_correct

# ---------------------------------------------------------------------------------------------- fast

# Of half the squared weights, against the mean cross-entropy; strongest first, each fit starts from the one before.
PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
MAX_ITER = 100
# Rows of a table whose logits are held at once.
ROWS = 65_536


def fast_linear_accuracy(
    train: Features,
    test: Features,
    penalties: tuple[float, ...] = PENALTIES,
    max_iter: int = MAX_ITER,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Accuracy of a logistic regression on standardised features.

    Not the paper's protocol (no crops, no LARS); it ranks encoders in seconds. The penalty is the one, of those given,
    that classifies a tenth of the rows best which the others were fitted to; then all rows are fitted. The rows that
    are classified in the end take no part in the choice.

    Args:
        train: what it learns from.
        test: what it classifies.
        penalties: to choose from.
        max_iter: steps of L-BFGS for each.
        device: of the computation.

    Returns:
        `linear_top1` and `linear_top5` in percent; `linear_penalty`, the chosen one.
    """
    mean, std = train.values.mean(dim=0), train.values.std(dim=0, correction=0)
    std = torch.where(std > 0, std, 1.0)
    values, labels = ((train.values - mean) / std).to(device), train.labels.to(device)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).to(device)
    tenth = max(1, len(labels) // 10)
    chosen, fitted = order[:tenth], order[tenth:]

    weights = torch.zeros(int(labels.max()) + 1, values.shape[1] + 1, device=device)
    best: tuple[int, float, torch.Tensor] | None = None
    for penalty in sorted(penalties, reverse=True):
        weights = logistic_regression(values[fitted], labels[fitted], penalty, weights, max_iter)
        correct = top_k_correct(_logits(values[chosen], weights), labels[chosen], 1)
        if best is None or correct > best[0]:
            best = correct, penalty, weights
    assert best is not None
    weights = logistic_regression(values, labels, best[1], best[2], max_iter)
    logits = torch.cat([_logits((part - mean).div(std).to(device), weights).cpu() for part in test.values.split(ROWS)])
    share = 100 / len(test.labels)
    return {
        "linear_top1": share * top_k_correct(logits, test.labels, 1),
        "linear_top5": share * top_k_correct(logits, test.labels, 5),
        "linear_penalty": best[1],
    }


def logistic_regression(
    values: torch.Tensor, labels: torch.Tensor, penalty: float, start: torch.Tensor, max_iter: int = 100
) -> torch.Tensor:
    """Minimise mean cross-entropy + penalty / 2 * (squared weights without biases), by L-BFGS over all rows.

    Args:
        values: (n, D).
        labels: (n,) class numbers below K.
        penalty: as `1 / (C * n)` in scikit-learn's LogisticRegression.
        start: (K, D + 1) weights, the last column the biases.
        max_iter: steps at most.

    Returns:
        (K, D + 1) weights.
    """
    weights = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([weights], max_iter=max_iter, tolerance_grad=1e-5, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        parts = [penalty / 2 * weights[:, :-1].square().sum()]
        parts[0].backward()
        for part, expected in zip(values.split(ROWS), labels.split(ROWS), strict=True):
            parts.append(F.cross_entropy(_logits(part, weights), expected, reduction="sum") / len(labels))
            parts[-1].backward()
        return torch.stack([part.detach() for part in parts]).sum()

    optimizer.step(closure)  # type: ignore[arg-type]
    return weights.detach()


def _logits(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return F.linear(values, weights[:, :-1], weights[:, -1])


# ---------------------------------------------------------------------------------------------- the paper's


@dataclass(frozen=True)
class PaperProbe:
    """Settings of arXiv:2111.06377, Table 10, and of the original's code; the defaults are theirs for ViT-Base.

    Args:
        total_batch_size: images of a step, over all processes.
        epochs: passes over the training images (50 are enough for ViT-Large and -Huge).
        warmup_epochs: of the learning rate, linear from 0.
        blr: learning rate per 256 images: lr = blr * total_batch_size / 256.
        min_lr: where its half cosine ends.
        weight_decay: of the head's weights.
        momentum: of LARS.
        trust_coefficient: of LARS.
        crop_scale: smallest and largest area of a random crop; one draw, cut to the image.
        flip: mirror half of the crops.
        bn_eps: of the BatchNorm without affine parameters before the linear layer.
        init_std: of the head's initial weights, a truncated normal distribution; biases start at 0.
    """

    total_batch_size: int = 16_384
    epochs: float = 90
    warmup_epochs: float = 10
    blr: float = 0.1
    min_lr: float = 0.0
    weight_decay: float = 0.0
    momentum: float = 0.9
    trust_coefficient: float = 0.001
    crop_scale: tuple[float, float] = (0.08, 1.0)
    flip: bool = True
    bn_eps: float = 1e-6
    init_std: float = 0.01

    @property
    def lr(self) -> float:
        """The highest learning rate, by the linear scaling rule."""
        return self.blr * self.total_batch_size / 256

    def head(self, width: int, classes: int) -> nn.Sequential:
        """BatchNorm without affine parameters, then a linear layer."""
        linear = nn.Linear(width, classes)
        nn.init.trunc_normal_(linear.weight, std=self.init_std)
        nn.init.zeros_(linear.bias)
        return nn.Sequential(nn.BatchNorm1d(width, affine=False, eps=self.bn_eps), linear)

    def optimizer(self, head: nn.Module) -> LARS:
        """LARS over the head; its learning rate is set before each step."""
        return LARS(
            head.parameters(),
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            trust_coefficient=self.trust_coefficient,
        )


class ProbeRun:
    """Trains a linear head on frozen features of augmented crops; every process takes part.

    Args:
        encoder: gives the features.
        rows: to learn from.
        classes: label -> class number.
        probe: the settings.
        per_device_batch_size: images at once on a device; BatchNorm's statistics are theirs (512 in the original).
        num_workers: loader processes.
        seed: of initial weights, order, crops and flips.
        accelerator: of all processes.
        max_bad_fraction: stop when more of the images can't be decoded.
    """

    def __init__(
        self,
        encoder: FrozenEncoder,
        rows: Rows,
        classes: dict[int | str, int],
        probe: PaperProbe,
        per_device_batch_size: int,
        num_workers: int,
        seed: int,
        accelerator: Accelerator,
        max_bad_fraction: float = 0.01,
    ):
        self.encoder, self.rows, self.classes, self.probe = encoder, rows, classes, probe
        self.micro_batch, self.num_workers, self.seed = per_device_batch_size, num_workers, seed
        self.accelerator, self.max_bad_fraction = accelerator, max_bad_fraction
        self.grad_accum_steps = probe.total_batch_size // (per_device_batch_size * accelerator.num_processes)
        self.total_steps = max(1, round(probe.epochs * len(rows) / probe.total_batch_size))
        self.warmup_steps = min(probe.warmup_epochs * len(rows) / probe.total_batch_size, self.total_steps)
        torch.manual_seed(seed)
        self.head = accelerator.prepare(probe.head(encoder.width, len(classes)))
        self.optimizer = probe.optimizer(self.head)
        self.bad: dict[str, str] = {}

    def train(self) -> None:
        """All steps."""
        with (
            closing(self._batches()) as batches,
            tqdm(total=self.total_steps, disable=not self.accelerator.is_main_process, dynamic_ncols=True) as bar,
        ):
            self.head.train()
            for step in range(self.total_steps):
                loss, lr = self.step(step, batches)
                bar.set_postfix(loss=f"{loss:.4f}", lr=f"{lr:.3g}", refresh=False)
                bar.update()
        self.bad = dict(gather_object(list(self.bad.items())))
        report_bad(len(self.rows) - len(self.bad), self.rows, list(self.bad.items()), self.max_bad_fraction)

    def step(self, step: int, batches: Generator[tuple[torch.Tensor, torch.Tensor]]) -> tuple[float, float]:
        """One step of the optimizer, number `step` from 0; this process's mean loss, and the learning rate."""
        lr = lr_at(step, self.probe.lr, self.warmup_steps, self.total_steps, self.probe.min_lr)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        total = torch.zeros((), device=self.accelerator.device)
        for micro_step in range(self.grad_accum_steps):
            images, labels = next(batches)
            last = micro_step == self.grad_accum_steps - 1
            with nullcontext() if last else self.accelerator.no_sync(self.head):
                loss = F.cross_entropy(self.head(self.encoder(images)), labels) / self.grad_accum_steps
                loss.backward()
            total += loss.detach()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total.item(), lr

    def _batches(self) -> Generator[tuple[torch.Tensor, torch.Tensor]]:
        """Micro-batches on the device: images (B, C, H, W), class numbers (B,)."""
        accelerator, probe = self.accelerator, self.probe
        spec = replace(self.encoder.spec, crop_scale=probe.crop_scale, flip=probe.flip, one_draw=True)
        ranks, random_access = accelerator.num_processes, self.rows.source.random_access
        plan = StreamPlan.choose(probe.total_batch_size, ranks, self.num_workers, len(self.rows), random_access)
        stream = TrainingStream(
            self.rows, plan, spec, self.seed, [0] * plan.num_streams, 0, self.total_steps, accelerator.process_index,
            ranks, plan.items_per_step(ranks, self.num_workers, self.grad_accum_steps),
        )  # fmt: skip
        loader = make_loader(stream, self.num_workers, accelerator.device.type == "cuda")
        with closing(each_batch(loader)) as items:
            for item in items:
                self.bad.update(item.bad)
                labels = class_numbers(item.labels, self.classes)
                for part in zip(item.images.split(self.micro_batch), labels.split(self.micro_batch), strict=True):
                    yield tuple(tensor.to(accelerator.device, non_blocking=True) for tensor in part)  # type: ignore[misc]

    @torch.no_grad()
    def accuracy(self, eval_rows: Rows) -> tuple[dict[str, float], int]:
        """`linear_top1` and `linear_top5` in percent on the evaluation crops, and how many images there were."""
        accelerator, bad = self.accelerator, []
        head = accelerator.unwrap_model(self.head).eval()
        counts = torch.zeros(3, device=accelerator.device, dtype=torch.float64)
        for batch, values in encoded_batches(
            self.encoder, eval_rows, self.encoder.spec, self.micro_batch, self.num_workers, accelerator, "evaluation"
        ):
            bad += batch.bad
            scores, labels = head(values), class_numbers(batch.labels, self.classes)
            found = [len(batch.keys), top_k_correct(scores, labels, 1), top_k_correct(scores, labels, 5)]
            counts += torch.tensor(found, device=counts.device)
        images, top1, top5 = cast(torch.Tensor, accelerator.reduce(counts, "sum")).tolist()
        report_bad(int(images), eval_rows, gather_object(bad), self.max_bad_fraction)
        return {"linear_top1": 100 * top1 / images, "linear_top5": 100 * top5 / images}, int(images)
