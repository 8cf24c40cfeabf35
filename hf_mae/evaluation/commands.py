"""What every `hf-mae evaluate PROTOCOL` on frozen features shares: the start, the feature tables and the result."""

from collections.abc import Callable
from typing import Any

from accelerate import Accelerator

from ..data.labels import check_classes
from ..data.order import Rows
from ..data.sources import open_splits
from ..data.stats import probe_rows
from ..data.understood import announce_data
from ..keys.evaluation_keys import EvaluateRecipe, Pooling
from .encoder import FrozenEncoder
from .results import check_results_file, named_data, record_result, with_split_of_run
from .table import Features, Table, run_model, sample_size, with_class_numbers


class Evaluation:
    """A running evaluation: encoder, rows and processes.

    Args:
        recipe: keys of the command.
        pooling: pooling rule if the recipe has none.

    Raises:
        UserError: for anything a user can fix; one line with the remedy.
    """

    def __init__(self, recipe: EvaluateRecipe, pooling: Pooling):
        check_results_file(recipe)
        self.recipe = recipe = with_split_of_run(recipe)
        self.accelerator = Accelerator()
        self.encoder = FrozenEncoder(recipe.model, recipe.pooling or pooling, recipe.mixed_precision)
        self.encoder.to(self.accelerator.device)
        with self.accelerator.main_process_first():
            self.rows, self.eval_rows, self.evaluated_on = open_splits(recipe, labelled=True)
            probe = probe_rows(self.rows, self.encoder.spec.num_channels)
        # If all labels are wrong, the first few show it, so check them before spending hours.
        check_classes(probe.labels, self.rows)
        check_classes([row.label for row in self.eval_rows.read(self.eval_rows.index[:16])], self.eval_rows)
        if self.accelerator.is_main_process:
            announce_data(probe, self.encoder.spec, self.rows, self.eval_rows, self.evaluated_on)

    def _table(self, rows: Rows, bar: str) -> Table:
        return run_model(self.encoder, rows, self.encoder.spec, self.recipe, self.accelerator, bar)

    def score_tables(
        self, protocol: dict[str, Any], measure: Callable[[Features, Features], dict[str, float]]
    ) -> dict[str, Any] | None:
        """Measure the features of the training and the evaluation split: a random fraction of each, once per seed.

        Args:
            protocol: the protocol's name and settings.
            measure: (training table, evaluation table) -> figures.

        Returns:
            The entry of results.json; None on all but the main process.
        """
        tables = self._table(self.rows, "training images"), self._table(self.eval_rows, "evaluation images")
        train, test = with_class_numbers(tables[0], self.rows, tables[1], self.eval_rows)
        if not self.accelerator.is_main_process:
            return None
        fraction = self.recipe.fraction
        runs = [measure(train.sample(fraction, seed), test.sample(fraction, seed)) for seed in range(self.recipe.seeds)]
        images = sample_size(len(train.labels), fraction), sample_size(len(test.labels), fraction)
        return self.result({**protocol, "fraction": fraction}, images, int(train.labels.max()) + 1, runs)

    def result(
        self, protocol: dict[str, Any], images: tuple[int, int], classes: int, runs: list[dict[str, float]]
    ) -> dict[str, Any]:
        """Make the entry of results.json, and add it to the file that the recipe names.

        `images` are the numbers of training and evaluation images used, `runs` the figures of each repetition.
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
        return record_result(recipe, {**protocol, **common}, data, runs)
