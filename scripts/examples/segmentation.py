"""Semantic segmentation by transformers' UperNet on a pretrained MAE encoder: a worked example, and ADE20K's numbers.

    python scripts/examples/segmentation.py                              coloured shapes, from random weights
    python scripts/examples/segmentation.py --model outputs/mine         the same, pretrained against random weights
    python scripts/examples/segmentation.py --recipe ade20k_base --model outputs/base --data ADEChallengeData2016

The first two draw their images: disks, squares and triangles of any colour on noise, so that only the outline shows the
class. Training takes about a minute on one CPU core. The third has not been run at full size. `--data` is a folder as
ADE20K is distributed, with images/{training,validation}/NAME.jpg and annotations/{training,validation}/NAME.png of
class numbers, 0 = not labelled.

For ADE20K the paper (arXiv:2111.06377, Sec. 5 and A.4: UperNet by BEiT's code, 100 epochs, batches of 16, the learning
rate searched) doesn't state learning rate, layer decay or drop path. `ade20k_base` takes them from mmsegmentation's
configs/mae (48.1 mIoU there; 48.1 in the paper's Table 5, 53.6 for the large model). `ade20k_large` takes drop path,
blocks and width from public configurations, but its learning rate and layer decay from the base model.
Both references add relative position biases in fine-tuning, dropout of 0.1 in the head and colour distortion, and
evaluate in sliding windows of 512 x 512; this script has none of these.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import nn
from transformers import UperNetConfig, UperNetForSemanticSegmentation

from hf_mae import MAEBackbone, MAEConfig, MAEImageProcessor, layer_decay_groups, parameter_groups

IGNORED = 255  # in a label map
Pair = tuple[Image.Image, np.ndarray]  # an image, and a class for each of its pixels (H, W) uint8


@dataclass
class Recipe:
    """The numbers of a run.

    Args:
        blocks: blocks whose outputs feed the four levels; the last one alone gives ViTDet's simple pyramid.
        width: width of UperNet's head.
        scale: images are resized by a random factor in this range before a crop is taken.
    """

    image_size: int | None
    blocks: list[int]
    width: int
    steps: int
    warmup_steps: int
    batch_size: int
    lr: float
    layer_decay: float
    drop_path_rate: float
    classes: int
    scale: tuple[float, float]
    weight_decay: float = 0.05


RECIPES = {
    "shapes": Recipe(None, [-1], 32, 400, 20, 16, 1e-3, 0.75, 0.0, 4, (1.0, 1.0)),
    "ade20k_base": Recipe(512, [4, 6, 8, 12], 768, 160_000, 1500, 16, 1e-4, 0.65, 0.1, 150, (0.5, 2.0)),
    "ade20k_large": Recipe(512, [8, 12, 16, 24], 1024, 160_000, 1500, 16, 1e-4, 0.65, 0.2, 150, (0.5, 2.0)),
}
TINY = {
    "image_size": 64, "patch_size": 8, "hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 3,
    "intermediate_size": 384,
}  # fmt: skip


# ---------------------------------------------------------------------------------------------- data


def draw_shapes(seed: int | np.integer, size: int) -> Pair:
    """One or two shapes on noise: 1 = disk, 2 = square, 3 = triangle, 0 = background."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(80, 176, (size // 4, size // 4, 3), np.uint8)).resize((size, size))
    labels = Image.new("L", (size, size))
    for _ in range(rng.integers(1, 3)):
        shape, radius = int(rng.integers(1, 4)), size * rng.uniform(0.15, 0.3)
        x, y = rng.uniform(radius, size - radius, 2)
        color = tuple(map(int, rng.integers(0, 256, 3)))
        corners = (x - radius, y - radius, x + radius, y + radius)
        for canvas, fill in ((ImageDraw.Draw(image), color), (ImageDraw.Draw(labels), shape)):
            if shape == 1:
                canvas.ellipse(corners, fill=fill)
            elif shape == 2:
                canvas.rectangle(corners, fill=fill)
            else:
                canvas.polygon([(x, y - radius), (x + radius, y + radius), (x - radius, y + radius)], fill=fill)
    return image, np.array(labels)


def read_pair(image: Path) -> Pair:
    """An image of ADE20K and its classes: there 1 to 150 and 0 = not labelled, here 0 to 149 and 255."""
    labels = Path(str(image).replace("images", "annotations")).with_suffix(".png")
    upright = ImageOps.exif_transpose(Image.open(image))  # the label map is drawn for the upright photograph
    return upright.convert("RGB"), np.array(Image.open(labels)) - np.uint8(1)


def training_pairs(data: Path | None, size: int, seed: int) -> Iterator[tuple[Pair, np.random.Generator]]:
    """Endless pairs from the folder, or of newly drawn shapes, each with random numbers for its crop."""
    rng = np.random.default_rng(seed)
    files = sorted(data.glob("images/training/*")) if data else []
    while True:
        # The held-out shapes have the seeds below 100.
        yield (read_pair(files[rng.integers(len(files))]) if data else draw_shapes(rng.integers(100, 2**40), size)), rng


def held_out_pairs(data: Path | None, size: int) -> Iterator[Pair]:
    """The folder's validation images, or 100 drawings."""
    return (
        map(read_pair, sorted(data.glob("images/validation/*"))) if data else (draw_shapes(i, size) for i in range(100))
    )


def random_crop(pair: Pair, rng: np.random.Generator, size: int, scale: tuple[float, float]) -> Pair:
    """A square of a resized image, or of its mirror image; pixels outside the image are black and ignored."""
    image, labels = pair
    factor = rng.uniform(*scale) * size / min(image.size)
    width, height = (max(1, round(side * factor)) for side in image.size)
    top, left = (int(rng.integers(0, max(side - size, 0) + 1)) for side in (height, width))
    box = (left, top, left + size, top + size)
    cut = Image.new("L", (size, size), IGNORED)
    cut.paste(Image.fromarray(labels).resize((width, height), Image.Resampling.NEAREST), (-left, -top))
    image = image.resize((width, height), Image.Resampling.BILINEAR).crop(box)
    step = int(rng.choice([-1, 1]))
    return Image.fromarray(np.ascontiguousarray(np.array(image)[:, ::step])), np.array(cut)[:, ::step].copy()


def to_tensors(pairs: list[Pair], mean: list[float], std: list[float], channels: int) -> tuple[torch.Tensor, ...]:
    """(B, C, H, W) normalised pixels and (B, H, W) classes."""
    mode = {1: "L", 3: "RGB"}[channels]
    images = [np.array(image.convert(mode)).reshape(image.height, image.width, channels) for image, _ in pairs]
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255
    labels = torch.from_numpy(np.stack([labels for _, labels in pairs])).long()
    return (pixels - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1), labels


# ---------------------------------------------------------------------------------------------- model


def build(recipe: Recipe, backbone: MAEBackbone) -> UperNetForSemanticSegmentation:
    """UperNet with the weights of a backbone; its head and the pyramid are new."""
    config = UperNetConfig(
        backbone_config=backbone.config,
        hidden_size=recipe.width,
        auxiliary_in_channels=backbone.channels[0],
        auxiliary_channels=min(recipe.width, 256),
        num_labels=recipe.classes,  # pyright: ignore[reportCallIssue] (of the base class)
    )
    model = UperNetForSemanticSegmentation(config)
    model.backbone.load_state_dict(backbone.state_dict())
    return model


def optimizer_groups(model: UperNetForSemanticSegmentation, recipe: Recipe) -> list[dict]:
    """Layer-wise learning rates in the encoder; pyramid and heads learn at the full rate."""
    heads = nn.ModuleList([model.decode_head, model.auxiliary_head])  # pyright: ignore[reportArgumentType]
    groups = layer_decay_groups(model.backbone, recipe.lr, recipe.layer_decay, recipe.weight_decay)
    return groups + [{**group, "lr": recipe.lr} for group in parameter_groups(heads, recipe.weight_decay)]


def rate(step: int, recipe: Recipe) -> float:
    """Factor of every learning rate: linear warm-up, then linear decay to 0 (mmsegmentation's power 1)."""
    return min((step + 1) / recipe.warmup_steps, 1 - step / recipe.steps)


def train(model: UperNetForSemanticSegmentation, batches: Iterator[tuple[torch.Tensor, ...]], recipe: Recipe) -> None:
    """All steps of a run."""
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(optimizer_groups(model, recipe))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, recipe))
    model.train()
    for step, (pixel_values, labels) in zip(range(1, recipe.steps + 1), batches, strict=False):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(pixel_values=pixel_values.to(device), labels=labels.to(device)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % max(1, recipe.steps // 4) == 0:
            print(f"  step {step:,}: loss {loss.item():.3f}", flush=True)


# ---------------------------------------------------------------------------------------------- evaluation


def mean_iou(confusion: torch.Tensor) -> float:
    """Mean over classes of intersection / union, in percent, of a table (true classes, predicted classes) of pixels.

    A class that is neither present nor predicted has no union, and is left out.
    """
    intersection = confusion.diagonal().double()
    union = confusion.sum(0) + confusion.sum(1) - confusion.diagonal()
    return 100 * (intersection / union)[union > 0].mean().item()


@torch.no_grad()
def evaluate(
    model: UperNetForSemanticSegmentation, pairs: Iterator[Pair], prepare: Callable, size: int, patch: int, classes: int
) -> tuple[float, list[tuple[Pair, np.ndarray]]]:
    """mIoU on whole images, their shorter side resized to `size`, at the labels' resolution, and six predictions."""
    model.eval()
    device = next(model.parameters()).device
    confusion, shown = torch.zeros(classes, classes, dtype=torch.long), []
    for image, labels in pairs:
        width, height = (round(side * size / min(image.size) / patch) * patch for side in image.size)
        pixel_values, target = prepare([(image.resize((width, height)), labels)])
        logits = model(pixel_values=pixel_values.to(device)).logits.float().cpu()
        predicted = F.interpolate(logits, labels.shape, mode="bilinear").argmax(1)
        known = target != IGNORED
        pairs_of_classes = target[known] * classes + predicted[known]
        confusion += pairs_of_classes.bincount(minlength=classes**2).view(classes, classes)
        if len(shown) < 6:
            shown.append(((image, labels), predicted[0].numpy()))
    return mean_iou(confusion), shown


def save_picture(rows: list[list[Image.Image]], path: Path, side: int = 128) -> None:
    """Save rows of pictures, one below the other."""
    sheet = Image.new("RGB", (len(rows[0]) * (side + 4), len(rows) * (side + 4)), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            picture = picture.convert("RGB").resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(picture, (x * (side + 4), y * (side + 4)))
    sheet.save(path)


def colors(labels: np.ndarray) -> Image.Image:
    """A label map as a picture."""
    palette = np.random.default_rng(3).integers(60, 256, (256, 3), np.uint8)
    palette[0], palette[IGNORED] = (30, 30, 30), (0, 0, 0)
    return Image.fromarray(palette[labels])


# ---------------------------------------------------------------------------------------------- the run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=list(RECIPES), default="shapes")
    parser.add_argument("--model", help="folder or Hub id of a pretrained model; a tiny encoder when omitted")
    parser.add_argument("--data", type=Path, help="folder in ADE20K's layout; shapes are drawn when omitted")
    parser.add_argument("--steps", type=int, help="steps, instead of the recipe's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, default=Path("outputs/segmentation.png"))
    options = parser.parse_args()
    recipe = RECIPES[options.recipe]
    recipe.steps = options.steps or recipe.steps
    dense = {"out_indices": recipe.blocks, "pyramid_scales": [4, 2, 1, 0.5], "drop_path_rate": recipe.drop_path_rate}
    if options.model:
        processor = MAEImageProcessor.from_pretrained(options.model)
        mean, std = processor.image_mean, processor.image_std
        side = max(MAEConfig.from_pretrained(options.model).image_height_width)
        dense["image_size"] = recipe.image_size or side * math.ceil(32 / side)  # smaller shapes look the same
        config = MAEConfig.from_pretrained(options.model, **dense)
    else:
        config, mean, std = MAEConfig(**{**TINY, **dense}), [0.5] * 3, [0.25] * 3
    size, patch = config.image_height_width[0], config.patch_height_width[0]

    def prepare(pairs: list[Pair]) -> tuple[torch.Tensor, ...]:
        return to_tensors(pairs, mean, std, config.num_channels)

    def batches() -> Iterator[tuple[torch.Tensor, ...]]:
        pairs = training_pairs(options.data, size, options.seed)
        while True:
            yield prepare([random_crop(*next(pairs), size, recipe.scale) for _ in range(recipe.batch_size)])

    def score(model: UperNetForSemanticSegmentation) -> tuple[float, list[tuple[Pair, np.ndarray]]]:
        return evaluate(model, held_out_pairs(options.data, size), prepare, size, patch, recipe.classes)

    rows: list[list[Image.Image]] = []
    for start in ("random", "pretrained") if options.model else ("random",):
        torch.manual_seed(options.seed)
        backbone = MAEBackbone(config) if start == "random" else MAEBackbone.from_pretrained(options.model, **dense)
        model = build(recipe, backbone)
        model.to("cuda" if torch.cuda.is_available() else "cpu")  # pyright: ignore[reportArgumentType]
        before, _ = score(model)
        train(model, batches(), recipe)
        after, shown = score(model)
        print(f"{start} weights: mIoU {before:.1f} % before, {after:.1f} % after {recipe.steps:,} steps", flush=True)
        if not rows:
            rows = [[image for (image, _), _ in shown], [colors(labels) for (_, labels), _ in shown]]
        rows.append([colors(predicted) for _, predicted in shown])
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    save_picture(rows, options.picture)
    print(f"picture  {options.picture}: images, classes, predictions (from random, then from pretrained weights)")


if __name__ == "__main__":
    main()
