"""What missing position tables cost: transformers' ViTMAEForPreTraining, the same with filled tables, and our model.

    python scripts/studies/compare_vit_mae.py --dataset DATA --total_steps 600 --seeds 3

`ViTMAEForPreTraining(config)` leaves its position tables at zero; only published weights come with tables. All three
models see the same images, crops and masks in the same order, with the same optimizer and schedule. Every
`--every` steps kNN (20 neighbours, cosine) and logistic regression, both scikit-learn's, measure the mean of the
patch tokens of unmasked images. Finished cells are kept, so the command can be repeated.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from hf_mae import (
    ImageSpec,
    MAEConfig,
    MAEForPreTraining,
    Rows,
    StreamPlan,
    TrainingStream,
    adamw,
    decode_image,
    each_batch,
    lr_at,
    make_loader,
    open_source,
    to_layout,
)

# cifar10_vit_tiny: encoder 6 x 192, decoder 2 x 96, patches of 4 pixels
WIDTHS: dict[str, Any] = {
    "image_size": 32, "patch_size": 4, "hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 3,
    "intermediate_size": 768, "decoder_hidden_size": 96, "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 3, "decoder_intermediate_size": 384, "mask_ratio": 0.75, "norm_pix_loss": True,
}  # fmt: skip
BLR, WARM_UP = 1e-3, 0.1
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FIGURES = {"knn": "kNN, k = 20", "linear": "linear probe"}


def as_built() -> nn.Module:
    return ViTMAEForPreTraining(ViTMAEConfig(**WIDTHS))


def tables_filled() -> nn.Module:
    """The same with the sine-cosine tables of the paper's code."""
    model = as_built()
    ours = to_layout(MAEForPreTraining(MAEConfig(**WIDTHS)).state_dict(), "transformers")
    tables = {name: value for name, value in ours.items() if "position_embeddings" in name or "pos_embed" in name}
    assert len(tables) == 2, tables.keys()
    model.load_state_dict(tables, strict=False)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "transformers' ViTMAE, as built": as_built,
    "transformers' ViTMAE, tables filled": tables_filled,
    "hf_mae": lambda: MAEForPreTraining(MAEConfig(**WIDTHS)),
}


def normalized(images: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) uint8 -> pixel_values."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (images / 255 - mean) / std


@torch.no_grad()
def features(model: nn.Module, images: torch.Tensor) -> np.ndarray:
    """(B, D) mean of the patch tokens; nothing is masked."""
    model.eval()
    config: Any = model.config
    parts = []
    for part in normalized(images).split(250):
        if isinstance(model, MAEForPreTraining):
            tokens = model.mae(part).last_hidden_state
        else:
            config.mask_ratio = 0.0
            in_order = torch.arange(64.0).expand(len(part), -1)
            tokens = model.vit(part, noise=in_order).last_hidden_state  # type: ignore[operator]
            config.mask_ratio = WIDTHS["mask_ratio"]
        parts.append(tokens[:, 1:].mean(dim=1))
    model.train()
    return torch.cat(parts).numpy()


def labelled(dataset: str, split: str, most: int) -> tuple[torch.Tensor, np.ndarray]:
    """Images (n, 3, H, W) uint8, evenly spaced in the split, and their labels."""
    rows = Rows(open_source(dataset, split=split), max_samples=most)
    found = list(rows.read(rows.index))
    images = np.stack([np.asarray(decode_image(row.image, 3)) for row in found]).transpose(0, 3, 1, 2)
    return torch.from_numpy(images), np.array([row.label for row in found])


def accuracies(model: nn.Module, train: tuple[torch.Tensor, np.ndarray], test: tuple[torch.Tensor, np.ndarray]):
    """Top-1 accuracy of kNN and of the linear classifier, in percent."""
    known, asked = features(model, train[0]), features(model, test[0])
    classifiers = {
        "knn": KNeighborsClassifier(20, metric="cosine"),
        "linear": make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300)),
    }
    return {name: 100 * float(c.fit(known, train[1]).score(asked, test[1])) for name, c in classifiers.items()}


def train(name: str, seed: int, options: argparse.Namespace) -> list[dict[str, float]]:
    """Pretrain one model from one seed; its figures at step 0 and every `options.every` steps."""
    torch.manual_seed(seed)
    model = MODELS[name]()
    rows = Rows(open_source(options.dataset, split="train"))
    plan = StreamPlan.choose(options.batch, 1, options.workers, len(rows), True)
    spec = ImageSpec((32, 32), 3, "uint8", 64)
    stream = TrainingStream(rows, plan, spec, seed, [0] * plan.num_streams, 0, options.total_steps)
    tables = labelled(options.dataset, "train", 2000), labelled(options.dataset, "validation", 2000)
    optimizer = adamw(model, (0.9, 0.95), 0.05)
    events = [{"step": 0, **accuracies(model, *tables)}]
    started = time.perf_counter()
    for step, batch in enumerate(each_batch(make_loader(stream, options.workers))):
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, BLR * options.batch / 256, WARM_UP * options.total_steps, options.total_steps)
        loss = model(normalized(batch.images), noise=batch.noise).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % options.every == 0:
            events.append({"step": step + 1, "loss": loss.item(), **accuracies(model, *tables)})
            print(f"{name}, seed {seed}, {time.perf_counter() - started:.0f} s: {events[-1]}", flush=True)
    return events


def cell(name: str, seed: int, options: argparse.Namespace) -> list[dict[str, float]]:
    """The figures of a run, from its file if it is done."""
    label = "".join(letter if letter.isalnum() else "_" for letter in name)
    file = options.output_dir / f"{label}-{seed}.json"
    if not file.exists():
        file.write_text(json.dumps(train(name, seed, options), indent=1))
    return json.loads(file.read_text())


def write_table(runs: dict[str, list[list[dict[str, float]]]], output_dir: Path) -> None:
    """`table.md`: mean and range over the seeds at the last step; also printed."""
    lines = ["| model | " + " | ".join(f"{title}, %" for title in FIGURES.values()) + " |", "|---|---|---|"]
    for name, seeds in runs.items():
        last = {figure: [events[-1][figure] for events in seeds] for figure in FIGURES}
        cells = [f"{mean(values):.1f} ({min(values):.1f} to {max(values):.1f})" for values in last.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    text = "\n".join([*lines, ""])
    (output_dir / "table.md").write_text(text)
    print(text)


def plot(runs: dict[str, list[list[dict[str, float]]]], output_dir: Path) -> None:
    """`figure.png`: both accuracies against steps; lines are means, bands the range over the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for axis, (key, title) in zip(axes, FIGURES.items(), strict=True):
        for name, seeds in runs.items():
            steps = [event["step"] for event in seeds[0]]
            values = np.array([[event[key] for event in events] for events in seeds])
            (line,) = axis.plot(steps, values.mean(axis=0), marker="o", label=name)
            axis.fill_between(steps, values.min(axis=0), values.max(axis=0), alpha=0.2, color=line.get_color())
        axis.set(title=title, xlabel="steps", ylabel="top-1 accuracy, %")
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(runs))
    figure.savefig(output_dir / "figure.png", dpi=150)
    pyplot.close(figure)
    print(f"plot     {output_dir / 'figure.png'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="labelled images of 32 x 32 pixels, such as CIFAR-10")
    parser.add_argument("--total_steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=64, help="images per step")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, from 0")
    parser.add_argument("--every", type=int, default=150, help="steps between two measurements")
    parser.add_argument("--workers", type=int, default=1, help="loader processes")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/compare_vit_mae"))
    options = parser.parse_args()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    runs: dict[str, list[list[dict[str, float]]]] = {name: [] for name in MODELS}
    for seed in range(options.seeds):
        for name, seeds in runs.items():
            seeds.append(cell(name, seed, options))
    write_table(runs, options.output_dir)
    plot(runs, options.output_dir)


if __name__ == "__main__":
    main()
