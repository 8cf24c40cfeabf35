import itertools
import multiprocessing
import os
import signal
import time
from contextlib import closing
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from bad_images import encoded
from memory_source import MemorySource, memory_rows, noise_images
from obvious_order import obvious_stream
from PIL import Image
from torch.utils.data import IterableDataset

from hf_mae.data import loader as loader_module
from hf_mae.data.augment import sample_rng, training_view
from hf_mae.data.decode import decode_image
from hf_mae.data.loader import EvaluationSet, TrainingStream, each_batch, make_loader
from hf_mae.data.order import Rows, StreamPlan
from hf_mae.data.sources import open_source
from hf_mae.data.transform import ImageSpec, evaluation_view, pixels_needed
from hf_mae.errors import DataError

SPEC = ImageSpec(size=(4, 4), num_channels=1, dtype="uint8", num_patches=4)


@pytest.fixture
def worker(monkeypatch):
    """Says which worker the code believes it runs in."""

    def become(number: int | None, count: int = 0):
        info = None if number is None else SimpleNamespace(id=number, num_workers=count)
        monkeypatch.setattr(loader_module, "get_worker_info", lambda: info)

    return become


def obvious_batches(rows: Rows, plan: StreamPlan, view: ImageSpec, seed: int, steps: int, bad: frozenset = frozenset()):
    """Keys, images and noise of the global batches, one sample after the other."""
    streams = [obvious_stream(rows, seed, number, plan.num_streams) for number in range(plan.num_streams)]
    for step in range(steps):
        keys, images, noise = [], [], []
        for chunk in range(plan.chunks):
            stream = streams[step % plan.groups * plan.chunks + chunk]
            clean = (place for place in stream if place[1] not in bad)
            for epoch, index in itertools.islice(clean, plan.total_batch_size // plan.chunks):
                (row,) = rows.read(np.array([index]))
                rng = sample_rng(seed, epoch, row.shard, row.row)
                image = decode_image(row.image, view.num_channels, view.dtype)
                images.append(training_view(image, rng, view.size, view.crop_scale, view.flip))
                noise += list(rng.random((view.masks, view.num_patches), dtype=np.float32))
                keys.append(row.key)
        yield keys, np.stack(images), np.stack(noise)


def run(dataset_of, plan, ranks, workers, accumulate, first, last, positions, become):
    """Global batches of the steps [first, last) on a grid of processes, and where the streams are after each.

    Args:
        dataset_of: (rank, items_per_step) -> the rank's TrainingStream.
        become: the fixture `worker`.
    """
    items_per_step = plan.items_per_step(ranks, workers, accumulate)
    by_rank = []
    for rank in range(ranks):
        dataset = dataset_of(rank, items_per_step)
        parts = []
        for number in range(max(workers, 1)):
            become(number if workers else None, workers)
            parts.append(list(dataset))
        # A DataLoader takes an item from each of its workers in turn.
        by_rank.append([item for turn in itertools.zip_longest(*parts) for item in turn if item is not None])
        assert len(by_rank[-1]) == (last - first) * items_per_step
    positions = list(positions)
    for step in range(last - first):
        items = [item for rank in by_rank for item in rank[step * items_per_step : (step + 1) * items_per_step]]
        taken = [number for item in items for number in item.positions]
        assert sorted(taken) == sorted(set(taken))
        for number, position in ((n, p) for item in items for n, p in item.positions.items()):
            positions[number] = position
        yield (
            [key for item in items for key in item.keys],
            np.concatenate([item.images.numpy() for item in items]),
            np.concatenate([item.noise.numpy() for item in items]),
            list(positions),
        )


def equal(batch, expected) -> bool:
    return batch[0] == expected[0] and all(np.array_equal(a, b) for a, b in zip(batch[1:3], expected[1:3], strict=True))


# ------------------------------------------------------------------------------------------ global batches

GRIDS = list(itertools.product((1, 2, 4), (0, 1, 2, 4), (1, 2, 4)))


@pytest.mark.parametrize("block", [pytest.param(None, marks=pytest.mark.slow), 9])
def test_global_batches_are_those_written_down_on_every_grid(worker, block):
    rows, plan = memory_rows([31, 3, 42, 24], block), StreamPlan(16, chunks=16, groups=4)
    expected = list(obvious_batches(rows, plan, SPEC, seed=3, steps=8))  # more than an epoch of every stream
    assert len({key for keys, _, _ in expected for key in keys}) == 100
    # With and without blocks it is the same code that deals streams to processes.
    for ranks, workers, accumulate in GRIDS if block is None else GRIDS[1::4]:

        def dataset(rank, items, ranks=ranks):
            return TrainingStream(rows, plan, SPEC, 3, [0] * 64, 0, 8, rank, ranks, items)

        batches = list(run(dataset, plan, ranks, workers, accumulate, 0, 8, [0] * 64, worker))
        wrong = [step for step in range(8) if not equal(batches[step], expected[step])]
        assert not wrong, (ranks, workers, accumulate, wrong)


def test_more_masks_an_image_are_drawn_after_the_first_and_change_nothing_else(worker):
    rows, plan, view = memory_rows([31, 3, 42, 24]), StreamPlan(16, chunks=16, groups=4), replace(SPEC, masks=3)
    expected = list(obvious_batches(rows, plan, view, seed=3, steps=4))
    with_one = list(obvious_batches(rows, plan, SPEC, seed=3, steps=4))
    for ranks, workers, accumulate in GRIDS[::5]:

        def dataset(rank, items, ranks=ranks):
            return TrainingStream(rows, plan, view, 3, [0] * 64, 0, 4, rank, ranks, items)

        batches = list(run(dataset, plan, ranks, workers, accumulate, 0, 4, [0] * 64, worker))
        assert all(equal(one, other) for one, other in zip(batches, expected, strict=True))
    for (keys, images, noise), (keys_of_one, images_of_one, first_noise) in zip(expected, with_one, strict=True):
        assert keys == keys_of_one
        assert np.array_equal(images, images_of_one)
        assert noise.shape == (48, 4)
        assert np.array_equal(noise[::3], first_noise)
        assert len(np.unique(noise, axis=0)) == 48


@pytest.mark.parametrize("block", [None, 9])
def test_a_run_goes_on_on_any_other_grid_from_the_positions_in_its_batches(worker, block):
    bad = {5, 64, 65, 90, 150}
    images = [list(shard) for shard in noise_images([61, 3, 80, 29])]
    for index in bad:
        shard = int(np.searchsorted([61, 64, 144], index, side="right"))
        images[shard][index - [0, 61, 64, 144][shard]] = b"no image"
    rows, plan = Rows(MemorySource(images, block)), StreamPlan(32, chunks=8, groups=4)
    steps = 17  # three epochs
    expected = list(obvious_batches(rows, plan, SPEC, 0, steps, frozenset(bad)))
    grids = [grid for grid in GRIDS if plan.groups * np.gcd(grid[2], 8 // grid[0]) % max(grid[1], 1) == 0]
    assert len(grids) > 25

    def part(grid, first, last, positions):
        def dataset(rank, items):
            return TrainingStream(rows, plan, SPEC, 0, positions, first, last, rank, grid[0], items)

        return list(run(dataset, plan, *grid, first, last, positions, worker))

    for number, stop in enumerate([1, 2, 3, 6, 11, 16]):
        before = part(grids[number * 5 % len(grids)], 0, stop, [0] * 32)
        after = part(grids[(number * 7 + 3) % len(grids)], stop, steps, before[-1][3])
        wrong = [step for step, batch in enumerate(before + after) if not equal(batch, expected[step])]
        assert not wrong, (stop, wrong)


def test_after_a_resume_nothing_is_decoded_twice_and_a_block_a_stream_read_twice(monkeypatch):
    rows, plan = memory_rows([61, 3, 80, 29], block=9), StreamPlan(16, chunks=4, groups=2)
    decoded = []

    def counting(image, *arguments):
        decoded.append(image.tobytes())
        return decode_image(image, *arguments)

    monkeypatch.setattr("hf_mae.data.decode.decode_image", counting)
    steps = 22  # two epochs
    list(TrainingStream(rows, plan, SPEC, 0, [0] * 8, 0, steps))
    uninterrupted, decoded_whole = list(rows.source.reads), list(decoded)
    assert len(decoded) == steps * 16
    for stop in (1, 5, 10, 11, 17):
        rows.source.reads.clear()
        decoded.clear()
        positions = [0] * 8
        for batch in TrainingStream(rows, plan, SPEC, 0, positions, 0, stop):
            for stream, position in batch.positions.items():
                positions[stream] = position
        list(TrainingStream(rows, plan, SPEC, 0, positions, stop, steps))
        assert decoded == decoded_whole
        assert len(uninterrupted) <= len(rows.source.reads) <= len(uninterrupted) + 8


def test_pixels_and_noise_of_a_sample_depend_on_seed_epoch_and_place_alone():
    rows = memory_rows([30, 50])
    seen: dict[str, list] = {}
    # Other plans, other order of the samples: the same views, in the epochs 0 and 1.
    for plan in (StreamPlan(20, 4, 2), StreamPlan(16, 1, 1)):
        batches = TrainingStream(rows, plan, SPEC, 9, [0] * plan.num_streams, 0, 160 // plan.total_batch_size)
        counts: dict[str, int] = {}
        for batch in batches:
            for key, image, noise in zip(batch.keys, batch.images, batch.noise, strict=True):
                counts[key] = counts.get(key, -1) + 1
                seen.setdefault(f"{key} in epoch {counts[key]}", []).append((image.numpy(), noise.numpy()))
    assert len(seen) == 160
    assert {len(views) for views in seen.values()} == {2}
    for (image, noise), (other_image, other_noise) in seen.values():
        assert np.array_equal(image, other_image)
        assert np.array_equal(noise, other_noise)
    assert len({views[0][1].tobytes() for views in seen.values()}) == 160
    rng = sample_rng(9, 1, 1, 4)
    image = decode_image(rows.source.shards[1][4], 1)
    assert np.array_equal(seen["shard1#4 in epoch 1"][0][0], training_view(image, rng, (4, 4)))
    assert np.array_equal(seen["shard1#4 in epoch 1"][0][1], rng.random(4, dtype=np.float32))


def test_batches_have_the_views_size_and_dtype_and_the_sources_labels():
    images = noise_images([40], (9, 7, 13), np.uint16)
    rows = Rows(MemorySource(images, labels=[f"label {i}" for i in range(40)]))
    view = ImageSpec(size=(4, 8), num_channels=13, dtype="uint16", num_patches=8, crop_scale=(1.0, 1.0), flip=False)
    (batch,) = TrainingStream(rows, StreamPlan(10, 2, 1), view, 0, [0, 0], 0, 1)
    assert batch.images.shape == (10, 13, 4, 8)
    assert batch.images.dtype == torch.uint16
    assert batch.noise.shape == (10, 8)
    assert batch.noise.dtype == torch.float32
    assert batch.labels == [f"label {key.split('#')[1]}" for key in batch.keys]
    assert batch.positions == {0: 5, 1: 5}
    assert batch.noise.min() >= 0
    assert batch.noise.max() < 1


def test_large_photographs_are_decoded_at_the_scale_that_the_smallest_crop_needs():
    data = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 90, 3), dtype=np.uint8)), "JPEG")
    plan, view = StreamPlan(1, 1, 1), ImageSpec(size=(8, 8), num_channels=3, dtype="uint8", num_patches=4)
    batch = next(iter(TrainingStream(Rows(MemorySource([[data]])), plan, view, 0, [0], 0, 1)))
    small = decode_image(data, 3, "uint8", pixels_needed((8, 8), view.crop_scale))
    assert np.shape(small) == (20, 23, 3)  # 8 * 8 * 4/3 / 0.2 = 427 of them are needed
    assert np.array_equal(batch.images[0], training_view(small, sample_rng(0, 0, 0, 0), (8, 8)))


@pytest.mark.parametrize("classes", [10, 1000])
def test_batches_of_local_data_sorted_by_class_are_as_mixed_as_a_full_permutations(classes, monkeypatch):
    pixel = np.zeros((1, 1, 1), np.uint8)
    monkeypatch.setattr("hf_mae.data.decode.decode_image", lambda image, *_: image)
    monkeypatch.setattr(loader_module, "training_view", lambda image, *_: image)
    samples = 20_000
    labels = np.arange(samples) * classes // samples
    rows = Rows(MemorySource([[pixel] * samples], labels=labels))
    plan = StreamPlan.choose(256, 1, 2, samples, random_access=True)
    view = ImageSpec(size=(1, 1), num_channels=1, dtype="uint8", num_patches=1)
    batches = TrainingStream(rows, plan, view, 0, [0] * plan.num_streams, 0, 30)
    found = np.mean([len(set(batch.labels)) for batch in batches])
    shuffled = np.random.default_rng(0).permutation(labels)[: 256 * 78].reshape(78, 256)
    assert found >= 0.98 * np.mean([len(set(batch)) for batch in shuffled])


# ------------------------------------------------------------------------------------------ bad images


@pytest.mark.parametrize("block", [None, 7])
def test_bad_images_are_skipped_and_named_and_no_clean_one_is_lost(block):
    shards = [list(shard) for shard in noise_images([50, 30])]
    for shard, row, data in (
        (0, 3, b"rubbish"),
        (0, 49, b""),
        (1, 0, b"\x89PNG\r\n\x1a\n"),
        (1, 7, np.zeros((2, 2, 2))),
    ):
        shards[shard][row] = data
    rows = Rows(MemorySource(shards, block))
    batches = list(TrainingStream(rows, StreamPlan(4, 2, 2), SPEC, 0, [0] * 4, 0, 38))  # 2 x 76 clean images
    assert all(len(batch.keys) == 4 for batch in batches)
    keys = [key for batch in batches for key in batch.keys]
    bad = [pair for batch in batches for pair in batch.bad]
    named = {"shard0#3", "shard0#49", "shard1#0", "shard1#7"}
    assert {key for key, _ in bad} == named
    assert dict(bad)["shard0#49"] == "EmptyFile"
    assert dict(bad)["shard1#7"] == "WrongChannels"
    clean = {f"shard{s}#{r}" for s, size in enumerate((50, 30)) for r in range(size)} - named
    assert set(keys) == clean
    # Streams whose part has bad images are ahead of the others, by as many.
    assert len(keys) == 152
    assert max(keys.count(key) for key in clean) <= 3


def test_a_stream_of_few_images_may_skip_more_than_it_has_while_some_are_good():
    shards = [list(shard) for shard in noise_images([4])]
    shards[0][1] = shards[0][2] = shards[0][3] = b"rubbish"
    rows = Rows(MemorySource(shards))
    (batch,) = TrainingStream(rows, StreamPlan(12, 1, 1), SPEC, 0, [0], 0, 1)
    assert batch.keys == ["shard0#0"] * 12
    assert len(batch.bad) >= 33  # of eleven epochs, and part of another


def test_endless_bad_images_are_an_error_that_names_the_last():
    rows = Rows(MemorySource([[b"rubbish"] * 10]))
    with pytest.raises(DataError, match=r"^11 images in a row could not be read, .* shard0#\d .*; check the data$"):
        next(iter(TrainingStream(rows, StreamPlan(4, 1, 2), SPEC, 0, [0, 0], 0, 1)))


# ------------------------------------------------------------------------------------------ evaluation


@pytest.mark.parametrize("block", [None, 9])
def test_an_evaluation_covers_each_row_once_on_any_grid_with_the_same_pixels(worker, block):
    rows = memory_rows([20, 41], block, part="train")
    view = ImageSpec(size=(4, 4), num_channels=1, dtype="uint8", num_patches=6, eval_resize=5)
    expected = {
        row.key: (
            evaluation_view(decode_image(row.image, 1), 5, (4, 4)),
            np.random.default_rng([7, 0, row.shard, row.row]).random(6, np.float32),
        )
        for row in rows.read(rows.index)
    }
    for ranks, workers, batch_size in itertools.product((1, 3, 100), (0, 1, 3), (1, 7, 64)):
        keys = []
        for rank in range(ranks):
            dataset = EvaluationSet(rows, view, batch_size, mask_seed=7, rank=rank, ranks=ranks)
            for number in range(max(workers, 1)):
                worker(number if workers else None, workers)
                for batch in dataset:
                    assert 1 <= len(batch.keys) <= batch_size
                    keys += batch.keys
                    for key, image, noise in zip(batch.keys, batch.images.numpy(), batch.noise.numpy(), strict=True):
                        assert np.array_equal(image, expected[key][0])
                        assert np.array_equal(noise, expected[key][1])
        assert sorted(keys) == sorted(expected), (ranks, workers, batch_size)


def test_an_evaluation_leaves_out_bad_images_and_names_them():
    shards = [list(shard) for shard in noise_images([10])]
    shards[0][4] = b""
    batches = list(EvaluationSet(Rows(MemorySource(shards)), SPEC, 4))
    assert [len(batch.keys) for batch in batches] == [4, 3, 2]
    assert [batch.bad for batch in batches] == [[], [("shard0#4", "EmptyFile")], []]


# ------------------------------------------------------------------------------------------ loader workers


def loaded(rows, plan, grid, first, last, positions, method=None):
    """As `run`, by real loader workers."""
    ranks, workers, accumulate = grid
    items = plan.items_per_step(ranks, workers, accumulate)
    by_rank, positions = [], list(positions)
    for rank in range(ranks):
        loader = make_loader(
            TrainingStream(rows, plan, SPEC, 3, positions, first, last, rank, ranks, items), num_workers=workers
        )
        if method:
            loader.multiprocessing_context = method
        by_rank.append(list(loader))
    for batch in itertools.chain(*by_rank):
        for stream, position in batch.positions.items():
            positions[stream] = position
    batches = []
    for step in range(last - first):
        mine = [item for rank in by_rank for item in rank[step * items : (step + 1) * items]]
        images, noise = ([getattr(item, name).numpy() for item in mine] for name in ("images", "noise"))
        batches.append(([key for item in mine for key in item.keys], np.concatenate(images), np.concatenate(noise)))
    return batches, positions


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("block", [None, 9])
def test_real_workers_give_the_batches_written_down_and_so_does_a_resume_elsewhere(block):
    rows, plan = memory_rows([61, 3, 80, 29], block), StreamPlan(32, chunks=16, groups=4)
    expected = list(obvious_batches(rows, plan, SPEC, seed=3, steps=11))
    grids = [grid for grid in GRIDS if grid[1]][block is None :: 2]
    for number, grid in enumerate(grids):
        stop = 1 + number % 10
        before, positions = loaded(rows, plan, grid, 0, stop, [0] * 64)
        after, _ = loaded(rows, plan, grids[(5 * number + 2) % len(grids)], stop, 11, positions)
        wrong = [step for step, batch in enumerate(before + after) if not equal(batch, expected[step])]
        assert not wrong, (grid, stop, wrong)


@pytest.mark.slow
def test_spawned_workers_give_the_batches_written_down():
    rows, plan = memory_rows([61, 3, 80, 29], block=9), StreamPlan(32, chunks=16, groups=4)
    expected = list(obvious_batches(rows, plan, SPEC, seed=3, steps=7))
    batches, _ = loaded(rows, plan, (1, 2, 2), 0, 7, [0] * 64, method="spawn")
    assert all(equal(batch, other) for batch, other in zip(batches, expected, strict=True))


@pytest.mark.slow
def test_the_built_in_digits_come_whole_through_two_workers():
    rows = Rows(open_source("digits"), "train")
    plan = StreamPlan.choose(128, 1, 2, len(rows), True)
    view = ImageSpec(size=(8, 8), num_channels=1, dtype="uint8", num_patches=16, crop_scale=(0.7, 1.0), flip=False)
    steps = 3 * len(rows) // 128
    batches = list(make_loader(TrainingStream(rows, plan, view, 0, [0] * plan.num_streams, 0, steps), 2))
    counts = np.unique([key for batch in batches for key in batch.keys], return_counts=True)[1]
    assert len(counts) == len(rows)
    assert (counts.min(), counts.max()) in {(2, 3), (2, 4), (3, 4)}


def test_a_worker_that_gets_sigterm_goes_on():
    rows, plan = memory_rows([64]), StreamPlan(8, chunks=2, groups=2)
    dataset = TrainingStream(rows, plan, SPEC, 0, [0] * 4, 0, 40)
    expected = [batch.keys for batch in dataset]
    batches = iter(make_loader(dataset, 1))
    keys = [next(batches).keys]
    process = batches._workers[0]
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(0.2)
    keys += [batch.keys for batch in batches]
    assert keys == expected
    # It ends by itself when there is nothing left to do.
    process.join(10)
    assert process.exitcode == 0


def test_a_loader_without_workers_reads_in_this_process_and_ignores_no_signal():
    before = signal.getsignal(signal.SIGTERM)
    rows = memory_rows([64])
    dataset = TrainingStream(rows, StreamPlan(8, 2, 2), SPEC, 0, [0] * 4, 0, 3)
    assert [batch.keys for batch in make_loader(dataset, 0)] == [batch.keys for batch in dataset]
    assert signal.getsignal(signal.SIGTERM) is before
    assert rows.source.reads


def test_an_error_in_a_worker_keeps_its_kind_and_its_one_line_and_ends_the_workers():
    rows = Rows(MemorySource([[b"rubbish"] * 10]))
    loader = make_loader(TrainingStream(rows, StreamPlan(4, 1, 2), SPEC, 0, [0, 0], 0, 1), 1)
    with pytest.raises(
        DataError, match=r"^11 images in a row could not be read, the last one shard0#\d .*check the data$"
    ):
        next(each_batch(loader))
    assert multiprocessing.active_children() == []


class Stuck(IterableDataset):
    """One batch, and then none for ever."""

    def __iter__(self):
        yield os.getpid()
        time.sleep(1000)


@pytest.mark.slow
def test_a_worker_that_never_ends_does_not_keep_its_process():
    with closing(each_batch(make_loader(Stuck(), num_workers=1))) as batches:
        pid = next(batches)
    assert not psutil.pid_exists(pid)
