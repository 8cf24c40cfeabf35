"""Broken, hostile and odd files through the real loader: each is read, or skipped and named; no process dies."""

import io
import multiprocessing
import os
import random
import struct
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bad_images import HEIGHT, WIDTH, Case, bad_cases, encoded, good_cases, noise, npy, tiff
from memory_source import MemorySource
from PIL import Image, ImageOps, features
from runs import environment

pytest.importorskip("datasets")
import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from hf_mae.data import decode as decode_module
from hf_mae.data.decode import BadImage, decode_image
from hf_mae.data.loader import EvaluationSet, TrainingStream, each_batch, make_loader
from hf_mae.data.order import Rows, StreamPlan
from hf_mae.data.sources import open_source
from hf_mae.data.transform import ImageSpec
from hf_mae.errors import DataError
from hf_mae.image_processing_mae import MAEImageProcessor
from hf_mae.image_processing_pil_mae import MAEImageProcessorPil

SPEC = ImageSpec(size=(HEIGHT, WIDTH), num_channels=3, dtype="uint8", num_patches=4, eval_resize=(HEIGHT, WIDTH))
PATIENCE = 30  # seconds for one image

pytestmark = [
    # What Pillow says of broken files on the way to its exception.
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning"),
]


@pytest.fixture(scope="module")
def corpus() -> list[Case]:
    """All files, good and bad, and as many plain ones, well mixed."""
    plain = [Case(f"plain{i}.png", encoded(Image.new("RGB", (WIDTH, HEIGHT), (i, 255 - i, 7)))) for i in range(60)]
    cases = [*good_cases(), *bad_cases(), *plain]
    random.Random(0).shuffle(cases)
    assert len({case.name for case in cases}) == len(cases)
    return cases


def write_folder(cases: list[Case], folder: Path) -> dict[str, Case]:
    folder.mkdir()
    for case in cases:
        (folder / case.name).write_bytes(case.data)
    return {case.name: case for case in cases}


def write_rows(rows: list, path: Path) -> None:
    schema = datasets.Features({"image": datasets.Image()}).arrow_schema
    pq.write_table(pa.table({"image": pa.array(rows, schema.field(0).type)}, schema), path, row_group_size=13)


def write_parquet(cases: list[Case], folder: Path) -> dict[str, Case]:
    folder.mkdir()
    write_rows([{"bytes": case.data, "path": case.name} for case in cases], folder / "a.parquet")
    return {f"a.parquet#{row}": case for row, case in enumerate(cases)}


def write_tar(cases: list[Case], folder: Path) -> dict[str, Case]:
    folder.mkdir()
    with tarfile.open(folder / "a.tar", "w") as tar:
        for row, case in enumerate(cases):
            info = tarfile.TarInfo(f"{row:03d}{Path(case.name).suffix}")
            info.size = len(case.data)
            tar.addfile(info, io.BytesIO(case.data))
    return {f"a.tar#{row}": case for row, case in enumerate(cases)}


Outcome = tuple[str, str | None]  # key, and reason or None


def trained_on(rows: Rows, workers: int, steps: int) -> list[list[Outcome]]:
    """What became of each row in the first two epochs of training, in the order of keys."""
    # One image a batch: it was read after the bad ones of its batch, so that the order of all of them is known.
    plan = StreamPlan(total_batch_size=1, chunks=1, groups=2)
    loader = make_loader(TrainingStream(rows, plan, SPEC, 0, [0, 0], 0, steps), workers)
    if workers:
        loader.timeout = 4 * PATIENCE
    batches = list(each_batch(loader))
    epochs: list[list[Outcome]] = [[], []]
    for number in range(2):
        size = (number + 1) * len(rows) // 2 - number * len(rows) // 2
        read = [outcome for batch in batches[number::2] for outcome in [*batch.bad, (batch.keys[0], None)]]
        assert len(read) >= 2 * size, "not enough steps"
        for epoch, outcomes in enumerate(epochs):
            outcomes += read[epoch * size : (epoch + 1) * size]
    return [sorted(outcomes, key=lambda outcome: outcome[0]) for outcomes in epochs]


def outcome_of(data: bytes | np.ndarray | BadImage) -> str | None:
    try:
        decode_image(data, 3)
    except BadImage as error:
        return error.reason


def known_list(cases: dict[str, Case]) -> list[Outcome]:
    return [(key, cases[key].reason) for key in sorted(cases)]


# ------------------------------------------------------------------------------------------ the corpus


def test_every_good_file_shows_what_it_should(corpus):
    for case in corpus:
        if case.reason is not None:
            continue
        started = time.process_time()
        pixels = np.asarray(decode_image(case.data, 3)).astype(int)
        assert time.process_time() - started < 3, f"{case.name} takes too long"
        if case.pixels is not None:
            assert pixels.shape == case.pixels.shape, case.name
            assert np.abs(pixels - case.pixels).max() <= case.tolerance, case.name


def test_every_bad_file_gets_its_reason(corpus):
    bad = [case for case in corpus if case.reason is not None]
    assert {case.name: outcome_of(case.data) for case in bad} == {case.name: case.reason for case in bad}
    assert len(bad) > 50


@pytest.mark.parametrize("backend", [MAEImageProcessor, MAEImageProcessorPil], ids=["torchvision", "pil"])
def test_both_processors_see_the_pixels_that_training_sees(backend):
    processor = backend(do_resize=False, do_center_crop=False, do_normalize=False)
    for case in good_cases():
        if case.name == "rgb16_deflated.tif":
            continue  # Pillow can't read it
        is_array = case.name.endswith(".npy")
        # Upright, as transformers' pipelines pass images on.
        image = (
            np.load(io.BytesIO(case.data)) if is_array else ImageOps.exif_transpose(Image.open(io.BytesIO(case.data)))
        )
        given = np.rint(processor(image, return_tensors="np")["pixel_values"][0] * 255)
        assert np.array_equal(given, np.asarray(decode_image(case.data, 3)).transpose(2, 0, 1)), case.name


WAYS = {
    "folder": (write_folder, {}),
    "parquet in place": (write_parquet, {"streaming": True}),
    "mapped parquet": (write_parquet, {"streaming": False}),
    "tar": (write_tar, {}),
}


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("way", WAYS)
def test_the_report_is_the_known_list_and_every_clean_id_is_seen_once_an_epoch(
    tmp_path, corpus, monkeypatch, way, workers
):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write, options = WAYS[way]
    cases = write(corpus, tmp_path / "data")
    rows = Rows(open_source(str(tmp_path / "data"), **options))
    if way == "mapped parquet":  # whose rows are those of one table
        cases = {key.replace("a.parquet", "train"): case for key, case in cases.items()}
    assert trained_on(rows, workers, steps=240) == [known_list(cases)] * 2


@pytest.mark.parametrize("batch_size", [1, 7])
def test_an_evaluation_shows_every_good_file_and_names_every_bad_one_once(tmp_path, corpus, batch_size):
    cases = write_folder(corpus, tmp_path / "data")
    batches = list(EvaluationSet(Rows(open_source(str(tmp_path / "data"))), SPEC, batch_size))
    assert len(batches) == -(-len(corpus) // batch_size)
    outcomes = [outcome for batch in batches for outcome in [*batch.bad, *((key, None) for key in batch.keys)]]
    assert sorted(outcomes, key=lambda outcome: outcome[0]) == known_list(cases)
    for batch in batches:
        assert batch.images.shape == (len(batch.keys), 3, HEIGHT, WIDTH)
        assert batch.noise.shape == (len(batch.keys), 4)
        for key, pixels in zip(batch.keys, batch.images.permute(0, 2, 3, 1).int().numpy(), strict=True):
            case = cases[key]
            if case.pixels is not None and case.pixels.shape == pixels.shape:
                assert np.abs(pixels - case.pixels).max() <= case.tolerance, key


MEASURED = """
import resource, sys
from hf_mae.data.loader import EvaluationSet
from hf_mae.data.order import Rows
from hf_mae.data.sources import open_source
from hf_mae.data.transform import ImageSpec
rows, view = Rows(open_source(sys.argv[1])), ImageSpec((16, 24), 3, "uint8", 4, eval_resize=(16, 24))
next(iter(EvaluationSet(Rows(rows.source, max_samples=1), view, 1)))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
bad = sum(len(batch.bad) for batch in EvaluationSet(rows, view, 1))
print(bad, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.slow
def test_a_process_that_reads_every_hostile_file_grows_by_few_megabytes(tmp_path, corpus):
    write_folder(corpus, tmp_path / "data")
    command = [sys.executable, "-W", "ignore", "-c", MEASURED, str(tmp_path / "data")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=120)
    assert done.returncode == 0, done.stderr
    bad, megabytes = map(int, done.stdout.split())
    assert bad == sum(case.reason is not None for case in corpus)
    assert megabytes < 100  # the pixels of one of 225 megapixels are 675 MB


# ------------------------------------------------------------------------------------------ shards


def damage_row_group(path: Path, group: int) -> None:
    """Overwrite the pages of its first column."""
    column = pq.read_metadata(path).row_group(group).column(0)
    with path.open("r+b") as file:
        file.seek(column.data_page_offset)
        file.write(b"\xff" * (column.total_compressed_size // 2))


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_rows_that_a_shard_can_not_give_are_named_and_the_others_seen(tmp_path, workers):
    cases = [Case(f"{i}.png", encoded(Image.new("RGB", (WIDTH, HEIGHT), (i, 0, 0)))) for i in range(60)]
    secret = tmp_path / "secret.png"
    secret.write_bytes(cases[0].data)
    known = write_parquet(cases, tmp_path / "parquet")
    rows = [{"bytes": None, "path": str(secret)}, {"bytes": None, "path": None}, None]
    write_rows(rows, tmp_path / "parquet" / "b.parquet")
    damage_row_group(tmp_path / "parquet" / "a.parquet", 2)
    expected = {key: "CorruptRowGroup" if 26 <= row < 39 else None for row, key in enumerate(known)}
    expected |= {f"b.parquet#{row}": "NoBytes" for row in range(3)}
    source = open_source(str(tmp_path / "parquet"), streaming=True)
    assert trained_on(Rows(source), workers, 130) == [sorted(expected.items())] * 2

    known = write_tar(cases, tmp_path / "tar")
    with tarfile.open(tmp_path / "tar" / "a.tar") as tar:
        cut = tar.getmembers()[40].offset_data + 5
    os.truncate(tmp_path / "tar" / "a.tar", cut)
    expected = dict.fromkeys(list(known)[:40], None) | {"a.tar#40": "TruncatedTar"}
    assert trained_on(Rows(open_source(str(tmp_path / "tar"))), workers, 130) == [sorted(expected.items())] * 2


# ------------------------------------------------------------------------------------------ mutated files


def originals() -> dict[str, bytes]:
    """A small picture in each format: (name, file)."""
    picture = Image.fromarray(noise(40, 30)).resize((80, 60), Image.Resampling.BICUBIC)
    deep = np.asarray(picture).astype(np.uint16) * 257
    files = {
        "baseline JPEG": encoded(picture, "JPEG"),
        "progressive JPEG": encoded(picture, "JPEG", progressive=True),
        "PNG": encoded(picture),
        "palette PNG": encoded(picture.quantize(16), transparency=3),
        "WEBP": encoded(picture, "WEBP"),
        "lossless WEBP": encoded(picture, "WEBP", lossless=True),
        "GIF": encoded(picture, "GIF"),
        "BMP": encoded(picture, "BMP"),
        "LZW TIFF": encoded(picture, "TIFF", compression="tiff_lzw"),
        "16-bit TIFF": tiff(deep, compression="zlib", predictor=True, photometric="rgb", rowsperstrip=16),
        "PPM": encoded(picture, "PPM"),
        "JPEG2000": encoded(picture, "JPEG2000"),
        "NPY": npy(deep),
    }
    if features.check("avif"):
        files["AVIF"] = encoded(picture, "AVIF")
    return files


def mutated(data: bytes, rng: random.Random) -> bytes:
    """A file after one to three accidents of the kinds that disks, networks and enemies bring about."""
    content = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(content))
        match rng.choice(["bits", "bytes", "cut", "insert", "remove", "number"]):
            case "bits":
                for _ in range(rng.choice([1, 1, 8])):
                    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            case "bytes":
                content[at : at + rng.choice([1, 4, 64])] = rng.randbytes(rng.choice([1, 4, 64]))
            case "cut":
                del content[max(at, 1) :]
            case "insert":
                content[at:at] = rng.choice([bytes(16), b"\xff" * 16, rng.randbytes(40)])
            case "remove":
                del content[at : at + rng.choice([1, 2, 100])]
            case "number":  # in the header, where sizes and offsets are
                number = rng.choice([0, 1, 255, 65_535, 2**24, 2**31 - 1, 2**32 - 1])
                field = struct.pack(rng.choice("<>") + "I", number)
                at = rng.randrange(min(len(content), 200))
                size = rng.choice([1, 2, 4])
                content[at : at + size] = field[:size]
        if not content:
            break
    return bytes(content)


def outcomes_in_another_process(cases: list[Case], outcome_of: Callable[[bytes], Any]) -> list[Any]:
    """`outcome_of` each; a file that ends the process, or takes more than `PATIENCE` seconds, is named."""
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def send_outcomes():
        for case in cases:
            sender.send(outcome_of(case.data))

    process = multiprocessing.get_context("fork").Process(target=send_outcomes)
    process.start()
    sender.close()
    outcomes = []
    try:
        for case in cases:
            assert receiver.poll(PATIENCE), f"{case.name} takes more than {PATIENCE} s"
            outcomes.append(receiver.recv())
    except EOFError:
        pytest.fail(f"{cases[len(outcomes)].name} ends the process")
    finally:
        process.kill()
        process.join()
    return outcomes


@pytest.mark.parametrize(("each", "workers"), [(8, 0), pytest.param(320, 2, marks=pytest.mark.slow)])
def test_mutated_files_end_no_process_and_every_clean_id_is_seen_once_an_epoch(each, workers):
    files = originals()
    assert len(files) >= 13
    rng = random.Random(each)
    cases = [Case(f"{name} {i}", mutated(data, rng)) for name, data in files.items() for i in range(each)]
    cases += [Case(f"clean {name}", data) for name, data in files.items()] * max(1, each // 10)
    rng.shuffle(cases)
    for case, reason in zip(cases, outcomes_in_another_process(cases, outcome_of), strict=True):
        case.reason = reason
        assert reason is None or not case.name.startswith("clean")
    outcomes = Counter(case.reason for case in cases)
    rows = Rows(MemorySource([[case.data for case in cases]]))
    known = {f"shard0#{row}": case for row, case in enumerate(cases)}
    assert trained_on(rows, workers, steps=int(2.2 * outcomes[None]) + 50) == [known_list(known)] * 2
    print(f"{len(cases)} files of {len(files)} formats: {outcomes.most_common()}")
    assert 0.2 * len(cases) < outcomes[None] < 0.8 * len(cases)


@pytest.mark.parametrize("each", [25, pytest.param(600, marks=pytest.mark.slow)])
def test_mutated_jpegs_end_no_process_and_both_decoders_agree_on_them(each, monkeypatch):
    pytest.importorskip("simplejpeg", reason="without simplejpeg, Pillow decodes everything")
    picture = Image.fromarray(noise(40, 30)).resize((160, 120), Image.Resampling.BICUBIC)
    kinds = [
        {}, {"subsampling": 2, "quality": 60}, {"progressive": True}, {"restart_marker_blocks": 3},
        {"comment": b"hello"}, {"keep_rgb": True},
    ]  # fmt: skip
    files = [encoded(picture, "JPEG", **options) for options in kinds]
    files += [encoded(picture.convert(mode), "JPEG") for mode in ("L", "CMYK")]
    rng = random.Random(each)
    cases = [Case(f"{number} {i}", mutated(data, rng)) for number, data in enumerate(files) for i in range(each)]

    def outcome(data: bytes) -> tuple[str, int, bool]:
        """The reason it is bad or none, the pixels' hash, and whether they are the extra's."""
        try:
            image = decode_image(data, 3, min_pixels=64 if len(data) % 2 else 10**9)
        except BadImage as error:
            return error.reason, 0, False
        return "", hash(np.asarray(image).tobytes()), isinstance(image, np.ndarray)

    def both(data: bytes) -> tuple[tuple[str, int, bool], tuple[str, int, bool]]:
        with_extra = outcome(data)
        with monkeypatch.context() as without:
            without.setattr(decode_module, "simplejpeg", None)
            return with_extra, outcome(data)

    outcomes = outcomes_in_another_process(cases, both)
    for case, (fast, slow) in zip(cases, outcomes, strict=True):
        assert fast[:2] == slow[:2], case.name
    found = Counter((fast[0], fast[2]) for fast, _ in outcomes)
    print(f"{len(cases)} files: {found.most_common()}")
    assert found["", True] > 0.05 * len(cases)
    assert found["OSError", False] > 0.2 * len(cases)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parquet", "arrow", "tar"])
def test_shards_with_flipped_bits_end_no_process(tmp_path, kind):
    pictures = [Case(f"{i}.png", encoded(Image.fromarray(noise(20, 10 + i)))) for i in range(24)]
    if kind == "arrow":
        rows = {"image": [{"bytes": case.data, "path": case.name} for case in pictures], "label": ["some word"] * 24}
        features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
        datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "data")
    else:
        {"parquet": write_parquet, "tar": write_tar}[kind](pictures, tmp_path / "data")
    (path,) = (tmp_path / "data").glob(f"*.{kind}")

    def outcome_of_shard(data: bytes) -> str:
        path.write_bytes(data)
        try:
            source = open_source(str(tmp_path / "data"), streaming=None if kind == "arrow" else True)
            rows = [row for shard, start, stop in source.blocks for row in source.read(shard, range(start, stop))]
        except DataError:
            return "refused"
        return "whole" if all(outcome_of(row.image) is None for row in rows) else "with bad rows"

    rng, whole, shards = random.Random(0), path.read_bytes(), []
    for number in range(300):
        data = bytearray(whole)
        for _ in range(rng.choice([1, 1, 20])):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        shards.append(Case(f"{kind} {number}", bytes(data)))
    outcomes = Counter(outcomes_in_another_process(shards, outcome_of_shard))
    print(kind, outcomes)
    assert set(outcomes) == {"whole", "with bad rows", "refused"}
