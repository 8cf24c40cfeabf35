"""Record what the package does, to see that moving code around changes nothing.

    python scripts/checks/record.py before.json                           # before the change, about three minutes
    python scripts/checks/record.py after.json --compare before.json      # after it; exit code 1 if anything differs
    python scripts/checks/record.py after.json --compare before.json --only models orders

The record is one flat JSON object. Its keys read like paths (`pretrain/whole/metrics.jsonl/000030/eval_loss`), its
values are numbers, words or sha256 sums. Everything runs at seed 0, on one thread and on the CPU, in a temporary folder
by relative paths. Hashes of floats depend on the CPU and on the version of torch, so compare records of one machine.
Left out, because they always change: times and speeds, versions, the name of the hardware, and the commit that a push
ends with. Safetensors files are hashed with a sorted header, since the order of their metadata is random.

Checkpoints of older code:

    python scripts/checks/record.py before.json --checkpoint-out old/checkpoint-30
    python scripts/checks/record.py after.json --resume-from old/checkpoint-30 --only pretrain [--rename blr=base_lr]

The second command resumes the kept checkpoint to step 60 and fails unless the weights equal those of a run that was
never interrupted. `--rename` rewrites keys of the copied trainer.json and config.json first.
"""

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from facts import digest, file_facts, flatten, folder_facts, output_hashes, sha256, tensor_hash
from images import image_table, write_images, write_parquet, write_tars
from PIL import Image

# ------------------------------------------------------------------------------------------ names that may change
# Command lines, imports of internals and of test helpers: when the package renames something, edit this part alone.

ROOT = Path(__file__).resolve().parents[2]
TEST_HELPERS = ROOT / "tests"

DIGITS_RUN = [
    "pretrain", "--recipe", "quickstart", "--total_steps", 60, "--save_steps", 30, "--log_steps", 10,
    "--eval_steps", 30, "--quality_steps", 30,
]  # fmt: skip
# As many features as fit into six steps: colour images, a cross decoder, schedules, two masks per image, accumulation.
CROSS_RUN = [
    "pretrain", "--recipe", "quickstart", "--dataset", "images", "--output_dir", "runs/cross", "--total_steps", 6,
    "--total_batch_size", 32, "--per_device_batch_size", 16, "--masks_per_image", 2, "--warmup_steps", 2,
    "--image_size", 16, "--patch_size", 4, "--image_size_schedule", "0:8", "0.5:16",
    "--mask_ratio_schedule", "0:0.5", "0.5:0.75", "--decoder_attention", "cross", "--decoder_fusion", "true",
    "--prediction_ratio", 0.25, "--norm_pix_loss", "true", "--flip", "true", "--drop_path_rate", 0.1,
    "--clip_grad", 1.0, "--log_steps", 1, "--eval_steps", 3, "--quality_steps", 0, "--num_workers", 0,
]  # fmt: skip
FINETUNE = [
    "finetune", "--recipe", "finetune_quickstart", "--model", "runs/digits", "--output_dir", "runs/finetuned",
    "--total_steps", 6, "--log_steps", 1, "--eval_steps", 3,
]  # fmt: skip
PUSH = ["push", "runs/digits", "--repo_id", "user/digits"]
KNN = ["evaluate", "knn", "--model", "runs/digits", "--dataset", "digits", "--results", "knn.json"]
EMBED = ["embed", "--model", "runs/digits", "--dataset", "digits", "--max_samples", 200, "--output", "features.npy"]
RECONSTRUCT = [
    "reconstruct", "digits", "--model", "runs/digits", "--mask_ratios", 0.5, 0.75, "--output", "picture.png",
]  # fmt: skip
SCORES = r"([\d.]+) dB, SSIM ([\d.]+)"  # in what `reconstruct` prints
# The original's files don't say how many heads the model has.
FROM_ORIGINAL = [
    "--num_attention_heads", 4, "--decoder_num_attention_heads", 2, "--norm_pix_loss", "false",
]  # fmt: skip


def training_batches(
    dataset: str, streaming: bool | None, ranks: int, workers: int, epochs: int
) -> tuple[dict[str, Any], Iterator[list[Any]]]:
    """What a pretraining run reads from a data set.

    Args:
        dataset: name of the data, as on the command line.
        streaming: as in `hf-mae pretrain`.
        ranks: training processes that share each batch.
        workers: loader processes for each of them.
        epochs: passes over the data.

    Returns:
        What doesn't depend on ranks and workers: the plan, the fingerprint and the keys of the rows held out.
        The global batches: for each step, the batches of all ranks, with `keys`, `labels`, `images` and `noise`.
    """
    from hf_mae import ImageSpec, Rows, StreamPlan, TrainingStream, each_batch, make_loader, open_source

    source = open_source(dataset, streaming=streaming)
    rows, held_out = (Rows(source, part, 0.05) for part in ("train", "held_out"))
    # Always the plan for two ranks with two workers, because the order must not depend on the readers.
    plan = StreamPlan.choose(32, 2, 2, len(rows), source.random_access)
    channels = 1 if dataset == "digits" else 3
    spec = ImageSpec(size=(8, 8), num_channels=channels, dtype="uint8", num_patches=16)
    streams = [
        TrainingStream(
            rows, plan, spec, 0, [0] * plan.num_streams, 0, -(-epochs * len(rows) // plan.total_batch_size),
            rank, ranks, plan.items_per_step(ranks, workers, 1),
        )
        for rank in range(ranks)
    ]  # fmt: skip
    facts = {
        "plan": vars(plan),
        "fingerprint": source.fingerprint,
        "held_out": digest([row.key for row in held_out.read(held_out.index)]),
    }
    loaders = [each_batch(make_loader(stream, workers)) for stream in streams]
    return facts, map(list, zip(*loaders, strict=True))


def hub_server(root: Path) -> Any:
    """The tests' Hub on 127.0.0.1; a context manager with `env` for the processes that push to it."""
    return import_module("hub_server").HubServer(root)


def tiny_inputs() -> tuple[dict[str, Any], torch.Tensor, torch.Tensor]:
    """The tests' tiny configuration (32 pixels, patches of 8, 4 layers), (2, 3, 32, 32) pixels, (2, 16) mask noise."""
    helpers = import_module("tiny")
    return helpers.TINY, helpers.pixels(), helpers.draw_noise()


# ------------------------------------------------------------------------------------------ what is recorded


class Recording:
    """One run of this script in the current folder, which must be a temporary one.

    Args:
        resume_from: a kept checkpoint of older code, or None.
        renames: old name -> new name of keys in that checkpoint.
    """

    def __init__(self, resume_from: Path | None = None, renames: dict[str, str] | None = None):
        self.resume_from, self.renames = resume_from, renames or {}

    @property
    def sections(self) -> dict[str, Callable[[], dict[str, Any]]]:
        """Name of a section -> function that measures it."""
        return {
            "models": self.models, "processors": self.processors, "saved": self.saved, "orders": self.orders,
            "pretrain": self.pretrain, "convert": self.convert, "pushed": self.pushed, "downstream": self.downstream,
        }  # fmt: skip

    # -------------------------------------------------------------------------- the model and its files

    def models(self) -> dict[str, Any]:
        """Initial weights, outputs and gradients of every class."""
        _, pixel_values, noise = tiny_inputs()
        masked = {"noise": noise, "output_hidden_states": True}
        eager = {"attn_implementation": "eager"}  # the only one that returns attentions
        cross = {"decoder_attention": "cross", "decoder_fusion": True, "prediction_ratio": 0.5}
        wide = {"pixel_values": torch.cat([pixel_values, pixel_values], dim=3), "interpolate_pos_encoding": True}
        labels = torch.tensor([1, 3])
        return {
            "encoder": model_facts("MAEModel", {}, {}),
            "encoder, masked": model_facts("MAEModel", {}, {"mask_ratio": 0.75, **masked}),
            "encoder, eager": model_facts("MAEModel", eager, {"output_attentions": True}),
            "encoder, wide image": model_facts("MAEModel", {}, wide),
            "self decoder": model_facts("MAEForPreTraining", {}, masked),
            "self decoder, masks of its own": model_facts("MAEForPreTraining", {"norm_pix_loss": True}, {}),
            "cross decoder": model_facts("MAEForPreTraining", cross, masked),
            "classifier": model_facts("MAEForImageClassification", {"num_labels": 5}, {"labels": labels}),
            "backbone": model_facts("MAEBackbone", {"out_indices": [0, 2, 4]}, {}),
            "backbone, pyramid": model_facts("MAEBackbone", {"pyramid_scales": [4, 2, 1, 0.5]}, {}),
        }

    def processors(self) -> dict[str, Any]:
        """The pixels of a colour and a grey image from each backend."""
        import hf_mae

        generator = np.random.default_rng(0)
        colour = generator.integers(0, 256, (300, 260, 3), dtype=np.uint8)
        grey = generator.integers(0, 256, (90, 120, 1), dtype=np.uint8)
        one_channel: dict[str, Any] = {
            "num_channels": 1, "image_mean": [0.5], "image_std": [0.25], "size": {"shortest_edge": 40},
            "crop_size": {"height": 32, "width": 32},
        }  # fmt: skip
        facts: dict[str, Any] = {}
        for kind in (hf_mae.MAEImageProcessor, hf_mae.MAEImageProcessorPil):
            for name, settings, image in (("colour", {}, colour), ("grey", one_channel, grey)):
                pixels = kind(**settings)(image, return_tensors="pt", input_data_format="channels_last")
                facts[f"{kind.__name__}, {name}"] = output_hashes(pixels)
        return facts

    def saved(self) -> dict[str, Any]:
        """The files of a model's folder, without and with the code that loads it."""
        import hf_mae

        for name, options in (("plain", {}), ("with_code", {"with_code": True})):
            tiny_model("MAEForPreTraining").save_pretrained(f"saved/{name}", **options)
            hf_mae.MAEImageProcessor().save_pretrained(f"saved/{name}", **options)
        return folder_facts(Path("saved"))

    # -------------------------------------------------------------------------- the order of samples

    def orders(self) -> dict[str, Any]:
        """Three epochs of each kind of source, on one and two ranks, without and with loader workers."""
        _ = self.images
        write_parquet(Path("parquet"))
        write_tars(Path("tars"))
        image_table().save_to_disk("arrow")
        sources = {
            "arrays": ("digits", None), "image files": ("images", None), "arrow": ("arrow", None),
            "parquet, mapped": ("parquet", False), "parquet, in place": ("parquet", True),
            "webdataset": ("tars/shard-{000..001}.tar", None),
        }  # fmt: skip
        return {name: order_facts(dataset, streaming) for name, (dataset, streaming) in sources.items()}

    @cached_property
    def images(self) -> Path:
        """The folder of image files."""
        write_images(Path("images"))
        return Path("images")

    # -------------------------------------------------------------------------- commands

    @cached_property
    def digits(self) -> Path:
        """A pretraining run of 60 steps on the built-in digits, never interrupted."""
        hf_mae(*DIGITS_RUN, "--output_dir", "runs/digits")
        return Path("runs/digits")

    def pretrain(self) -> dict[str, Any]:
        """The run on digits, the same run resumed at step 30, and a short run with everything else turned on."""
        facts = {"whole": folder_facts(self.digits)}
        resumed = Path("runs/resumed")
        shutil.copytree(self.digits, resumed)
        shutil.rmtree(resumed / "checkpoint-60")
        for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
            (resumed / name).unlink()
        facts["resumed"] = weights_after_resuming(resumed)
        if self.resume_from:
            folder = Path("runs/older")
            shutil.copytree(self.resume_from, folder / "checkpoint-30")
            rename_keys(folder / "checkpoint-30", self.renames)
            facts["older checkpoint"] = weights_after_resuming(folder)
        _ = self.images
        hf_mae(*CROSS_RUN)
        return {**facts, "cross": folder_facts(Path("runs/cross"))}

    def convert(self) -> dict[str, Any]:
        """A tiny model in each other format, and back."""
        import hf_mae as package

        tiny_model("MAEForPreTraining").save_pretrained("tiny")
        package.MAEImageProcessor().save_pretrained("tiny")
        for target, options in (("vit_mae", []), ("timm", []), ("original", FROM_ORIGINAL)):
            hf_mae("convert", "tiny", f"converted/{target}", "--to", target)
            hf_mae("convert", f"converted/{target}", f"converted/back_from_{target}", "--to", "mae", *options)
        return folder_facts(Path("converted"))

    def pushed(self) -> dict[str, Any]:
        """The repository that a push creates on the Hub."""
        _ = self.digits
        with hub_server(Path("hub").absolute()) as hub:
            hf_mae(*PUSH, environment=hub.env)
            return folder_facts(hub.root / "models" / "user" / "digits")

    def downstream(self) -> dict[str, Any]:
        """Fine-tuning, kNN, features and reconstructions of the run on digits."""
        _ = self.digits
        for command in (FINETUNE, KNN, EMBED):
            hf_mae(*command)
        said = hf_mae(*RECONSTRUCT)
        features = torch.from_numpy(np.load("features.npy"))
        picture = torch.from_numpy(np.array(Image.open("picture.png")))
        return {
            "finetune": folder_facts(Path("runs/finetuned")),
            "knn": file_facts(Path("knn.json"))[0]["figures"],
            "embed": tensor_hash({"features": features}),
            "reconstruct": {"scores": re.findall(SCORES, said), "picture": tensor_hash({"pixels": picture})},
        }


def tiny_model(class_name: str, **overrides: Any) -> Any:
    """A new model of a class of the package, from seed 0."""
    import hf_mae

    torch.manual_seed(0)
    return getattr(hf_mae, class_name)(hf_mae.MAEConfig(**{**tiny_inputs()[0], **overrides}))


def model_facts(class_name: str, overrides: dict[str, Any], call: dict[str, Any]) -> dict[str, Any]:
    """Hashes of a new model: parameters, weights, outputs in evaluation mode and, given a loss, gradients."""
    model = tiny_model(class_name, **overrides).eval()
    call = {"pixel_values": tiny_inputs()[1], **call}
    facts = {
        "parameters": digest([(name, parameter.requires_grad) for name, parameter in model.named_parameters()]),
        "weights": tensor_hash(model.state_dict()),
        "outputs": output_hashes(model(**call)),
    }
    torch.manual_seed(0)
    loss = model.train()(**call).get("loss")
    if loss is not None:
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        facts["gradients"] = tensor_hash(gradients)
    return facts


def order_facts(dataset: str, streaming: bool | None) -> dict[str, Any]:
    """Hashes of three epochs, for each number of ranks and workers."""
    facts: dict[str, Any] = {}
    for ranks in (1, 2):
        for workers in (0, 2):
            same_for_all, steps = training_batches(dataset, streaming, ranks, workers, epochs=3)
            batches = [batch for step in steps for batch in step]
            keys = [key for batch in batches for key in batch.keys]
            facts |= same_for_all
            facts[f"ranks {ranks}, workers {workers}"] = {
                "rows": len(keys),
                "first": keys[:3],
                "keys": digest(keys),
                "labels": digest([label for batch in batches for label in batch.labels]),
                "images": tensor_hash({"images": torch.cat([batch.images for batch in batches])}),
                "noise": tensor_hash({"noise": torch.cat([batch.noise for batch in batches])}),
            }
    return facts


def hf_mae(*words: Any, environment: dict[str, str] | None = None) -> str:
    """Run `hf-mae WORDS` in a new process, and exit if it fails; returns what it printed."""
    command = [sys.executable, "-m", "hf_mae.cli", *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return done.stdout


def weights_after_resuming(folder: Path) -> dict[str, str]:
    """Resume the run on digits from the newest checkpoint in a folder; returns hashes of its last weights."""
    hf_mae(*DIGITS_RUN, "--output_dir", folder, "--resume", "auto")
    names = ("checkpoint-60/model.safetensors", "checkpoint-60/optimizer.safetensors", "model.safetensors")
    return {name: file_facts(folder / name) for name in names}


def rename_keys(checkpoint: Path, renames: dict[str, str]) -> None:
    """Rename keys of the recipe and of the model's configuration, and bring the manifest up to date."""
    if not renames:
        return
    manifest = json.loads((checkpoint / "COMPLETE").read_text())
    for name in ("trainer.json", "config.json"):
        content = json.loads((checkpoint / name).read_text())
        keys = content.get("recipe", content)
        for old in renames.keys() & keys.keys():
            keys[renames[old]] = keys.pop(old)
        text = json.dumps(content, indent=1).encode()
        (checkpoint / name).write_bytes(text)
        manifest[name] = {"bytes": len(text), "sha256": sha256(text)}
    (checkpoint / "COMPLETE").write_text(json.dumps(manifest, indent=1))


# ------------------------------------------------------------------------------------------ the command


def same_machine_facts() -> dict[str, Any]:
    """What the hashes of floats depend on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
    }


def unequal_weights(record: dict[str, Any]) -> list[str]:
    """Weights of resumed runs that differ from those of the uninterrupted run."""
    parts = [re.fullmatch(r"pretrain/(resumed|older checkpoint)/(.+)", key) for key in record]
    return [part[0] for part in parts if part and record[part[0]] != record[f"pretrain/whole/{part[2]}"]]


def differences(old: dict[str, Any], new: dict[str, Any], sections: list[str]) -> list[str]:
    """A line for each key of these sections whose value differs, or that only one record has."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        section, _, rest = key.partition("/")
        # This part is compared with the whole run in the same record.
        if section not in (*sections, "machine") or rest.startswith("older checkpoint/"):
            continue
        before, after = (json.dumps(record[key]) if key in record else "absent" for record in (old, new))
        if before != after:
            lines.append(f"{key}: {before[:100]} -> {after[:100]}")
    return lines


def prepare_environment(folder: Path) -> None:
    """One thread, no GPU, no network, caches in the temporary folder, and the package of this checkout."""
    torch.set_num_threads(1)
    os.environ |= {
        "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    sys.path[:0] = [str(ROOT), str(TEST_HELPERS)]
    # Imported here, because these libraries read the environment at import.
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()


def make_record(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the requested sections in a temporary folder."""
    started = time.monotonic()
    recording = Recording(options.resume_from and options.resume_from.absolute(), dict(options.rename))
    kept = options.checkpoint_out and options.checkpoint_out.absolute()
    record = flatten(same_machine_facts(), "machine")
    with tempfile.TemporaryDirectory(prefix="hf_mae_record_") as temporary, contextlib.chdir(temporary):
        prepare_environment(Path(temporary))
        for name in options.only:
            record |= flatten(recording.sections[name](), name)
            print(f"[{time.monotonic() - started:5.1f} s] {name}", file=sys.stderr, flush=True)
        if kept:
            shutil.copytree(recording.digits / "checkpoint-30", kept)
    return record


def parse_options() -> argparse.Namespace:
    names = list(Recording().sections)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="JSON file to write")
    parser.add_argument("--compare", type=Path, metavar="OLD", help="record to compare with")
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="sections; all when omitted")
    parser.add_argument("--checkpoint-out", type=Path, metavar="DIR", help="new folder that keeps checkpoint-30")
    parser.add_argument("--resume-from", type=Path, metavar="DIR", help="kept checkpoint to resume; needs pretrain")
    parser.add_argument(
        "--rename", nargs="+", default=[], type=lambda word: word.split("=", 1), metavar="OLD=NEW",
        help="keys to rename in that checkpoint",
    )  # fmt: skip
    options = parser.parse_args()
    if options.resume_from and "pretrain" not in options.only:
        parser.error("--resume-from needs the section pretrain; add it to --only")
    return options


def main() -> int:
    options = parse_options()
    record = make_record(options)
    options.output.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    print(f"{len(record)} facts in {options.output}")
    found = [f"{key} differs from the uninterrupted run" for key in unequal_weights(record)]
    if options.compare:
        found += differences(json.loads(options.compare.read_text()), record, options.only)
        print("\n".join(found) or f"the same as {options.compare}")
    elif found:
        print("\n".join(found))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
