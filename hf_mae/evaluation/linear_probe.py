"""`hf-mae evaluate linear-probe`: the paper's protocol, which trains a head on augmented crops, or the fast one."""

# Shape letters in this file
#   B images of a micro-batch   C, H, W channels, height and width of an image

from collections.abc import Generator
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from tqdm.auto import tqdm

from ..data.labels import CommonClasses, class_numbers, common_classes, labels_of
from ..data.loader import TrainingStream, each_batch, make_loader
from ..data.order import Rows, StreamPlan
from ..errors import UserError
from ..keys.evaluation_keys import LinearProbeRecipe
from ..optim.batch import micro_batch
from ..optim.lars import LARS
from ..optim.schedule import lr_at, steps_of
from .commands import Evaluation
from .encoder import FrozenEncoder
from .fast_linear import MAX_ITER, PENALTIES, fast_linear_accuracy
from .table import encoded_batches, even_batches, report_bad, top_k_correct, top_ks

# The paper's settings: keys of the recipe, whose defaults are Table 10's, and those that can't be changed.
PAPER_KEYS = ("total_batch_size", "epochs", "warmup_epochs", "blr", "min_lr", "weight_decay")
MOMENTUM, TRUST_COEFFICIENT = 0.9, 0.001  # of LARS
CROP_SCALE = (0.08, 1.0)  # smallest and largest share of the area; one draw, clipped
FLIP = True  # mirror half of the crops
BN_EPS = 1e-6
INIT_STD = 0.01  # of the linear layer's initial weights


def make_head(width: int, classes: int) -> nn.Sequential:
    """BatchNorm without affine parameters, then a linear layer: truncated normal weights, biases 0."""
    linear = nn.Linear(width, classes)
    nn.init.trunc_normal_(linear.weight, std=INIT_STD)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.BatchNorm1d(width, affine=False, eps=BN_EPS), linear)


def describe_settings(recipe: LinearProbeRecipe, pooling: str) -> dict[str, Any]:
    """The paper's settings as results.json states them; `differs_from_source` has those that differ from the paper."""
    used = {name: getattr(recipe, name) for name in PAPER_KEYS}
    differs = {name: value for name, value in used.items() if value != getattr(LinearProbeRecipe, name)}
    if pooling != "cls":
        differs["pooling"] = pooling
    return {
        "source": "arXiv:2111.06377, Table 10, for ViT-Base",
        "differs_from_source": differs,
        **used,
        "momentum": MOMENTUM,
        "trust_coefficient": TRUST_COEFFICIENT,
        "crop_scale": CROP_SCALE,
        "flip": FLIP,
        "bn_eps": BN_EPS,
        "init_std": INIT_STD,
        "pooling": pooling,
        "lr": recipe.lr,
    }


def evaluate_linear_probe(recipe: LinearProbeRecipe) -> dict[str, Any] | None:
    """Accuracy of a linear classifier: the entry of results.json; None on all but the main process.

    Raises:
        UserError: for anything a user can fix; one line with the remedy.
    """
    if recipe.protocol == "paper":
        return _evaluate_paper(recipe)
    evaluation = Evaluation(recipe, "mean")
    protocol = {
        "name": "linear_probe_fast",
        "classifier": "logistic regression on standardised features, L-BFGS",
        "max_iter": MAX_ITER,
        "penalties": list(PENALTIES),
        "chosen_on": "a tenth of the training images",
    }
    device = evaluation.accelerator.device
    return evaluation.score_tables(protocol, lambda train, test: fast_linear_accuracy(train, test, device=device))


def _evaluate_paper(recipe: LinearProbeRecipe) -> dict[str, Any] | None:
    evaluation = Evaluation(recipe, "cls")
    accelerator, encoder = evaluation.accelerator, evaluation.encoder
    rows, eval_rows = evaluation.rows, evaluation.eval_rows
    size, _ = micro_batch(recipe.total_batch_size, recipe.per_device_batch_size, accelerator.num_processes, most=512)
    if size == 1:
        message = "per_device_batch_size 1 leaves BatchNorm nothing to normalise"
        raise UserError(f"{message}; choose a total_batch_size that a larger size divides")
    classes = common_classes(labels_of(rows), rows, labels_of(eval_rows), eval_rows)
    runs: list[dict[str, float]] = []
    images = 0, 0
    for seed in range(recipe.seed, recipe.seed + recipe.seeds):
        run = ProbeRun(encoder, rows, classes, recipe, size, seed, accelerator)
        run.train()
        figures, evaluated = run.accuracy(eval_rows)
        runs.append(figures)
        images = len(rows) - len(run.bad), evaluated
    protocol = {
        "name": "linear_probe_paper",
        "classifier": "BatchNorm without affine parameters and a linear layer, LARS on random crops",
        **describe_settings(recipe, encoder.pooling),
        "per_device_batch_size": size,
        "processes": accelerator.num_processes,
        "seed": recipe.seed,
    }
    return evaluation.result(protocol, images, len(classes), runs) if accelerator.is_main_process else None


@dataclass
class ProbeRun:
    """Trains a linear head on frozen features of augmented crops; every process takes part."""

    encoder: FrozenEncoder
    rows: Rows  # training images
    classes: CommonClasses
    recipe: LinearProbeRecipe  # its `seed` isn't used
    per_device_batch_size: int  # images at once, which BatchNorm normalises together (512 in the original)
    seed: int  # of initial weights, order, crops and flips
    accelerator: Accelerator

    def __post_init__(self) -> None:
        recipe, accelerator = self.recipe, self.accelerator
        self.grad_accum_steps = recipe.total_batch_size // (self.per_device_batch_size * accelerator.num_processes)
        images = len(self.rows), recipe.total_batch_size
        self.total_steps = max(1, round(steps_of(recipe.epochs, *images)))
        self.warmup_steps = min(steps_of(recipe.warmup_epochs, *images), self.total_steps)
        torch.manual_seed(self.seed)
        self.head = accelerator.prepare(make_head(self.encoder.width, len(self.classes)))
        self.optimizer = LARS(self.head.parameters(), 0.0, MOMENTUM, recipe.weight_decay, TRUST_COEFFICIENT)
        self.bad: dict[str, str] = {}

    def train(self) -> None:
        """Run all steps."""
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
        report_bad(self.rows, list(self.bad.items()), self.recipe.max_bad_fraction)

    def step(self, step: int, batches: Generator[tuple[torch.Tensor, torch.Tensor]]) -> tuple[float, float]:
        """Run optimizer step `step`, from 0; returns this process's mean loss and the learning rate."""
        lr = lr_at(step, self.recipe.lr, self.warmup_steps, self.total_steps, self.recipe.min_lr)
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
        accelerator, recipe = self.accelerator, self.recipe
        workers, size = recipe.num_workers, self.per_device_batch_size
        spec = replace(self.encoder.spec, crop_scale=CROP_SCALE, flip=FLIP, one_draw=True)
        ranks, random_access = accelerator.num_processes, self.rows.source.random_access
        plan = StreamPlan.choose(recipe.total_batch_size, ranks, workers, len(self.rows), random_access)
        stream = TrainingStream(
            self.rows, plan, spec, self.seed, [0] * plan.num_streams, 0, self.total_steps, accelerator.process_index,
            ranks, plan.items_per_step(ranks, workers, self.grad_accum_steps),
        )  # fmt: skip
        loader = make_loader(stream, workers, accelerator.device.type == "cuda")
        with closing(each_batch(loader)) as items:
            for item in items:
                self.bad.update(item.bad)
                labels = class_numbers(item.labels, self.rows.source, self.classes)
                for part in zip(item.images.split(size), labels.split(size), strict=True):
                    yield tuple(tensor.to(accelerator.device, non_blocking=True) for tensor in part)  # type: ignore[misc]

    @torch.no_grad()
    def accuracy(self, eval_rows: Rows) -> tuple[dict[str, float], int]:
        """Accuracies in percent on the evaluation crops, named as in `fast_linear_accuracy`; the number of images."""
        accelerator, bad, ks = self.accelerator, [], top_ks(len(self.classes))
        head = accelerator.unwrap_model(self.head).eval()
        counts = torch.zeros(1 + len(ks), device=accelerator.device, dtype=torch.float64)
        size, workers = self.per_device_batch_size, self.recipe.num_workers
        batches = even_batches(eval_rows, self.encoder.spec, size, workers, accelerator, bar="evaluation")
        for batch, values in encoded_batches(self.encoder, batches):
            bad += batch.bad
            scores, labels = head(values), class_numbers(batch.labels, eval_rows.source, self.classes)
            correct = [top_k_correct(scores, labels, k) for k in ks]
            counts += torch.tensor([len(batch.keys), *correct], device=counts.device)
        images, *correct = cast(torch.Tensor, accelerator.reduce(counts, "sum")).tolist()
        report_bad(eval_rows, gather_object(bad), self.recipe.max_bad_fraction)
        return {f"linear_top{k}": 100 * hits / images for k, hits in zip(ks, correct, strict=True)}, int(images)
