"""Small data sets of numbered images, in files of every kind, and a check that a source gives all of them."""

import io
import tarfile

import datasets
import fsspec
import numpy as np
from PIL import Image

from hf_mae.data.locate import locate
from hf_mae.keys.data_keys import DataKeys

NAMES = ["cat", "dog", "emu"]


def png(number: int) -> bytes:
    stream = io.BytesIO()
    pixels = np.full((4, 4, 3), number % 256, np.uint8)
    pixels[0, 0] = number // 256
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def image_table(numbers, label: str = "label", image: str = "image") -> datasets.Dataset:
    features = datasets.Features({image: datasets.Image(), label: datasets.ClassLabel(names=NAMES)})
    rows = {image: [{"bytes": png(i), "path": f"{i}.png"} for i in numbers], label: [i % 3 for i in numbers]}
    return datasets.Dataset.from_dict(rows, features=features)


def write_parquet(folder, split="train", numbers=range(50), files=2, group=10):
    """Shards `split-00000-of-0000N.parquet` of numbered images, in row groups of `group` rows."""
    folder.mkdir(parents=True, exist_ok=True)
    table = image_table(numbers)
    for shard in range(files):
        path = folder / f"{split}-{shard:05d}-of-{files:05d}.parquet"
        table.shard(files, shard, contiguous=True).to_parquet(path, batch_size=group)
    return folder


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def samples(numbers, label=lambda i: ("cls", str(i % 3).encode())):
    for i in numbers:
        yield f"some/dir.d/{i:05d}.png", png(i)
        yield f"some/dir.d/{i:05d}.{label(i)[0]}", label(i)[1]


def write_files(root, files: dict[str, bytes]):
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def upload(folder, url="memory://bucket"):
    fsspec.filesystem("memory").put(str(folder), url.removeprefix("memory:/"), recursive=True)
    return url


def splits_of(name) -> list[str]:
    return list(locate(DataKeys(dataset=str(name))).splits)


def read_all(source):
    """Every row once, block by block, after a check that the blocks cover each place once and in order."""
    places = [(shard, row) for shard, start, stop in source.blocks for row in range(start, stop)]
    assert places == [(shard, row) for shard, size in enumerate(source.shard_sizes) for row in range(size)]
    rows = [row for shard, start, stop in source.blocks for row in source.read(shard, range(start, stop))]
    assert [(row.shard, row.row) for row in rows] == places
    assert len({row.key for row in rows}) == len(rows) == len(source)
    return rows


def check_images(source, numbers, labels=True):
    rows = read_all(source)
    assert [row.image for row in rows] == [png(i) for i in numbers]
    assert [row.label for row in rows] == [i % 3 if labels else None for i in numbers]
