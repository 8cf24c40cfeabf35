"""Runs of `hf-mae pretrain` that take about a second, in this process or in others, and a look at what they leave."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import yaml
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

from hf_mae.cli import main, read_keys
from hf_mae.commandline import shipped_recipes
from hf_mae.keys.finetune_keys import FinetuneRecipe
from hf_mae.keys.run_keys import PretrainRecipe

REPOSITORY = Path(__file__).parents[1]
# Digits of 8 x 8 pixels in 16 patches; two layers and one. Every step is logged.
TINY_RUN = {
    "dataset": "digits",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "decoder_hidden_size": 32,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 64,
    "image_size": 8,
    "patch_size": 2,
    "mask_ratio": 0.5,
    "crop_scale": [0.7, 1.0],
    "eval_crop_pct": 1.0,
    "total_batch_size": 32,
    "total_steps": 12,
    "warmup_steps": 2,
    "blr": 8e-3,
    "num_workers": 0,
    "log_steps": 1,
    "eval_steps": 6,
    "save_steps": 6,
    "quality_steps": 0,
}


def arguments(output_dir, **keys) -> list[str]:
    """The command line of a tiny run; a key that is None is left out."""
    return ["pretrain", *flags({**TINY_RUN, "output_dir": output_dir, **keys})]


def flags(keys: dict) -> list[str]:
    """The words of a command line; a key that is None is left out."""
    words = []
    for key, value in keys.items():
        if value is not None:
            words += [f"--{key}", *map(str, value if isinstance(value, list | tuple) else [value])]
    return words


def run(output_dir, **keys) -> Path:
    """A tiny run in this process that has to go well."""
    assert start(*arguments(output_dir, **keys)) == 0
    return Path(output_dir)


def start(*words) -> int:
    """`hf-mae WORDS` in this process, as if it were the first thing that the process does, and the last."""
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        return main([str(word) for word in words])
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)  # it keeps, among others, the precision


def load_pretrain_recipe(words: list[str]) -> PretrainRecipe:
    """What `hf-mae pretrain WORDS` would run."""
    return read_keys("pretrain", words)


def load_finetune_recipe(words: list[str]) -> FinetuneRecipe:
    """What `hf-mae finetune WORDS` would run."""
    return read_keys("finetune", words)


def recipe_names(command: str = "pretrain") -> list[str]:
    """The names of the package's recipes of one command."""
    return list(shipped_recipes(command))


def shipped_recipe(name: str) -> dict:
    """The values in the file of one of the package's recipes."""
    return yaml.safe_load((REPOSITORY / "hf_mae" / "recipes" / f"{name}.yaml").read_text())


def mistake(capture, *words) -> str:
    """The message of `hf-mae WORDS`, which has to fail by the user's mistake: one line without a traceback."""
    capture.readouterr()
    assert start(*words) == 2
    lines = [line for line in capture.readouterr().err.splitlines() if line.strip()]
    assert lines[-1].startswith("hf-mae: error: "), lines
    assert "Traceback" not in "".join(lines)
    return lines[-1].removeprefix("hf-mae: error: ")


def environment(**variables) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **variables}


def spawn(command, log: Path, **variables) -> subprocess.Popen:
    """A process in a session of its own, so that a test can end it with all its children."""
    with log.open("w") as file:
        return subprocess.Popen(
            [sys.executable, *map(str, command)],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment(**variables),
            start_new_session=True,
        )


def run_script(*words) -> str:
    """What a script of the repository prints, started as a user does; it has to go well."""
    command = list(map(str, words))
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def wait_for_step(output_dir: Path, step: int, process: subprocess.Popen, seconds: float = 90) -> None:
    """Until a run has logged this step."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, "the run ended before the step"
        metrics = output_dir / "metrics.jsonl"
        if metrics.exists() and any(f'{{"step": {step},' in line for line in metrics.read_text().splitlines()):
            return
        time.sleep(0.02)
    raise AssertionError(f"no step {step} after {seconds} s")


def events(output_dir) -> list[dict]:
    return [json.loads(line) for line in (Path(output_dir) / "metrics.jsonl").read_text().splitlines()]


def losses(output_dir) -> dict[int, float]:
    """Step -> training loss. No step may come twice."""
    logged = [(event["step"], event["loss"]) for event in events(output_dir) if "loss" in event]
    assert len(dict(logged)) == len(logged), f"steps logged twice: {[step for step, _ in logged]}"
    return dict(logged)


def evaluations(output_dir) -> dict[int, float]:
    """Step -> evaluation loss. No step may come twice."""
    logged = [(event["step"], event["eval_loss"]) for event in events(output_dir) if "eval_loss" in event]
    assert len(dict(logged)) == len(logged), f"steps evaluated twice: {[step for step, _ in logged]}"
    return dict(logged)


def checkpoints(output_dir) -> list[int]:
    """Steps of a run's checkpoints."""
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in Path(output_dir).glob("checkpoint-*"))


def weights_hash(folder) -> str:
    return hashlib.sha256((Path(folder) / "model.safetensors").read_bytes()).hexdigest()


def weights_difference(folder, other) -> float:
    """Largest difference between two models' weights, the biases of attention keys left out.

    Those change nothing (softmax takes no notice of them), so that their gradient is rounding alone; Adam divides it by
    its own size, and they go wherever rounding leads.
    """
    first, second = (load_file(Path(path) / "model.safetensors") for path in (folder, other))
    assert first.keys() == second.keys()
    for weights in (first, second):
        for name in weights:
            if name.endswith("qkv.bias"):
                query, _, value = weights[name].chunk(3)
                weights[name] = torch.cat([query, value])
            elif name.endswith("attention.kv.bias"):
                weights[name] = weights[name].chunk(2)[1]
    return max((first[name] - second[name]).abs().max().item() for name in first)


def tree(folder) -> dict[str, tuple[int, int]]:
    """Every file under a folder, with size and time of change."""
    stats = {path: path.stat() for path in sorted(Path(folder).rglob("*")) if path.is_file()}
    return {str(path.relative_to(folder)): (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


def cut_off(whole: Path, step: int, output_dir: Path) -> Path:
    """The folder of a run as it was when it was killed after this step's checkpoint and before the next."""
    shutil.copytree(whole, output_dir)
    for later in checkpoints(output_dir):
        if later > step:
            shutil.rmtree(output_dir / f"checkpoint-{later}")
    for name in ("model.safetensors", "config.json", "preprocessor_config.json"):
        (output_dir / name).unlink()
    return output_dir


def pictures(folder: Path, count: int = 64, size=(20, 26)) -> list[Path]:
    """PNG files of smooth colours in folders two levels deep."""
    rng = np.random.default_rng(count)
    paths = []
    for number in range(count):
        coarse = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC)
        path = folder / f"year-{number % 3}" / f"day-{number % 2}" / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
        paths.append(path)
    return paths
