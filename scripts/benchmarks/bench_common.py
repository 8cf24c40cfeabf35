"""What all benchmarks share: interleaved measurements, separate processes, tables and the header of the JSON."""

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SCRIPTS = Path(__file__).parent
PACKAGES = (
    "torch", "torchvision", "transformers", "accelerate", "datasets", "timm", "lightly", "pillow", "simplejpeg"
)  # fmt: skip


def interleaved(cells: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[Any]]:
    """Measure all cells in turn, `repeats` times, so that a temporary slowdown of the machine affects all of them."""
    figures: dict[str, list[Any]] = {name: [] for name in cells}
    for _ in range(repeats):
        for name, measure in cells.items():
            figures[name].append(measure())
    return figures


def spread(values: list[float]) -> dict[str, Any]:
    """Median and range, and the values themselves."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "values": values}


def table(figures: dict[str, list[float]], unit: str, against: str | None = None) -> None:
    """Print medians and ranges, and the ratio of each median to that of the cell `against`."""
    for name, values in figures.items():
        ratio = f"   x {statistics.median(values) / statistics.median(figures[against]):.2f}" if against else ""
        print(f"{name:56} {statistics.median(values):9.3f} {unit}   ({min(values):.3f} to {max(values):.3f}){ratio}")


def in_process(script: str, *words: Any, **variables: str) -> dict[str, Any]:
    """Run a script of this folder in a new process; returns the JSON on the last line of its output."""
    command = [sys.executable, "-W", "ignore", str(SCRIPTS / script), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables}, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def cpu_name() -> str:
    """The CPU's name from /proc, or from Python if there is no /proc."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def header() -> dict[str, Any]:
    """The machine and the versions, which the figures depend on."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "cpu": cpu_name(),
        "cores_seen": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "jpeg_decoder": "simplejpeg" if versions["simplejpeg"] else "Pillow",
        "python": platform.python_version(),
        "versions": versions,
    }
