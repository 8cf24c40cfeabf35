"""MAE against contrastive learning: the same ViT, data and minutes, at a small and a large batch.

    pip install 'hf-mae[studies]'
    python scripts/studies/compare_contrastive.py --dataset DATA --minutes 10

SimCLR (arXiv:2002.05709) and MoCo v3 (arXiv:2104.02057) use lightly's transforms, heads and SimCLR loss. Their encoder
is MAEModel, and the same commands measure all three methods. A short run before each finds how many steps fit into the
minutes, so that every schedule runs to its end.

At full size: the same command with --recipe vit_base_in1k --minutes 2000 --batch_sizes 1024 4096, on one GPU.
"""

# pyright: reportMissingImports=false
# lightly is in a separate extra, which type checks of this file don't need.

import argparse
import copy
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import study_common as studies
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

from hf_mae import MAEConfig, MAEImageProcessor, MAEModel, Rows, adamw, decode_image, lr_at, open_source

METHODS = ("mae", "simclr", "mocov3")
BLR = {"simclr": 5e-4, "mocov3": 1.5e-4}  # per 256 images, AdamW; MoCo v3's is from its paper, for ViT
WARM_UP = 0.1
SHORT_RUN = 12  # steps; the second half of them is timed

NOTES = """
Equal minutes of training for each cell. The contrastive methods see two views of each image, and "images/s" counts
images. Peak memory is that of the training process on the host, without loader workers.
"""


class TwoViews(Dataset):
    """Two random views (C, H, W) of each image of a data set."""

    def __init__(self, rows: Rows, size: int):
        from lightly.transforms.simclr_transform import SimCLRTransform

        small = size < 64
        # As in SimCLR for CIFAR-10: half the colour jitter and no blur.
        self.transform = SimCLRTransform(size, cj_strength=0.5 if small else 1.0, gaussian_blur=0.0 if small else 0.5)
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> list[torch.Tensor]:
        (row,) = self.rows.read(self.rows.index[index : index + 1])
        image: Any = decode_image(row.image, 3)
        views: Any = self.transform(image)
        return views


class SimCLR(nn.Module):
    """Encoder, head, and the loss of two views."""

    def __init__(self, config: MAEConfig):
        super().__init__()
        from lightly.loss import NTXentLoss
        from lightly.models.modules.heads import SimCLRProjectionHead

        self.encoder = MAEModel(config)
        self.head = SimCLRProjectionHead(config.hidden_size, 2048, 128)
        self.criterion = NTXentLoss(temperature=0.2)

    def forward(self, first: torch.Tensor, second: torch.Tensor, progress: float) -> torch.Tensor:
        z = self.head(self.encoder(torch.cat([first, second])).pooler_output)
        return self.criterion(*z.chunk(2))


class MoCoV3(nn.Module):
    """Encoder and predictor, their momentum encoder, and the symmetric loss."""

    def __init__(self, config: MAEConfig):
        super().__init__()
        from lightly.models.modules.heads import MoCoProjectionHead

        self.encoder = MAEModel(config)
        self.encoder.embeddings.patch_embed.requires_grad_(False)  # keeps ViT stable, Sec. 4.3 of its paper
        self.head = MoCoProjectionHead(config.hidden_size, 4096, 256, num_layers=3, batch_norm=True)
        self.predictor = MoCoProjectionHead(256, 4096, 256, num_layers=2, batch_norm=True)
        self.key_encoder, self.key_head = copy.deepcopy(self.encoder), copy.deepcopy(self.head)
        self.key_encoder.requires_grad_(False)
        self.key_head.requires_grad_(False)

    def forward(self, first: torch.Tensor, second: torch.Tensor, progress: float) -> torch.Tensor:
        from lightly.models.utils import update_momentum

        momentum = 1 - 0.01 * 0.5 * (1 + math.cos(math.pi * progress))  # 0.99 to 1
        update_momentum(self.encoder, self.key_encoder, momentum)
        update_momentum(self.head, self.key_head, momentum)
        both = torch.cat([first, second])
        queries = self.predictor(self.head(self.encoder(both).pooler_output))
        with torch.no_grad():
            keys = self.key_head(self.key_encoder(both).pooler_output)
        (q1, q2), (k1, k2) = F.normalize(queries, dim=1).chunk(2), F.normalize(keys, dim=1).chunk(2)
        temperature, places = 0.2, torch.arange(len(q1), device=q1.device)
        losses = [F.cross_entropy(q @ k.T / temperature, places) for q, k in ((q1, k2), (q2, k1))]
        return 2 * temperature * (losses[0] + losses[1])


def endless(loader: DataLoader) -> Iterator[Any]:
    while True:
        yield from loader


def train_contrastive(method: str, recipe: Path, batch: int, steps: int, dataset: str, output_dir: Path) -> None:
    """Pretrain by a contrastive method, and save the encoder, its speed and its peak memory."""
    settings = json.loads(recipe.read_text())
    config = MAEConfig(**settings["config"])
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: nn.Module = (SimCLR if method == "simclr" else MoCoV3)(config).to(device).train()
    images = TwoViews(Rows(open_source(dataset)), config.image_height_width[0])
    loader = DataLoader(
        images,
        batch,
        shuffle=True,
        drop_last=True,
        num_workers=2,
        persistent_workers=True,
        pin_memory=device.type == "cuda",
    )
    optimizer = adamw(model, (0.9, 0.95), 0.1)
    started = time.perf_counter()
    for step, views in zip(range(steps), endless(loader), strict=False):
        if step == steps // 2:
            started = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, BLR[method] * batch / 256, WARM_UP * steps, steps)
        first, second = (view.to(device) for view in views[:2])
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(first, second, step / steps)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step + 1} of {steps}: loss {loss.item():.4f}", flush=True)
    speed = (steps - steps // 2) * batch / (time.perf_counter() - started)
    model.encoder.save_pretrained(output_dir)
    MAEImageProcessor(**settings["processor"]).save_pretrained(output_dir)
    write_speed(output_dir, speed, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def write_speed(output_dir: Path, images_per_second: float, kilobytes: int) -> None:
    figures = {"images/s": images_per_second, "peak memory, MB": kilobytes / 1024}
    (output_dir / "speed.json").write_text(json.dumps(figures))


def train(method: str, batch: int, steps: int, options: argparse.Namespace, output_dir: Path) -> dict[str, float]:
    """Pretrain by any of the methods in a new process; returns images/s and peak memory."""
    if method == "mae":
        words = ["-m", "hf_mae.cli", "pretrain", "--recipe", options.recipe, "--dataset", options.dataset,
                 "--output_dir", output_dir, "--total_batch_size", batch, "--per_device_batch_size", batch,
                 "--total_steps", steps, "--eval_steps", steps, "--log_steps", max(1, steps // 2)]  # fmt: skip
    else:
        words = [
            __file__,
            "train",
            method,
            options.output_dir / "settings.json",
            batch,
            steps,
            options.dataset,
            output_dir,
        ]
    output_dir.mkdir(parents=True)
    with (output_dir.parent / "log").open("a") as log:
        process = subprocess.Popen([sys.executable, *map(str, words)], stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{method} with batch {batch} failed; see {output_dir.parent / 'log'}")
    if method == "mae":
        events = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
        write_speed(output_dir, [e for e in events if "loss" in e][-1]["images_per_second"], usage.ru_maxrss)
    return json.loads((output_dir / "speed.json").read_text())


def pretrained(method: str, batch: int, options: argparse.Namespace) -> tuple[Path, dict[str, float]]:
    """The cell's model, trained for as many steps as fit into the minutes, unless it exists."""
    folder = options.output_dir / f"{method}-{batch}"
    model = folder / "pretrain"
    if not (model / "speed.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        speed = train(method, batch, SHORT_RUN, options, folder / "short")["images/s"]
        train(method, batch, max(SHORT_RUN, round(60 * options.minutes * speed / batch)), options, model)
    return model, json.loads((model / "speed.json").read_text())


def main() -> None:
    parser = studies.parser(str(__doc__), "outputs/compare_contrastive")
    parser.set_defaults(minutes=10)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    options = parser.parse_args()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    write_settings(options)
    rows = []
    for batch in options.batch_sizes:
        for method in options.methods:
            model, speed = pretrained(method, batch, options)
            sitting = studies.Sitting(options.output_dir / f"{method}-{batch}", options.max_minutes_per_cell)
            try:
                figures = studies.measure(sitting, model, options)
            except studies.OutOfTime:
                print(f"{method}, batch {batch}: its time is up; repeat the command to continue", flush=True)
                continue
            rows.append({"cell": f"{method}, batch {batch}", **figures, **speed})
            print(rows[-1], flush=True)
    if rows:
        studies.write_table(rows, options.output_dir, NOTES)
        plot(rows, options.output_dir)


def plot(rows: list[dict[str, Any]], output_dir: Path) -> None:
    """`figure.png`: accuracy, images/s and peak memory, a bar for each method and batch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    headings = [heading for _, heading in studies.FIGURES.values() if heading in rows[0]]
    panels = [*((heading, f"{heading}, %") for heading in headings), ("images/s", "images/s"),
              ("peak memory, MB", "peak memory, MB")]  # fmt: skip
    figure, axes = pyplot.subplots(1, len(panels), figsize=(3 * len(panels), 3), layout="constrained", sharey=True)
    labels = [row["cell"] for row in rows][::-1]
    for axis, (key, title) in zip(axes, panels, strict=True):
        bars = axis.barh(labels, [row.get(key, 0) for row in rows][::-1])
        axis.bar_label(bars, fmt="{:.1f}" if title.endswith("%") else "{:.0f}", padding=2)
        axis.set_title(title)
        axis.margins(x=0.25)
    figure.savefig(output_dir / "figure.png", dpi=150)
    pyplot.close(figure)
    print(f"plot     {output_dir / 'figure.png'}")


def write_settings(options: argparse.Namespace) -> None:
    """The encoder and the image processor of the recipe, which all methods use."""
    from hf_mae import PretrainRecipe, crop_settings, model_config_of
    from hf_mae.commandline import parse, shipped_recipes

    recipe = parse(PretrainRecipe, ["--recipe", options.recipe], "compare_contrastive", recipes=shipped_recipes())
    config = model_config_of(recipe, 3)
    crop = crop_settings(config.image_height_width, recipe.eval_crop_pct)
    processor = {"num_channels": 3, **crop, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    settings = {"config": config.to_dict(), "processor": processor}
    (options.output_dir / "settings.json").write_text(json.dumps(settings))


if __name__ == "__main__":
    if sys.argv[1:2] == ["train"]:
        method, recipe, batch, steps, dataset, output_dir = sys.argv[2:]
        train_contrastive(method, Path(recipe), int(batch), int(steps), dataset, Path(output_dir))
    else:
        main()
