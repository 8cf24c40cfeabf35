"""results.json: figures, with their protocol, data and weights; model cards read it."""

import json
import logging
import re
import statistics
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from transformers.utils.hub import cached_file

from .. import __version__
from ..errors import without_secrets
from ..files import same_place, sha256
from ..keys.data_keys import SplitKeys
from ..keys.evaluation_keys import ScoreRecipe
from ..run_folder import (
    WEIGHTS_NAME,
    RunFolder,
    add_result,
    is_percent,
    limits_of,
    read_results,
    show_figure,
    show_limits,
)
from .intervals import accuracy_interval
from .metrics import Details

logger = logging.getLogger(__name__)

MOST_CLASSES = 20  # lines about single classes
Scored = TypeVar("Scored", bound=ScoreRecipe)
PACKAGES = ("torch", "transformers", "datasets", "scikit-learn", "numpy", "pillow")


def check_results_file(recipe: ScoreRecipe) -> None:
    """Raise a UserError if a result can't be added to the recipe's file; call it before spending hours."""
    if path := recipe.results_file:
        read_results(path)


def with_split_of_run(recipe: Scored) -> Scored:
    """Evaluate on the images that the run which wrote the model was evaluated on, unless the command names others.

    Otherwise a part of the run's data would be held out, which the run may have trained on.
    """
    run, _ = RunFolder(recipe.model).config()
    names = ("eval_dataset", "eval_split", "eval_fraction")
    typed, same = any(getattr(recipe, name) for name in names), ("dataset_config", "dataset_revision", "split")
    if typed or any(run.get(name) != getattr(recipe, name) for name in same) or not isinstance(run.get("dataset"), str):
        return recipe
    if without_secrets(recipe.dataset) != run["dataset"] and not same_place(recipe.dataset, run["dataset"]):
        return recipe
    held_out = run.get("eval_dataset") is None and run.get("eval_split") is None
    if held_out and any(run.get(name) != without_secrets(getattr(recipe, name)) for name in ("labels", "label_column")):
        logger.warning(
            "the run of %s had other labels, so it may have been trained on images that are held out now", recipe.model
        )
    return replace(recipe, **{name: run[name] for name in names if run.get(name) is not None})


def named_data(recipe: SplitKeys, split: str, evaluated_on: str, learned: bool = True) -> dict[str, Any]:
    """The part of an entry that names its data.

    Args:
        recipe: keys of the command.
        split: the source's name of the split to learn from, or to evaluate on if nothing was learned.
        evaluated_on: the images to evaluate on, as `open_splits` describes them.
        learned: whether the command learned from images; otherwise, only the data to evaluate on is named.
    """
    source = recipe if learned else recipe.evaluation_source()
    return {
        "dataset": without_secrets(source.dataset),
        "config": source.dataset_config,
        "revision": source.dataset_revision,
        **({"labels": without_secrets(source.labels)} if source.labels else {}),
        "split": split,
        "evaluated_on": evaluated_on,
        **({"max_samples": recipe.max_samples} if learned else {}),
        "max_eval_samples": recipe.max_eval_samples,
    }


def make_result(
    protocol: dict[str, Any],
    data: dict[str, Any],
    model: str,
    runs: list[dict[str, float]],
    details: Details | None = None,
) -> dict[str, Any]:
    """One entry of results.json.

    Args:
        protocol: `name` and all settings.
        data: data set, splits and numbers of images.
        model: folder or Hub id, as typed.
        runs: figures of each repetition.
        details: more about a single repetition.

    Returns:
        `protocol`, `data`; `checkpoint`: `path` and the `sha256` of its weights (None if they are in several files);
        `figures`: means over the repetitions; `ranges`: smallest and largest of each, if there are several, otherwise
        `intervals`: their 95 % bootstrap intervals; `per_class`, see `Details`; `versions`. All values have JSON types.
    """
    weights = cached_file(model, WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False)
    result = {
        "protocol": protocol,
        "data": data,
        "checkpoint": {"path": model, "sha256": sha256(Path(weights)) if weights else None},
        "figures": {key: statistics.mean(run[key] for run in runs) for key in runs[0]},
    }
    if len(runs) > 1:
        values = {key: [run[key] for run in runs] for key in runs[0]}
        result["ranges"] = {key: [min(numbers), max(numbers)] for key, numbers in values.items()}
    else:
        accuracies = {key: value for key, value in runs[0].items() if is_percent(key)}
        result["intervals"] = {key: accuracy_interval(value, data["eval_images"]) for key, value in accuracies.items()}
    if details:
        result["intervals"] |= details.intervals
        result |= {"per_class": details.per_class} if details.per_class else {}
    result["versions"] = {"hf_mae": __version__, **{package: version(package) for package in PACKAGES}}
    return json.loads(json.dumps(result))


def record_result(
    recipe: ScoreRecipe,
    protocol: dict[str, Any],
    data: dict[str, Any],
    runs: list[dict[str, float]],
    details: Details | None = None,
) -> dict[str, Any]:
    """Make an entry with `make_result`, and add it to the file that the recipe names."""
    result = make_result(protocol, data, recipe.model, runs, details)
    if recipe.results_file:
        add_result(recipe.results_file, result)
    return result


def describe_result(result: dict[str, Any]) -> str:
    """Describe a result in a few readable lines."""
    protocol, data = result["protocol"], result["data"]
    pooling = f", pooling {protocol['pooling']}" if "pooling" in protocol else ""
    intro = f"learned from {data['train_images']:,} images of split {data['split']}, " if "train_images" in data else ""
    lines = [
        f"{protocol['name']} of {result['checkpoint']['path']}{pooling}",
        f"{intro}evaluated on {data['eval_images']:,} images of {data['dataset']}: {data['evaluated_on']}; "
        f"{data['classes']} classes",
    ]
    if differs := protocol.get("differs_from_source"):
        settings = ", ".join(f"{key} {value}" for key, value in differs.items())
        lines.append(f"differs from {protocol['source']}: {settings}")
    return "\n".join([*lines, *describe_figures(result)])


def describe_figures(result: dict[str, Any]) -> list[str]:
    """A line for each figure of a result, and for each class."""
    width = max(len(key) for key in result["figures"])
    lines = [f"  {key:{width}}  {' '.join(_describe_figure(key, result))}" for key in result["figures"]]
    return [*lines, *_describe_classes(result.get("per_class", {}))]


def _describe_figure(key: str, result: dict[str, Any]) -> Iterator[str]:
    yield show_figure(key, result["figures"][key])
    if limits := limits_of(result, key):
        yield f"({'' if 'ranges' in result else '95 % interval '}{show_limits(key, limits)})"
    neighbours = re.fullmatch(r"knn_top1_k(\d+)", key)
    if neighbours and int(neighbours[1]) > (bank := result["data"]["train_images"]):
        yield f"(k is larger than the training set, so all {bank} images vote)"


def _describe_classes(per_class: dict[str, Any]) -> Iterator[str]:
    """A line for each class, for up to `MOST_CLASSES` of them: those with the lowest figures."""
    scored = {name: entry for name, entry in per_class.items() if entry["figures"]}
    if len(scored) > MOST_CLASSES:
        lowest = sorted(scored, key=lambda name: next(iter(scored[name]["figures"].values())))[:MOST_CLASSES]
        yield f"the {MOST_CLASSES} classes with the lowest figures, of {len(scored)}:"
        scored = {name: scored[name] for name in lowest}
    width = max(map(len, scored), default=0)
    for name, entry in scored.items():
        figures = ", ".join(
            f"{key} {show_figure(key, value)}" + (f" ({show_limits(key, limits)})" if limits else "")
            for key, value in entry["figures"].items()
            for limits in [limits_of(entry, key)]
        )
        yield f"  {name:{width}}  {entry['support']:,} images, {figures}"
