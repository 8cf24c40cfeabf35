"""The same few hundred small images in every kind of source that the package reads."""

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CLASSES = ("cat", "dog", "emu")
NUM_IMAGES = 400


def png(number: int) -> bytes:
    """A small picture of random colours, the same whenever the number is the same."""
    pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def write_images(folder: Path) -> None:
    """Image files in class folders."""
    for number in range(NUM_IMAGES):
        path = folder / CLASSES[number % len(CLASSES)] / f"{number:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))


def image_table() -> Any:
    """The same images as a table of `datasets`."""
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    images = [{"bytes": png(number), "path": f"{number:04}.png"} for number in range(NUM_IMAGES)]
    labels = [number % len(CLASSES) for number in range(NUM_IMAGES)]
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)


def write_parquet(folder: Path) -> None:
    """Two shards, in row groups of 40."""
    folder.mkdir()
    for shard in range(2):
        path = folder / f"train-{shard:05}-of-00002.parquet"
        image_table().shard(2, shard, contiguous=True).to_parquet(path, batch_size=40)


def write_tars(folder: Path) -> None:
    """Two webdataset shards."""
    folder.mkdir()
    for shard in range(2):
        with tarfile.open(folder / f"shard-{shard:03}.tar", "w") as tar:
            for number in range(shard * NUM_IMAGES // 2, (shard + 1) * NUM_IMAGES // 2):
                label = str(number % len(CLASSES)).encode()
                for ending, data in (("png", png(number)), ("cls", label)):
                    member = tarfile.TarInfo(f"{number:04}.{ending}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
