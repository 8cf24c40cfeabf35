"""Parquet files that are small on the disk and large in memory, or one large row group, take bounded memory."""

import subprocess
import sys

import numpy as np
import pytest
from runs import environment

pytest.importorskip("datasets")
import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from image_sets import png

from hf_mae.data import parquet
from hf_mae.data.sources import open_source
from hf_mae.errors import DataError

READ = """
import resource, sys
from hf_mae.data.order import EpochOrder, LogicalStream, Rows
from hf_mae.data.parquet import ArrowSource
from hf_mae.data.sources import open_source
streaming = None if sys.argv[2] == "None" else True
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
source = open_source(sys.argv[1], streaming=streaming, image_column="image")
rows = [0, len(source) - 1, len(source) // 2, 1]
images = [row.image for row in source.read(0, rows)]
stream = LogicalStream(EpochOrder(Rows(source), 0), 0, 1)
keys, right = set(), True
for _ in range(min(len(source), int(sys.argv[3]))):
    _, row = stream.next(1)
    keys.add(row.key)
    right &= bytes(row.image[:4]) == b"\\x89PNG" if isinstance(row.image, bytes) else row.image.shape == (64, 64, 3)
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
print(len(source), len(keys), right, [len(image) for image in images], type(source).__name__, grown)
"""


def read(path, cache, streaming, most=10**9) -> list[str]:
    """What a new process reads of a file: rows, different keys, whether right, sizes of four; its class; megabytes."""
    command = [sys.executable, "-W", "ignore", "-c", READ, str(path), str(streaming), str(most)]
    caches = {"HF_HOME": str(cache), "HF_DATASETS_CACHE": str(cache / "datasets")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment() | caches, timeout=300)
    assert done.returncode == 0, done.stderr
    *found, megabytes = done.stdout.strip().rsplit(" ", 2)
    assert int(megabytes) < 450, found
    assert sum(file.stat().st_size for file in cache.rglob("*") if file.is_file()) < 2**20
    return found


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [None, True])
@pytest.mark.parametrize("column", ["struct", "binary", "large_binary"])
def test_a_value_that_a_dictionary_repeats_is_in_memory_once(tmp_path, streaming, column):
    value = b"\x89PNG" + bytes(2 * 2**20)
    table = {
        "struct": pa.array([{"bytes": value, "path": None}] * 20, datasets.Image().pa_type),
        "binary": pa.array([value] * 20),
        "large_binary": pa.array([value] * 20, pa.large_binary()),
    }[column]
    # Taken from a dictionary, because 3 GB would be in memory here otherwise.
    leaf = table.field(0) if column == "struct" else table
    repeated = pa.DictionaryArray.from_arrays(pa.array([0] * 1500, pa.int32()), leaf.slice(0, 1))
    if column == "struct":
        repeated = pa.StructArray.from_arrays([repeated, pa.nulls(1500, pa.string())], ["bytes", "path"])
    schema = pa.schema([("image", repeated.type)])
    pq.write_table(pa.table([repeated], schema), tmp_path / "a.parquet", compression="zstd", store_schema=False)
    assert (tmp_path / "a.parquet").stat().st_size < 2000
    found, kind = read(tmp_path / "a.parquet", tmp_path / "cache", streaming)
    size = len(value)
    assert found == f"1500 1500 True [{size}, {size}, {size}, {size}]"
    assert kind == "ParquetSource"


@pytest.mark.slow
def test_a_row_group_of_small_compressed_pages_is_read_in_parts(tmp_path):
    schema = pa.schema([("image", pa.binary())])
    value = b"\x89PNG" + bytes(20_000)
    with pq.ParquetWriter(tmp_path / "a.parquet", schema, compression="zstd", use_dictionary=False) as writer:
        writer.write_table(pa.table({"image": pa.array([value] * 100_000)}, schema), row_group_size=100_000)
    assert (tmp_path / "a.parquet").stat().st_size < 2 * 2**20
    found, kind = read(tmp_path / "a.parquet", tmp_path / "cache", None, most=15_000)
    assert found == f"100000 15000 True [{len(value)}, {len(value)}, {len(value)}, {len(value)}]"
    assert kind == "ParquetSource"


@pytest.mark.slow
def test_a_row_group_of_nested_lists_is_read_in_parts(tmp_path):
    pixels = [[[[7, 8, 9]] * 64] * 64] * 6000  # 74 million numbers that take few bytes
    schema = pa.schema([("image", pa.list_(pa.list_(pa.list_(pa.uint8()))))])
    flat = pa.array(np.tile(np.array(pixels[0], np.uint8), (6000, 1, 1)).ravel())
    for length in (3, 64, 64):
        flat = pa.ListArray.from_arrays(pa.array(range(0, len(flat) + 1, length), pa.int32()), flat)
    pq.write_table(pa.table([flat], schema), tmp_path / "a.parquet", compression="zstd")
    found, _ = read(tmp_path / "a.parquet", tmp_path / "cache", True, most=3000)
    assert found == "6000 3000 True [64, 64, 64, 64]"


@pytest.mark.parametrize("column", ["image", "bytes"])
def test_a_row_group_read_in_parts_gives_each_row_once_in_any_order(tmp_path, own_caches, monkeypatch, column):
    images = [png(number) for number in range(100)]
    schema = pa.schema([("image", datasets.Image().pa_type if column == "image" else pa.large_binary())])
    rows = [{"bytes": image, "path": None} for image in images] if column == "image" else images
    table = pa.table({"image": pa.array(rows, schema.field(0).type)}, schema)
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=60)
    monkeypatch.setattr(parquet, "BLOCK_BYTES", 700)
    source = open_source(str(tmp_path / "a.parquet"), streaming=True)
    assert len(source.blocks) > 8
    assert [stop for _, _, stop in source.blocks if stop in (60, 100)] == [60, 100]
    for order in (range(100), np.random.default_rng(0).permutation(100).tolist()):
        assert [row.image for row in source.read(0, order)] == [images[row] for row in order]


def test_values_repeated_by_a_dictionary_are_one_object(tmp_path, own_caches):
    table = pa.table({"image": pa.array([png(1), png(2)] * 5), "label": pa.array(["x" * 99, "y"] * 5)})
    pq.write_table(table, tmp_path / "a.parquet")
    rows = open_source(str(tmp_path / "a.parquet"), streaming=True).read(0, range(10))
    assert [(row.image, row.label) for row in rows] == [(png(1), "x" * 99), (png(2), "y")] * 5
    assert len({id(row.image) for row in rows}) == len({id(row.label) for row in rows}) == 2


def test_a_table_that_would_fill_the_disk_is_read_in_place(tmp_path, own_caches, monkeypatch, caplog):
    table = pa.table({"image": pa.array([png(1) + bytes(2000)] * 1000)})
    pq.write_table(table, tmp_path / "a.parquet")
    monkeypatch.setattr("hf_mae.data.sources.LARGE_TABLE", 10**6)
    monkeypatch.setattr(parquet, "BLOCK_BYTES", 10**4)
    source = open_source(str(tmp_path / "a.parquet"))
    assert (type(source).__name__, len(source)) == ("ParquetSource", 1000)
    assert "a table of the 1 files of" in caplog.text
    assert type(open_source(str(tmp_path / "a.parquet"), streaming=False)).__name__ == "ArrowSource"
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="is not a complete parquet file"):
        open_source(str(tmp_path / "a.parquet"))
