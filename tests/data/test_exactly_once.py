"""The samples of a run, in their order: exact, on any grid of ranks and workers, and each once an epoch.

Everything is compared with `written_down`, which deals whole epochs of keys by slicing, as the top of order.py says
it. An image's pixels are all its own number, so that what reaches the model says itself which image it is.
"""

import io
import itertools
import json
import multiprocessing
import subprocess
import sys
import tarfile
import time
from collections import Counter
from contextlib import closing, nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hub_server import HubServer
from memory_source import memory_rows
from PIL import Image
from runs import arguments, environment, events

pytest.importorskip("datasets")
import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from hf_mae.data import loader as loader_module
from hf_mae.data import parquet
from hf_mae.data.decode import decode_image
from hf_mae.data.loader import Batch, TrainingStream, each_batch, make_loader
from hf_mae.data.order import EpochOrder, LogicalStream, Rows, StreamPlan
from hf_mae.data.shards import Source
from hf_mae.data.sources import open_source
from hf_mae.data.transform import ImageSpec

SEED = 3
SPEC = ImageSpec(size=(4, 4), num_channels=1, dtype="uint8", num_patches=4)
PLAN = StreamPlan(16, chunks=4, groups=4)  # 16 streams of 13 or 14 of the images below
IMAGES = 210
GROUP = 5  # rows in a row group
GRIDS = list(itertools.product((1, 2, 4), (0, 1, 2, 4)))  # ranks, workers
KINDS = ["parquet, mapped", "parquet", "tars", "saved", "images", "parquet by URL", "tars by URL", "images by URL"]
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


# ------------------------------------------------------------------------------------------ data


def png(number: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (4, 4), number).save(file, "PNG")
    return file.getvalue()


def write(folder: Path, kind: str, shards: int) -> Path:
    """The images 0 to 209, in so many shards of unequal sizes."""
    folder.mkdir(parents=True)
    edges = (np.linspace(0, 1, shards + 1) ** 1.3 * IMAGES).round().astype(int).tolist()
    for shard, numbers in enumerate(itertools.starmap(range, itertools.pairwise(edges))):
        images = [png(number) for number in numbers]
        if kind == "parquet":
            pq.write_table(pa.table({"image": images}), folder / f"train-{shard:02d}.parquet", row_group_size=GROUP)
        elif kind == "tars":
            with tarfile.open(folder / f"train-{shard:02d}.tar", "w") as tar:
                for number, image in zip(numbers, images, strict=True):
                    member = tarfile.TarInfo(f"{number:03d}.png")
                    member.size = len(image)
                    tar.addfile(member, io.BytesIO(image))
        elif kind == "images":
            for number, image in zip(numbers, images, strict=True):
                (folder / f"{number:03d}.png").write_bytes(image)
    if kind == "saved":
        table = datasets.Dataset.from_dict({"image": [png(number) for number in range(IMAGES)]})
        table.save_to_disk(folder, num_shards=shards)
    return folder


@pytest.fixture
def open_kind(tmp_path, monkeypatch):
    """Opens a new data set of one of KINDS, in so many shards."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    memory = fsspec.filesystem("memory")

    def open_it(kind: str, shards: int) -> Source:
        folder = write(tmp_path / "data", kind.split(",")[0].split()[0], shards)
        if "URL" in kind:
            memory.put(str(folder), "/bucket", recursive=True)
        return open_source("memory://bucket" if "URL" in kind else str(folder), streaming=kind == "parquet" or None)

    yield open_it
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]


# ------------------------------------------------------------------------------------------ the order, slowly


def all_keys(source: Source) -> list[str]:
    """Keys of all rows; of the data above, row i is the image i."""
    return [row.key for shard, size in enumerate(source.shard_sizes) for row in source.read(shard, range(size))]


def epoch_order(source: Source, epoch: int) -> list[str]:
    """Keys of all rows: the blocks in random order, and within each its rows; a local source is one block."""
    keys = all_keys(source)
    sizes = [len(keys)] if source.random_access else [stop - start for _, start, stop in source.blocks]
    blocks = [keys[end - size : end] for size, end in zip(sizes, itertools.accumulate(sizes), strict=True)]
    order = []
    for block in np.random.default_rng([SEED, epoch, 1]).permutation(len(blocks)):
        rows = np.random.default_rng([SEED, epoch, 2, block]).permutation(sizes[block])
        order += [blocks[block][row] for row in rows]
    return order


def written_down(source: Source, plan: StreamPlan, steps: int) -> list[list[str]]:
    """Keys of the global batches of the steps from 0."""
    chunk, length, count = plan.total_batch_size // plan.chunks, len(source), plan.num_streams
    turns = -(-steps // plan.groups)
    orders = [epoch_order(source, epoch) for epoch in range(turns * chunk // (length // count) + 1)]
    parts = [slice(number * length // count, (number + 1) * length // count) for number in range(count)]
    streams = [[key for order in orders for key in order[part]] for part in parts]
    batches = []
    for step in range(steps):
        turn, group = divmod(step, plan.groups)
        chosen = streams[group * plan.chunks : (group + 1) * plan.chunks]
        batches.append([key for stream in chosen for key in stream[turn * chunk : (turn + 1) * chunk]])
    return batches


# ------------------------------------------------------------------------------------------ the order, by a grid


class Steps:
    """Global batches: `keys`, the images' own numbers as `ids`, and the streams' `positions` after each."""

    def __init__(self, batches: list[tuple], positions: list[int]):
        self.keys = [[key for part in parts for key in part.keys] for parts in batches]
        images = [np.concatenate([part.images.numpy() for part in parts]) for parts in batches]
        self.ids = [pixels[:, 0, 0, 0].tolist() for pixels in images]
        self.constant = all((pixels == pixels[:, :1, :1, :1]).all() for pixels in images)
        self.positions = []
        for parts in batches:
            positions = list(positions)
            for stream, position in (pair for part in parts for pair in part.positions.items()):
                positions[stream] = position
            self.positions.append(positions)


def run_grid(grid, rows: Rows, positions: list[int], first: int, stop: int, take=None) -> Steps:
    """The steps [first, stop) on (ranks, workers), of a run of PLAN that would go on for longer.

    The ranks have their turn one after the other, in this process; their loader workers are real, unless `take` plays
    them.
    """
    ranks, workers = grid
    assert PLAN.items_per_step(ranks, workers, grad_accum_steps=1) == 1
    streams = [
        TrainingStream(rows, PLAN, SPEC, SEED, positions, first, first + 1000, rank, ranks) for rank in range(ranks)
    ]
    by_rank = [(take or take_from_workers)(stream, workers, stop - first) for stream in streams]
    return Steps(list(zip(*by_rank, strict=True)), positions)


def take_from_workers(stream: TrainingStream, workers: int, count: int) -> list[Batch]:
    # The workers have read ahead when they are ended, as in a run that is interrupted.
    with closing(each_batch(make_loader(stream, workers))) as batches:
        return list(itertools.islice(batches, count))


@pytest.fixture
def played(monkeypatch):
    """Takes batches as from loader workers, all of them played by this process."""

    def take(stream: TrainingStream, workers: int, count: int) -> list[Batch]:
        batches: list = [None] * count
        for number in range(max(workers, 1)):
            info = SimpleNamespace(id=number, num_workers=workers) if workers else None
            monkeypatch.setattr(loader_module, "get_worker_info", lambda info=info: info)
            mine = range(number, count, max(workers, 1))
            batches[number :: max(workers, 1)] = itertools.islice(stream, len(mine))
        return batches

    return take


@pytest.fixture
def order_only(monkeypatch):
    """Images are taken as they are: what becomes of them is tested elsewhere, and takes most of the time."""
    monkeypatch.setattr("hf_mae.data.decode.decode_image", lambda image, *_: image)
    monkeypatch.setattr(loader_module, "training_view", lambda *_: np.zeros((1, *SPEC.size), np.uint8))


@pytest.mark.usefixtures("order_only")
@pytest.mark.parametrize("block", [None, pytest.param(9, marks=pytest.mark.slow)])
@pytest.mark.parametrize("ranks", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_run_interrupted_after_any_step_continues_exactly_on_any_grid(ranks, block, played):
    rows, last = memory_rows([61, 3, 80, 29], block), 68
    expected = written_down(rows.source, PLAN, last)
    assert last * 16 > 6 * len(rows)  # epochs
    for workers in (0, 1, 2, 4):
        grid = (ranks, workers)
        whole = run_grid(grid, rows, [0] * 16, 0, last, played)
        assert whole.keys == expected
        for k in range(1, 61):
            for resumed in (grid, GRIDS[(GRIDS.index(grid) + k) % 12]):
                # Two turns of every stream. What follows depends on their positions alone, which are the same again.
                steps = run_grid(resumed, rows, whole.positions[k - 1], k, k + 8, played)
                assert steps.keys == expected[k : k + 8], (grid, k, resumed)
                assert steps.positions == whole.positions[k : k + 8]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tars", "parquet"])
@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: "{}x{}".format(*grid))
def test_real_workers_ended_while_reading_ahead_lose_nothing_on_any_grid(kind, grid, open_kind):
    source, number = open_kind(kind, 7), GRIDS.index(grid)
    rows, k = Rows(source), 2 + 5 * number + (kind == "parquet")
    expected, keys = written_down(source, PLAN, k + 16), all_keys(source)
    positions, first = [0] * 16, 0
    for on, stop in ((grid, k), (grid, k + 8), (GRIDS[(5 * number + 3) % 12], k + 16)):
        steps = run_grid(on, rows, positions, first, stop)
        assert steps.keys == expected[first:stop]
        assert [[keys[image] for image in batch] for batch in steps.ids] == steps.keys
        positions, first = steps.positions[-1], stop


# ------------------------------------------------------------------------------------------ torchrun

# Source, and the launches: a grid, and the steps before which the run is interrupted, the first from the beginning.
LAUNCHES = {
    "digits": [((2, 1), [17, 40])],
    "parquet": [((4, 1), [17, 40])],
    "parquet of a Hub": [((2, 2), [17, 40])],
    "tars": [((2, 4), [17]), ((4, 2), [40])],
}
SCRIPT = """
import itertools, json, os, sys
from contextlib import closing
from pathlib import Path

import torch.distributed as dist
from hf_mae.data.loader import TrainingStream, each_batch, make_loader
from hf_mae.data.order import Rows, StreamPlan
from hf_mae.data.sources import open_source
from hf_mae.data.transform import ImageSpec

job = json.loads(Path(sys.argv[1]).read_text())
rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
dist.init_process_group("gloo")
rows, plan = Rows(open_source(job["dataset"], streaming=job["streaming"])), StreamPlan(**job["plan"])
view = ImageSpec(size=(4, 4), num_channels=1, dtype="uint8", num_patches=4)
step, positions, keys = job["step"], job["positions"], []
for stop in job["stops"]:
    stream = TrainingStream(rows, plan, view, job["seed"], positions, step, step + 1000, rank, ranks)
    moved, of_all = {}, [None] * ranks
    with closing(each_batch(make_loader(stream, job["workers"]))) as batches:
        for batch in itertools.islice(batches, stop - step):
            moved.update(batch.positions)
            keys.append(batch.keys)
    dist.all_gather_object(of_all, moved)
    for number, position in itertools.chain(*map(dict.items, of_all)):
        positions[number] = position
    step = stop
Path(f"{sys.argv[1]}.{rank}").write_text(json.dumps({"keys": keys, "positions": positions}))
dist.destroy_process_group()
"""


def torchrun(ranks: int, *words, **variables: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", ranks, *words]
    env = environment(ACCELERATE_USE_CPU="true") | variables
    result = subprocess.run(map(str, command), env=env, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("kind", LAUNCHES)
def test_processes_under_torchrun_take_the_batches_written_down_across_interruptions(kind, tmp_path):
    folder, streaming = tmp_path / "datasets" / "user" / "numbers", kind.startswith("parquet") or None
    dataset = "digits" if kind == "digits" else str(write(folder, kind.split()[0], 7))
    plan = StreamPlan(64 if kind == "digits" else 16, chunks=4, groups=4)  # so that each has more than an epoch
    expected = written_down(open_source(dataset, streaming=streaming), plan, 40)
    job = {"plan": vars(plan), "seed": SEED, "dataset": dataset, "streaming": streaming}
    job |= {"step": 0, "positions": [0] * 16}
    # Under the command's name hf_mae leaves out its registration with transformers, which takes seconds.
    script, file, batches = tmp_path / "hf-mae.py", tmp_path / "job", []
    script.write_text(SCRIPT)
    with HubServer(tmp_path) if "Hub" in kind else nullcontext() as hub:
        job |= {"dataset": "user/numbers"} if hub else {}
        variables = hub.env | {"PYTHONPATH": environment()["PYTHONPATH"]} if hub else {}
        for (ranks, workers), stops in LAUNCHES[kind]:
            file.write_text(json.dumps(job | {"workers": workers, "stops": stops}))
            torchrun(ranks, script, file, **variables)
            by_rank = [json.loads(Path(f"{file}.{rank}").read_text()) for rank in range(ranks)]
            by_step = zip(*(found["keys"] for found in by_rank), strict=True)
            batches += [list(itertools.chain(*parts)) for parts in by_step]
            job |= {"step": stops[-1], "positions": by_rank[0]["positions"]}
        assert not hub or any(request.path.endswith(".parquet") for request in hub.requests)
    assert batches == expected
    assert sum(job["positions"]) == 40 * plan.total_batch_size


@pytest.mark.slow
def test_seven_shards_on_two_ranks_train_for_three_epochs_and_end(tmp_path):
    dataset, output_dir = write(tmp_path / "data", "parquet", 7), tmp_path / "run"
    options = {"streaming": "true", "total_steps": None, "epochs": 3, "total_batch_size": 16, "num_workers": 2}
    torchrun(2, "-m", "hf_mae.cli", *arguments(output_dir, dataset=dataset, **options))
    last = events(output_dir)[-1]
    state = json.loads(next(output_dir.glob(f"checkpoint-{last['step']}/data.json")).read_text())
    rows = len(Rows(open_source(str(dataset), streaming=True), "train"))
    assert 180 < rows < IMAGES
    assert last["step"] == round(3 * rows / 16)
    assert sum(state["positions"]) == last["step"] * 16
    assert max(state["positions"]) - min(state["positions"]) <= 16 // state["plan"]["chunks"]
    assert (output_dir / "model.safetensors").exists()


# ------------------------------------------------------------------------------------------ each image once


def check_each_once(batches: list[list[int]], lengths: list[int], plan: StreamPlan) -> None:
    """That every stream, and so all together, give each image once an epoch, and none gets ahead of the others.

    What holds at every step: an image was seen at least as often as the slowest stream has completed epochs, and at
    most as often as the fastest has begun. These differ by one while all streams are in the same epoch, and by two
    while some have begun the next.

    Args:
        batches: numbers of the images in each step, from 0 to the number of images.
        lengths: rows of each stream's part of an epoch.
        plan: how they were put together.
    """
    assert max(lengths) - min(lengths) <= 1
    images, chunk = sum(lengths), plan.total_batch_size // plan.chunks
    streams: list[list[int]] = [[] for _ in lengths]
    views = np.zeros(images, dtype=int)
    for step, batch in enumerate(batches):
        for at, image in enumerate(batch):
            streams[step % plan.groups * plan.chunks + at // chunk].append(image)
        views += np.bincount(batch, minlength=images)
        completed = min(len(seen) // length for seen, length in zip(streams, lengths, strict=True))
        begun = max(-(-len(seen) // length) for seen, length in zip(streams, lengths, strict=True))
        assert completed <= views.min() <= views.max() <= begun <= completed + 2
    by_epoch: dict[int, list[int]] = {}
    for seen, length in zip(streams, lengths, strict=True):
        for start in range(0, len(seen), length):
            by_epoch.setdefault(start // length, []).extend(seen[start : start + length])
    for epoch, seen in by_epoch.items():
        assert len(set(seen)) == len(seen), f"repeated in epoch {epoch}"
        assert epoch >= completed or sorted(seen) == list(range(images)), f"lost in epoch {epoch}"


SHARDS = (3, 7, 16, 21)  # of 16 streams: fewer than ranks x workers, fewer, as many, no multiple
CASES = [(kind, shards) for kind in KINDS for shards in SHARDS if "images" not in kind or shards == 7]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "shards"), CASES)
def test_two_and_a_half_epochs_of_every_kind_of_source_lose_and_repeat_nothing(kind, shards, open_kind):
    source = open_kind(kind, shards)
    in_shards = kind.startswith(("parquet", "tars")) and "mapped" not in kind
    assert len(source.shard_sizes) == (shards if in_shards else 1)
    assert source.random_access is (kind != "parquet" and "URL" not in kind)
    rows = Rows(source)
    steps = run_grid((2, 2), rows, [0] * 16, 0, 33)
    assert steps.keys == written_down(source, PLAN, 33)
    keys = all_keys(source)
    assert [[keys[image] for image in batch] for batch in steps.ids] == steps.keys
    assert steps.constant
    lengths = [LogicalStream(EpochOrder(rows, SEED), number, 16).length for number in range(16)]
    assert sum(lengths) == IMAGES
    check_each_once(steps.ids, lengths, PLAN)
    assert Counter(Counter(itertools.chain(*steps.ids)).values()) == {3: 33 * 16 - 2 * IMAGES, 2: 3 * IMAGES - 33 * 16}


@pytest.mark.usefixtures("order_only")
@pytest.mark.parametrize("block", [None, 13])
def test_over_forty_epochs_on_uneven_streams_no_image_falls_behind(block):
    rows = memory_rows([170, 1, 231], block)
    plan = StreamPlan.choose(16, ranks=2, workers=2, num_samples=402, random_access=block is None)
    lengths = [LogicalStream(EpochOrder(rows, SEED), number, plan.num_streams).length for number in range(4)]
    assert sorted(lengths) == [100, 100, 101, 101]
    numbers = {row.key: number for number, row in enumerate(rows.read(rows.index))}
    batches = TrainingStream(rows, plan, SPEC, SEED, [0] * 4, 0, 40 * 402 // 16)
    ids = [[numbers[key] for key in batch.keys] for batch in batches]
    check_each_once(ids, lengths, plan)
    views = Counter(itertools.chain(*ids))
    assert set(views.values()) <= {39, 40, 41}


# ------------------------------------------------------------------------------------------ what a resume costs


def test_the_first_batch_after_a_resume_costs_that_batch_whatever_came_before(open_kind, monkeypatch):
    source = open_kind("parquet", 7)
    rows, reads, opened, decoded = Rows(source), [], [], []
    read, open_bytes = source.read, parquet.open_bytes
    monkeypatch.setattr(source, "read", lambda *place: reads.append(place) or read(*place))
    monkeypatch.setattr(parquet, "open_bytes", lambda url: opened.append(url) or open_bytes(url))
    monkeypatch.setattr("hf_mae.data.decode.decode_image", lambda *image: decoded.append(1) or decode_image(*image))

    def costs(positions: list[int], first: int, stop: int) -> tuple[list[int], list[list[int]]]:
        """Reads after each step, and positions."""
        after, moved = [], []
        for counter in (reads, opened, decoded):
            counter.clear()
        for batch in TrainingStream(rows, PLAN, SPEC, SEED, positions, first, stop):
            positions = [batch.positions.get(stream, position) for stream, position in enumerate(positions)]
            after.append(len(reads))
            moved.append(positions)
            assert len(decoded) == len(after) * 16  # no sample is decoded that isn't in a batch
            assert len(opened) <= len(reads)
        return after, moved

    whole, positions = costs([0] * 16, 0, 68)
    groups = [{(shard, row) for row in range(start, stop)} for shard, start, stop in source.blocks]
    assert all(any({(shard, row) for row in numbers} <= group for group in groups) for shard, numbers in reads)
    for k in range(1, 61):
        source._last = None
        resumed, _ = costs(positions[k - 1], k, k + 8)
        # A stream reads again what is left of the block that it was in, when it has its first turn.
        assert resumed[0] <= whole[k] - whole[k - 1] + 4
        assert resumed[-1] <= whole[k + 7] - whole[k - 1] + 16


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_real_workers_decode_only_what_they_read_ahead_before_a_resumed_batch(workers, open_kind, monkeypatch):
    rows, decoded = Rows(open_kind("parquet", 7)), multiprocessing.Value("i", 0)

    def counting(*arguments):
        with decoded.get_lock():
            decoded.value += 1
        return decode_image(*arguments)

    monkeypatch.setattr("hf_mae.data.decode.decode_image", counting)
    positions = run_grid((1, 0), rows, [0] * 16, 0, 60).positions
    for k in (1, 23, 60):
        decoded.value = 0
        stream = TrainingStream(rows, PLAN, SPEC, SEED, positions[k - 1], k, k + 1000)
        with closing(each_batch(make_loader(stream, workers))) as batches:
            next(batches)
            # Two batches for each worker, and one in place of that which was taken.
            most, deadline = (2 * workers + 1) * 16, time.monotonic() + 20
            while decoded.value < most and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.1)
            assert decoded.value == most
