"""Every file of a run's folder: its name, and how it is read back."""

import json
import logging
import re
from pathlib import Path
from typing import Any

from .data.sources import DataError

logger = logging.getLogger(__name__)


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Folders named `checkpoint-STEP` of a run, oldest first, complete or not."""
    found = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=checkpoint_step)


def checkpoint_step(path: Path) -> int:
    return int(path.name.split("-")[1])


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events of a metrics.jsonl; a last line that was cut off is left out."""
    events = []
    for line in path.read_text().splitlines():
        try:
            events.append(json.loads(line))
        except ValueError:
            logger.warning("%s: a line that was cut off is left out: %.40s", path, line)
    return events


def picture_step(path: Path) -> int:
    """The step of a step-STEP.png."""
    return int(path.stem.removeprefix("step-"))


def read_results(path: Path) -> list[dict[str, Any]]:
    """The entries of a results.json; none if there is no such file.

    Raises:
        DataError: if the file is something else.
    """
    if not path.exists():
        return []
    try:
        results = json.loads(path.read_text())
    except (ValueError, OSError):
        results = None
    if not isinstance(results, list) or not all(isinstance(entry, dict) and "figures" in entry for entry in results):
        raise DataError(f"{path} is no list of results of hf-mae; name another file by --results")
    return results


def add_result(result: dict[str, Any], path: Path) -> None:
    """Add an entry to a results.json, in place of one with the same protocol, data and weights.

    Raises:
        DataError: if the file is something else, or can't be written.
    """
    same = ("protocol", "data", "checkpoint")
    others = [entry for entry in read_results(path) if any(entry.get(key) != result[key] for key in same)]
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps([*others, result], indent=1) + "\n")
        temporary.replace(path)
    except OSError as error:
        raise DataError(f"{path} can't be written ({error}); name another file by --results") from error
