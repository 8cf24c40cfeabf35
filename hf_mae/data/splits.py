"""Which rows a model learns from, and which it is judged by: the same for every command."""

from typing import Any

from ..keys.data_keys import DataKeys, SplitKeys
from .order import Rows
from .sources import Source, list_splits, open_source

HELD_OUT = 0.05


def source_of(recipe: DataKeys, streaming: bool | None = None) -> Source:
    """The source that a recipe names; see `open_source`."""
    return open_source(
        recipe.dataset,
        split=recipe.split,
        config_name=recipe.dataset_config,
        revision=recipe.dataset_revision,
        image_column=recipe.image_column,
        label_column=recipe.label_column,
        streaming=streaming,
    )


def splits_of(recipe: SplitKeys, streaming: bool | None = None) -> tuple[Rows, Rows, str]:
    """The rows that a recipe names; see `open_splits`."""
    return open_splits(
        recipe.dataset,
        recipe.split,
        recipe.eval_dataset,
        recipe.eval_split,
        max_samples=recipe.max_samples,
        max_eval_samples=recipe.max_eval_samples,
        config_name=recipe.dataset_config,
        revision=recipe.dataset_revision,
        image_column=recipe.image_column,
        label_column=recipe.label_column,
        streaming=streaming,
    )


def open_splits(
    dataset: str,
    split: str = "train",
    eval_dataset: str | None = None,
    eval_split: str | None = None,
    *,
    max_samples: int | None = None,
    max_eval_samples: int | None = None,
    config_name: str | None = None,
    revision: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    streaming: bool | None = None,
) -> tuple[Rows, Rows, str]:
    """Open the rows to learn from and those to evaluate on.

    Without `eval_dataset` and `eval_split`, the evaluation split is found by its name; a data set that has none gets a
    held-out part, chosen by a hash of each row's place.

    Args:
        dataset: as for `open_source`, as the others.
        split: to learn from.
        eval_dataset: the same data set when omitted.
        eval_split: to evaluate on.
        max_samples: learn from so many at most.
        max_eval_samples: evaluate on so many at most.
        config_name: of the data set.
        revision: of the data set.
        image_column: of both.
        label_column: of both.
        streaming: see `open_source`; of another `eval_dataset`, its default.

    Returns:
        rows: to learn from.
        eval_rows: to evaluate on.
        evaluated_on: what those are, for people.

    Raises:
        DataError: for what is not there.
    """
    place: dict[str, Any] = {"config_name": config_name, "revision": revision}
    columns: dict[str, Any] = {"image_column": image_column, "label_column": label_column}
    options: dict[str, Any] = {**place, **columns, "streaming": streaming}
    source = open_source(dataset, split=split, **options)
    evaluation = None
    if eval_dataset:
        evaluation = open_source(eval_dataset, split=eval_split or "train", **columns)
    elif name := eval_split or _evaluation_split(list_splits(dataset, **place), split):
        evaluation = open_source(dataset, split=name, **options)
    if evaluation is None:
        rows, eval_rows = (
            Rows(source, "train", HELD_OUT, max_samples),
            Rows(source, "held_out", HELD_OUT, max_eval_samples),
        )
        return rows, eval_rows, f"{HELD_OUT:.0%} of {split}, held out by a hash of each row's place"
    rows, eval_rows = Rows(source, max_samples=max_samples), Rows(evaluation, max_samples=max_eval_samples)
    return rows, eval_rows, f"split {evaluation.split} of {evaluation.name}"


def _evaluation_split(splits: list[str], training: str) -> str | None:
    return next((name for name in ("validation", "val", "valid", "test") if name in splits and name != training), None)
