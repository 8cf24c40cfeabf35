"""What `record.py` records of tensors, files and folders: hashes, and values except those that always change."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch
import yaml

# Keys of JSON and YAML files and log lines whose values depend on the machine, the day or the installation.
CHANGING = {
    "data_wait", "hardware", "hf_mae", "images_per_second", "time", "torch", "transformers", "transformers_version",
    "version", "versions",
}  # fmt: skip
CHANGING_ROWS = r"(?m)^\| (hardware|throughput|hf-mae|torch) \|.*\n"  # of a model card


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def digest(value: Any) -> str:
    """sha256 of anything that JSON can hold."""
    return sha256(json.dumps(value).encode())


def tensor_hash(tensors: dict[str, torch.Tensor]) -> str:
    """sha256 of names, dtypes, shapes and bytes."""
    summary = hashlib.sha256()
    for name, tensor in tensors.items():
        summary.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        summary.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return summary.hexdigest()


def output_hashes(outputs: Any) -> dict[str, str]:
    """A hash for each field of a model's outputs; tuples such as hidden states are one field."""
    fields = {}
    for name, value in outputs.items():
        values = value if isinstance(value, tuple | list) else (value,)
        fields[name] = tensor_hash({str(number): tensor for number, tensor in enumerate(values)})
    return fields


def without_changing(value: Any) -> Any:
    """A parsed file without the keys in `CHANGING`, at any depth."""
    if isinstance(value, dict):
        return {key: without_changing(held) for key, held in value.items() if key not in CHANGING}
    if isinstance(value, list):
        return [without_changing(held) for held in value]
    return value


def flatten(value: Any, path: str = "") -> dict[str, Any]:
    """Flatten nested dictionaries, and lists of them, to one with keys like paths; an empty one stays a value."""
    if isinstance(value, list) and value and all(isinstance(held, dict) for held in value):
        value = dict(enumerate(value))
    if not isinstance(value, dict) or not value:
        return {path: value}
    return {
        key: leaf for name, held in value.items() for key, leaf in flatten(held, f"{path}/{name}".strip("/")).items()
    }


def file_facts(path: Path) -> Any:
    """What is recorded of a file: its values if it has keys, otherwise a hash."""
    if path.name == "COMPLETE":
        return sorted(json.loads(path.read_text()))  # its checksums depend on the versions in config.json
    if path.suffix == ".json":
        return without_changing(json.loads(path.read_text()))
    if path.suffix == ".yaml":
        return without_changing(yaml.safe_load(path.read_text()))
    if path.suffix == ".jsonl":
        return log_facts(path)
    if path.suffix == ".md":
        text = re.sub(r"\b[0-9a-f]{40}\b", "COMMIT", path.read_text())
        return sha256(re.sub(CHANGING_ROWS, "", text).encode())
    if path.suffix == ".safetensors":
        return safetensors_hash(path.read_bytes())
    return sha256(path.read_bytes())


def safetensors_hash(content: bytes) -> str:
    """sha256 of a safetensors file with its header sorted: its metadata entries are in random order."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:end]), sort_keys=True)
    return sha256(header.encode() + content[end:])


def log_facts(path: Path) -> dict[str, Any]:
    """The events of a log by step; a line without a step is filed by its line number."""
    facts: dict[str, Any] = {}
    for number, line in enumerate(path.read_text().splitlines()):
        event = without_changing(json.loads(line))
        facts.setdefault(f"{event.pop('step', number):06}", {}).update(event)
    return facts


def folder_facts(folder: Path) -> dict[str, Any]:
    """File -> facts, for all files in a folder and its subfolders."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): file_facts(path) for path in files}
