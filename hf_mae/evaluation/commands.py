"""`hf-mae evaluate knn | linear-probe`: the keys of both, and from them to an entry of results.json."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from accelerate import Accelerator

from ..data.labels import class_numbers, common_classes, find_classes, read_labels
from ..data.sources import open_splits
from ..errors import UserError
from ..optim.batch import micro_batch
from ..run_folder import add_result
from .encoder import FrozenEncoder, Pooling
from .knn import knn_accuracy
from .linear_probe import MAX_ITER, PENALTIES, PaperProbe, ProbeRun, fast_linear_accuracy
from .recipes import ScoreRecipe
from .results import make_result, named_data
from .table import Features, extract_table, report_bad

PUBLISHED = PaperProbe()


def _key(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class EvaluateRecipe(ScoreRecipe):
    """Keys of both commands."""

    pooling: Pooling | None = _key(
        None, "mean of the patch tokens, class token, or both; cls for the paper's protocol, else mean"
    )
    seeds: int = _key(1, "repetitions, each with other random numbers")
    fraction: float = _key(1.0, "share of both splits that each repetition draws")

    def check(self) -> None:
        super().check()
        if self.seeds < 1:
            raise UserError(f"seeds {self.seeds} is too small; give 1 or more")
        if not 0 < self.fraction <= 1:
            raise UserError(f"fraction {self.fraction} lies outside (0, 1]; give e.g. 0.2")


@dataclass
class KnnRecipe(EvaluateRecipe):
    """Keys of `hf-mae evaluate knn`."""

    k: list[int] = field(default_factory=lambda: [10, 20, 100, 200], metadata={"help": "numbers of neighbours"})
    temperature: float = _key(0.07, "of the neighbours' weights exp(cosine / temperature)")

    def check(self) -> None:
        super().check()
        if min(self.k) < 1 or self.temperature <= 0:
            raise UserError(f"k {self.k} or temperature {self.temperature} is not positive; give e.g. 20 and 0.07")


@dataclass
class LinearProbeRecipe(EvaluateRecipe):
    """Keys of `hf-mae evaluate linear-probe`; those from `total_batch_size` on are of `--protocol paper` alone."""

    recipe: str | None = _key(None, "name of a recipe linear_probe_..., or path of a YAML file")
    protocol: Literal["fast", "paper"] = _key("fast", "fast: logistic regression on features; paper: LARS on crops")
    total_batch_size: int = _key(PUBLISHED.total_batch_size, "images of a step, over all processes")
    epochs: float = _key(PUBLISHED.epochs, "passes over the training images")
    warmup_epochs: float = _key(PUBLISHED.warmup_epochs, "length of the linear warm-up")
    blr: float = _key(PUBLISHED.blr, "learning rate per 256 images: lr = blr * total_batch_size / 256")
    min_lr: float = _key(PUBLISHED.min_lr, "learning rate at the end of the cosine")
    weight_decay: float = _key(PUBLISHED.weight_decay, "of the head's weights")
    seed: int = _key(0, "of initial weights, order, crops and flips; of the next repetition 1 more")

    def check(self) -> None:
        super().check()
        if self.protocol == "paper" and self.fraction != 1:
            raise UserError("fraction draws from a table of features; with --protocol paper pass --max_samples")
        for key, least in (("total_batch_size", 2), ("epochs", 1e-9), ("warmup_epochs", 0), ("blr", 0), ("seed", 0)):
            if getattr(self, key) < least:
                raise UserError(f"{key} {getattr(self, key)} is too small; give {least} or more")

    @property
    def probe(self) -> PaperProbe:
        """The settings of the paper's protocol."""
        known = [key.name for key in fields(PaperProbe) if hasattr(self, key.name)]
        return PaperProbe(**{key: getattr(self, key) for key in known})


class Evaluation:
    """What both commands start from: encoder, rows and processes.

    Args:
        recipe: keys of the command.
        pooling: if none was typed.

    Raises:
        UserError: for what a user can mend; one line with the remedy.
    """

    def __init__(self, recipe: EvaluateRecipe, pooling: Pooling):
        recipe.check()
        self.recipe, self.accelerator = recipe, Accelerator()
        self.encoder = FrozenEncoder(recipe.model, recipe.pooling or pooling, recipe.mixed_precision)
        self.encoder.to(self.accelerator.device)
        with self.accelerator.main_process_first():
            self.rows, self.eval_rows, self.evaluated_on = open_splits(recipe)
        for rows in (self.rows, self.eval_rows):
            # What is wrong with all labels shows in the first ones, before hours are spent.
            find_classes([row.label for row in rows.read(rows.index[:16])], rows)

    def tables(self) -> tuple[Features, Features]:
        """Features and class numbers of the split that is learnt from and of the one that is classified."""
        recipe = self.recipe
        splits = (("training images", self.rows), ("evaluation images", self.eval_rows))
        train, test = (
            extract_table(
                self.encoder, rows, self.encoder.spec, recipe.batch_size, recipe.num_workers, self.accelerator, name
            )
            for name, rows in splits
        )
        classes = common_classes(train.labels, self.rows, test.labels, self.eval_rows)
        for table, rows in ((train, self.rows), (test, self.eval_rows)):
            report_bad(len(table.keys), rows, table.bad, recipe.max_bad_fraction)
            if not table.values.isfinite().all():
                raise UserError(f"features of --model {recipe.model} are not finite; its training has diverged")
        return (
            Features(train.values, class_numbers(train.labels, classes)),
            Features(test.values, class_numbers(test.labels, classes)),
        )

    def result(
        self, protocol: dict[str, Any], images: tuple[int, int], classes: int, runs: list[dict[str, float]]
    ) -> dict[str, Any]:
        """The entry of results.json; the main process adds it to the file that the recipe names.

        Args:
            protocol: name and settings of its own.
            images: that were learnt from and classified.
            classes: of the labels.
            runs: figures of each repetition.
        """
        recipe, spec = self.recipe, self.encoder.spec
        common = {
            "pooling": self.encoder.pooling,
            "image_size": list(spec.size),
            "eval_resize": spec.eval_resize,
            "mixed_precision": recipe.mixed_precision,
            "seeds": recipe.seeds,
        }
        data = {
            **named_data(recipe, self.rows.source.split, self.evaluated_on),
            "train_images": images[0],
            "eval_images": images[1],
            "classes": classes,
        }
        result = make_result({**protocol, **common}, data, recipe.model, runs)
        if recipe.results_file and self.accelerator.is_main_process:
            add_result(result, recipe.results_file)
        return result


def evaluate_knn(recipe: KnnRecipe) -> dict[str, Any] | None:
    """kNN accuracy of frozen features: the entry of results.json; None on all but the main process.

    Raises:
        UserError: for what a user can mend; one line with the remedy.
    """
    evaluation = Evaluation(recipe, "mean")
    device = evaluation.accelerator.device
    protocol = {"name": "knn", "k": recipe.k, "temperature": recipe.temperature}
    return _evaluate_tables(
        evaluation, protocol, lambda train, test: knn_accuracy(train, test, tuple(recipe.k), recipe.temperature, device)
    )


def evaluate_linear_probe(recipe: LinearProbeRecipe) -> dict[str, Any] | None:
    """Accuracy of a linear classifier on frozen features, by the protocol that the recipe names.

    Returns:
        The entry of results.json; None on all but the main process.

    Raises:
        UserError: for what a user can mend; one line with the remedy.
    """
    if recipe.protocol == "paper":
        return _evaluate_paper_probe(recipe)
    evaluation = Evaluation(recipe, "mean")
    protocol = {
        "name": "linear_probe_fast",
        "classifier": "logistic regression on standardised features, L-BFGS",
        "max_iter": MAX_ITER,
        "penalties": list(PENALTIES),
        "chosen_on": "a tenth of the training images",
    }
    device = evaluation.accelerator.device
    return _evaluate_tables(evaluation, protocol, lambda train, test: fast_linear_accuracy(train, test, device=device))


def _evaluate_tables(
    evaluation: Evaluation, protocol: dict[str, Any], measure: Callable[[Features, Features], dict[str, float]]
) -> dict[str, Any] | None:
    train, test = evaluation.tables()
    if not evaluation.accelerator.is_main_process:
        return None
    recipe = evaluation.recipe
    runs = [
        measure(train.sample(recipe.fraction, seed), test.sample(recipe.fraction, seed)) for seed in range(recipe.seeds)
    ]
    images = len(train.labels), len(test.labels)
    return evaluation.result({**protocol, "fraction": recipe.fraction}, images, int(train.labels.max()) + 1, runs)


def _evaluate_paper_probe(recipe: LinearProbeRecipe) -> dict[str, Any] | None:
    evaluation = Evaluation(recipe, "cls")
    accelerator, rows, eval_rows = evaluation.accelerator, evaluation.rows, evaluation.eval_rows
    size, _ = micro_batch(recipe.total_batch_size, recipe.per_device_batch_size, accelerator.num_processes, most=512)
    if size == 1:
        raise UserError(
            "per_device_batch_size 1 leaves BatchNorm nothing to normalise; choose a total_batch_size that "
            "larger ones divide"
        )
    classes = common_classes(list(read_labels(rows)), rows, list(read_labels(eval_rows)), eval_rows)
    runs: list[dict[str, float]] = []
    evaluated, bad = 0, {}
    for seed in range(recipe.seed, recipe.seed + recipe.seeds):
        run = ProbeRun(
            evaluation.encoder, rows, classes, recipe.probe, size, recipe.num_workers, seed, accelerator,
            recipe.max_bad_fraction,
        )  # fmt: skip
        run.train()
        figures, evaluated = run.accuracy(eval_rows)
        runs.append(figures)
        bad = run.bad
    used, published = asdict(recipe.probe), asdict(PUBLISHED)
    used["pooling"], published["pooling"] = evaluation.encoder.pooling, "cls"
    protocol = {
        "name": "linear_probe_paper",
        "classifier": "BatchNorm without affine parameters and a linear layer, LARS on random crops",
        "source": "arXiv:2111.06377, Table 10, for ViT-Base",
        "differs_from_source": {key: value for key, value in used.items() if value != published[key]},
        **used,
        "lr": recipe.probe.lr,
        "per_device_batch_size": size,
        "processes": accelerator.num_processes,
        "seed": recipe.seed,
    }
    return evaluation.result(protocol, (len(rows) - len(bad), evaluated), len(classes), runs)
