"""Every file of a run's folder: its name, how it is written, and how it is read back.

    OUT/  config.json model.safetensors preprocessor_config.json    the model, at the end
          run_config.yaml          the recipe, and what was derived from it
          metrics.jsonl            one JSON object per event
          bad_samples.jsonl        images that can't be decoded
          results.json             evaluations of the weights
          conversion.json          where converted weights come from
          reconstructions/         step-STEP.png, all.webp
          checkpoint-STEP/

A crash, a full disk or another program may leave anything there. Readers skip what they can't use, with one warning
for each file. Only `read_results` is strict, because its callers add to the file.
"""

import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from .errors import DataError, one_line, without_secrets
from .files import locked, read_bytes, read_json, replaced, write_json, write_text, writing

logger = logging.getLogger(__name__)

# Files of a model's folder, named as transformers names them; importing its constants would load all of transformers.
CONFIG_NAME, WEIGHTS_NAME, PROCESSOR_NAME = "config.json", "model.safetensors", "preprocessor_config.json"
CHECKPOINT, PICTURE = r"checkpoint-(\d+)", r"step-(\d+)\.png"
FEW_IMAGES = 100  # an accuracy on fewer evaluation images says little
PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"


class RunFolder:
    """The folder of a run, or of a model from elsewhere; it need not exist, and most of its files may be missing."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config_file = self.path / "run_config.yaml"
        self.metrics_file = self.path / "metrics.jsonl"
        self.bad_file = self.path / "bad_samples.jsonl"
        self.results_file = self.path / "results.json"
        self.conversion_file = self.path / "conversion.json"
        self.weights_file = self.path / WEIGHTS_NAME
        self.picture_folder = self.path / "reconstructions"
        self.animation_file = self.picture_folder / "all.webp"

    def write_config(self, recipe: dict[str, Any], derived: dict[str, Any]) -> None:
        """Write a run's keys, and the facts derived from them, the data and the machine; makes the folder.

        Raises a UserError if it can't be written.
        """
        text = yaml.dump({"recipe": recipe, "derived": derived}, Dumper=_PlainDumper, sort_keys=False)
        with writing(self.path, "--output_dir"):
            self.path.mkdir(parents=True, exist_ok=True)
            write_text(self.config_file, text)

    def config(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The run's keys, and the facts derived from them; empty where nothing is recorded."""
        config = without_secrets(_read_table(self.config_file, _read_yaml))
        parts = [config.get(name, {}) for name in ("recipe", "derived")]
        recipe, derived = (part if isinstance(part, dict) else {} for part in parts)
        if [recipe, derived] != parts:
            logger.warning("%s: recipe or derived isn't a table of keys and is skipped", self.config_file)
        return recipe, derived

    def misplaced(self, save_steps: int) -> list[Path]:
        """Folders where a run writes files, and files where it makes folders; it saves at multiples of `save_steps`."""
        files = [self.config_file, self.metrics_file, self.bad_file, self.results_file, self.weights_file]
        files += [self.path / name for name in (CONFIG_NAME, PROCESSOR_NAME)]
        steps = {path: _step(path, CHECKPOINT) for path in self.path.glob("checkpoint-*")}
        folders = [path for path, step in steps.items() if step is not None and step % save_steps == 0]
        folders += [self.path / ".tmp-files", *self.unfinished_checkpoints()]
        return [path for path in files if path.is_dir()] + [path for path in folders if path.is_file()]

    def append_event(self, event: dict[str, Any]) -> None:
        """Append one event, which has a `step`."""
        append_line(self.metrics_file, event)

    def events(self) -> list[dict[str, Any]]:
        """All events, as they were logged."""
        return _read_lines(self.metrics_file, lambda event: is_count(event.get("step")))

    def cut_events(self, last_step: int) -> list[dict[str, Any]]:
        """Remove the events after a step, and all lines that aren't events; returns the remaining events."""
        events = [] if last_step < 0 else [event for event in self.events() if event["step"] <= last_step]
        if self.metrics_file.exists():
            write_lines(self.metrics_file, events)
        return events

    def write_bad_samples(self, samples: Sequence[dict[str, str]]) -> None:
        """Replace the file by the `key` and the `reason` of each image; only warns if it can't be written."""
        with _or_warn(self.bad_file):
            write_lines(self.bad_file, samples)

    def bad_samples(self) -> list[dict[str, str]]:
        """The `key` and the `reason` of each image in the file."""
        named = ("key", "reason")
        return _read_lines(self.bad_file, lambda sample: all(isinstance(sample.get(name), str) for name in named))

    def picture_file(self, step: int) -> Path:
        return self.picture_folder / f"step-{step}.png"

    def save_picture(self, step: int, picture: Any) -> None:
        """Save a PIL image as the picture of a step."""
        self.picture_folder.mkdir(exist_ok=True)
        with replaced(self.picture_file(step)) as temporary:
            picture.save(temporary)

    def pictures(self) -> list[tuple[int, Path]]:
        """(step, file) of each complete picture, by step."""
        steps = {path: _step(path, PICTURE) for path in self.picture_folder.glob("step-*")}
        whole = [(step, path) for path, step in steps.items() if step is not None and _is_whole_png(path)]
        if skipped := len(steps) - len(whole):
            first = min(steps.keys() - {path for _, path in whole})
            logger.warning("%s: skipped %d files that aren't pictures, e.g. %s", self.path, skipped, first.name)
        return sorted(whole)

    def remove_pictures(self, after_step: int) -> None:
        """Remove the pictures of later steps, complete or not."""
        for path in self.picture_folder.glob("step-*"):
            if (step := _step(path, PICTURE)) is not None and step > after_step and path.is_file():
                path.unlink()

    def results(self) -> list[dict[str, Any]]:
        """The entries of results.json that a card or a report can use."""
        content = _read_or(None, self.results_file, read_json)
        entries = content if isinstance(content, list) else []
        usable = [entry for entry in entries if _is_whole_result(entry)]
        if content is not None and not (isinstance(content, list) and len(usable) == len(content)):
            logger.warning("%s: entries that aren't results of hf-mae are skipped", self.results_file)
        return without_secrets(usable)

    def conversion(self) -> dict[str, Any]:
        """Where converted weights come from; empty for weights that were trained."""
        return _read_table(self.conversion_file, read_json)

    def checkpoint(self, step: int) -> Path:
        return self.path / f"checkpoint-{step}"

    def unfinished_checkpoints(self) -> list[Path]:
        """Temporary folders of checkpoints, while they are written or after a crash."""
        return list(self.path.glob(".tmp-checkpoint-*"))

    def checkpoints(self, last_step: int | None = None) -> list[Path]:
        """Folders named `checkpoint-STEP`, up to a step if one is given, oldest first, complete or not."""
        folders = [(_step(path, CHECKPOINT), path) for path in self.path.glob("checkpoint-*") if path.is_dir()]
        steps = sorted((step, path) for step, path in folders if step is not None)
        return [path for step, path in steps if last_step is None or step <= last_step]


def run_of(folder: Path) -> tuple[RunFolder, int | None]:
    """The run that a folder belongs to, and its step: for `checkpoint-STEP` the folder above, else itself and None."""
    # A checkpoint may be a link, under its own name or under another one, beside its run or elsewhere.
    places = [(_step(path, CHECKPOINT), RunFolder(path.parent)) for path in (folder.absolute(), folder.resolve())]
    found = [(run, step) for step, run in places if step is not None]
    recorded = [(run, step) for run, step in found if run.config_file.exists()]
    return next(iter([*recorded, *found]), (RunFolder(folder), None))


def _step(path: Path, name: str) -> int | None:
    match = re.fullmatch(name, path.name)
    return int(match[1]) if match else None


def _is_whole_png(path: Path) -> bool:
    content = path.read_bytes() if path.is_file() else b""
    return content.startswith(PNG_START) and content.endswith(PNG_END)


def is_number(value: Any) -> bool:
    """Whether a value from a file is a number to compute with: finite, no larger than float32's, and not a bool."""
    return type(value) in (int, float) and abs(value) < 1e39


def is_count(value: Any) -> bool:
    """Whether a value from a file is a whole number of steps or images."""
    return type(value) is int and 0 <= value < 2**63


def curve(events: Sequence[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    """(step, value) of each event that has a number under a key."""
    return [(event["step"], event[key]) for event in events if is_number(event.get(key))]


# ------------------------------------------------------------------------------------------ results.json


def read_results(path: Path) -> list[dict[str, Any]]:
    """The entries of a results.json, to add to; none if the file is missing, a DataError if it is something else."""
    if not path.exists():
        return []
    try:
        results = read_json(path)
    except (ValueError, OSError):
        results = None
    if not isinstance(results, list) or not all(isinstance(entry, dict) and "figures" in entry for entry in results):
        raise DataError(f"{path} is not a list of results of hf-mae; move it away, or name another file")
    return results


def add_result(path: Path, result: dict[str, Any], key: str = "--results") -> None:
    """Add an entry to a results.json; it replaces one with the same protocol, data and weights.

    `key` names the place on the command line.

    Raises a DataError if the file is something else, a UserError if it can't be written.
    """
    same = ("protocol", "data", "checkpoint")
    with writing(path, key):  # `read_results` raises no OSError
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path):
            others = [entry for entry in read_results(path) if any(entry.get(key) != result[key] for key in same)]
            write_json(path, [*others, result])


def is_percent(name: str) -> bool:
    """Whether a figure of a result is an accuracy, in percent."""
    return "top" in name or name == "accuracy"


def limits_of(entry: dict[str, Any], name: str) -> list[float] | None:
    """The smallest and largest value of a figure over several seeds, or else its interval; None without either.

    An interval without width (all images are right, or all wrong) isn't shown: it would look like certainty.
    """
    if entry.get("ranges"):
        return entry["ranges"].get(name)
    low, high = entry.get("intervals", {}).get(name, (0, 0))
    return None if low == high else [low, high]


def show_figure(name: str, value: float) -> str:
    """A figure of a result as text."""
    return f"{value:.2f} %" if is_percent(name) else f"{value:.4g}"


def show_limits(name: str, limits: Sequence[float]) -> str:
    """The lower and upper limit of a figure as text."""
    return " to ".join(f"{limit:.2f}" if is_percent(name) else f"{limit:.4g}" for limit in limits)


def _is_whole_result(entry: Any) -> bool:
    """Whether an entry has everything that a card and a report show, with values of the right types."""
    tables = ("protocol", "data", "checkpoint", "figures")
    if not isinstance(entry, dict) or not all(isinstance(entry.get(name), dict) for name in tables):
        return False
    data, limits = entry["data"], [entry.get("ranges", {}), entry.get("intervals", {})]
    texts = [entry["protocol"].get("name"), data.get("dataset"), data.get("evaluated_on")]
    optional = [data[name] for name in ("config", "revision") if data.get(name) is not None]
    counts = [data.get("eval_images"), data.get("classes"), data.get("train_images", 0)]
    return (
        all(isinstance(text, str) for text in texts + optional)
        and all(map(is_count, counts))
        and all(map(is_number, entry["figures"].values()))
        and all(isinstance(pairs, dict) and all(map(_is_pair, pairs.values())) for pairs in limits)
        and isinstance(per_class := entry.get("per_class", {}), dict)
        and all(map(_is_class_table, per_class.values()))
    )


def _is_class_table(value: Any) -> bool:
    """Whether a value holds a class's support and figures, each with its interval."""
    tables = [value.get("figures"), value.get("intervals")] if isinstance(value, dict) else [None]
    return (
        all(isinstance(table, dict) for table in tables)
        and is_count(value.get("support"))
        and tables[0].keys() == tables[1].keys()
        and all(map(is_number, tables[0].values()))
        and all(map(_is_pair, tables[1].values()))
    )


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(is_number, value))


# ------------------------------------------------------------------------------------------ tolerant reading


def _read_or(default: Any, path: Path, read: Callable[[Path], Any]) -> Any:
    """The file's content. If it can't be read: the default, with a warning unless the file is missing."""
    try:
        return read(path)
    except FileNotFoundError:
        return default
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        logger.warning("%s can't be read and is skipped: %s", path, one_line(error))
        return default


class _PlainDumper(yaml.SafeDumper):
    """Writes YAML without references, even if one list is the value of two keys."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


class _PlainLoader(yaml.SafeLoader):
    """Reads YAML as `write_config` writes it. References are refused: a few lines could expand to gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it contains references")
        return super().compose_node(parent, index)


def _read_yaml(path: Path) -> Any:
    """Read a YAML file as JSON types: dates, bytes and sets become text."""
    return json.loads(json.dumps(yaml.load(read_bytes(path), _PlainLoader), default=str))


def _read_table(path: Path, read: Callable[[Path], Any]) -> dict[str, Any]:
    content = _read_or({}, path, read)
    if isinstance(content, dict):
        return content
    logger.warning("%s isn't a table of keys and is skipped: %.40s", path, content)
    return {}


def _read_lines(path: Path, belongs: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """The objects of a JSON lines file; lines that were cut off or hold something else are skipped."""
    kept, skipped = [], []
    for line in filter(bytes.strip, _read_or(b"", path, read_bytes).splitlines()):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict) and belongs(value):
            kept.append(value)
        else:
            skipped.append(line)
    if skipped:
        first = skipped[0].decode(errors="replace")
        logger.warning("%s: %d lines skipped that were cut off or aren't ours, e.g. %.40s", path, len(skipped), first)
    return kept


def append_line(path: Path, value: dict[str, Any]) -> None:
    """Append a line to a JSON lines file, even if its last line was cut off. Other processes may append too."""
    with path.open("ab+") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
        whole = file.read(1) in (b"", b"\n")
        # A single write of a short line doesn't mix with the lines of other processes.
        file.write((b"" if whole else b"\n") + json.dumps(value).encode() + b"\n")


def append_bad_sample(bad_file: Path, key: str, reason: str) -> None:
    """Append an image that can't be decoded; only warns if the file can't be written."""
    with _or_warn(bad_file):
        append_line(bad_file, {"key": key, "reason": reason})


@contextmanager
def _or_warn(path: Path) -> Iterator[None]:
    """Report an OSError in one line and continue: training doesn't need this file."""
    try:
        yield
    except OSError as error:
        logger.warning("%s can't be written and is incomplete: %s", path, one_line(error))


def write_lines(path: Path, values: Sequence[dict[str, Any]]) -> None:
    """Write a JSON lines file, the old or the new one at every instant."""
    write_text(path, "".join(json.dumps(value) + "\n" for value in values))
