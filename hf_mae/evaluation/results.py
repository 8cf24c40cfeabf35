"""results.json: what was measured, by which protocol, on which data, of which weights."""

import json
import statistics
from pathlib import Path
from typing import Any

from .. import __version__


def make_result(
    protocol: dict[str, Any], data: dict[str, Any], model: str, runs: list[dict[str, float]]
) -> dict[str, Any]:
    """One entry of results.json, as it comes back from JSON.

    Args:
        protocol: `name` and all settings.
        data: data set, splits and numbers of images.
        model: folder or Hub id, as typed.
        runs: figures of each repetition.
    """
    return json.loads(
        json.dumps(
            {
                "protocol": protocol,
                "data": data,
                "checkpoint": {"path": model},
                "figures": {key: statistics.mean(run[key] for run in runs) for key in runs[0]},
                "versions": {"hf_mae": __version__},
            }
        )
    )


def read_results(path: Path) -> list[dict[str, Any]]:
    """The entries of a results.json; none if there is no such file."""
    return json.loads(path.read_text()) if path.exists() else []


def add_result(result: dict[str, Any], path: Path) -> None:
    """Add an entry to a results.json, in place of one with the same protocol, data and weights."""
    same = ("protocol", "data", "checkpoint")
    others = [entry for entry in read_results(path) if any(entry.get(key) != result[key] for key in same)]
    path.write_text(json.dumps([*others, result], indent=1) + "\n")
