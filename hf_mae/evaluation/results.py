"""results.json: figures, with their protocol, data and weights; model cards read it."""

import json
import re
import statistics
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

from .. import __version__
from ..errors import without_secrets
from ..files import sha256
from ..keys.data_keys import SplitKeys
from ..keys.evaluation_keys import ScoreRecipe
from ..run_folder import FEW_IMAGES, WEIGHTS_NAME, add_result, read_results

PACKAGES = ("torch", "transformers", "datasets", "scikit-learn", "numpy", "pillow")


def check_results_file(recipe: ScoreRecipe) -> None:
    """Raise a UserError if a result can't be added to the recipe's file; call it before spending hours."""
    if path := recipe.results_file:
        read_results(path)


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
    protocol: dict[str, Any], data: dict[str, Any], model: str, runs: list[dict[str, float]]
) -> dict[str, Any]:
    """One entry of results.json.

    Args:
        protocol: `name` and all settings.
        data: data set, splits and numbers of images.
        model: folder or Hub id, as typed.
        runs: figures of each repetition.

    Returns:
        `protocol`, `data`; `checkpoint`: `path` and the `sha256` of its weights (None if they are in several files);
        `figures`: means over the repetitions; `ranges`: smallest and largest of each, if there are several;
        `versions`. All values have JSON types.
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
    result["versions"] = {"hf_mae": __version__, **{package: version(package) for package in PACKAGES}}
    return json.loads(json.dumps(result))


def record_result(
    recipe: ScoreRecipe, protocol: dict[str, Any], data: dict[str, Any], runs: list[dict[str, float]]
) -> dict[str, Any]:
    """Make an entry with `make_result`, and add it to the file that the recipe names."""
    result = make_result(protocol, data, recipe.model, runs)
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
    width = max(len(key) for key in result["figures"])
    lines += [f"  {key:{width}}  {' '.join(_describe_figure(key, result))}" for key in result["figures"]]
    return "\n".join(lines)


def _describe_figure(key: str, result: dict[str, Any]) -> Iterator[str]:
    value, data = result["figures"][key], result["data"]
    if "top" not in key:
        yield f"{value:.3g}"
        return
    yield f"{value:.2f} %"
    if data["eval_images"] < FEW_IMAGES:
        yield f"of {data['eval_images']} images"
    if "ranges" in result:
        yield "({:.2f} to {:.2f})".format(*result["ranges"][key])
    neighbours = re.fullmatch(r"knn_top1_k(\d+)", key)
    if neighbours and int(neighbours[1]) > (bank := data["train_images"]):
        yield f"(k is larger than the training set, so all {bank} images vote)"
