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
from PIL import Image
from torch.utils.data import IterableDataset

from hf_mae.data import loader as loader_module
from hf_mae.data.augment import sample_rng, training_view
from hf_mae.data.decode import decode_image
from hf_mae.data.loader import EvaluationSet, TrainingStream, each_batch, make_loader
from hf_mae.data.order import EpochOrder, LogicalStream, Rows, StreamPlan, held_out
from hf_mae.data.sources import open_source
from hf_mae.data.transform import ImageSpec, evaluation_view, pixels_needed
from hf_mae.errors import DataError

# Shards fewer than the streams, as many, and more; with and without blocks; none of the sizes divides another.
SIZES = {"one shard": [173], "uneven shards": [40, 1, 75, 0, 22, 35], "many small shards": [3, 5, 2, 7, 1] * 8}
SPEC = ImageSpec(size=(4, 4), num_channels=1, dtype="uint8", num_patches=4)


@pytest.fixture
def worker(monkeypatch):
    """Says which worker the code believes it runs in."""

    def become(number: int | None, count: int = 0):
        info = None if number is None else SimpleNamespace(id=number, num_workers=count)
        monkeypatch.setattr(loader_module, "get_worker_info", lambda: info)

    return become


def obvious_hash(shard: int, row: int) -> float:
    """splitmix64 of a row's place, in [0, 1)."""
    key = ((shard << 40) + row + 0x9E3779B97F4A7C15) * 0xBF58476D1CE4E5B9 % 2**64
    key = (key ^ key >> 27) * 0x94D049BB133111EB % 2**64
    return (key ^ key >> 31) / 2**64


def obvious_order(rows: Rows, seed: int, epoch: int) -> list[int]:
    """The order of an epoch, written down as one list. Its salts are a promise: runs are resumed by them."""
    blocks = np.random.default_rng([seed, epoch, 1]).permutation(len(rows.blocks))
    order = []
    for block in blocks:
        first, last = rows.blocks[block]
        permutation = np.random.default_rng([seed, epoch, 2, block]).permutation(last - first)
        order += rows.index[first + permutation].tolist()
    return order


def obvious_stream(rows: Rows, seed: int, number: int, count: int):
    """(epoch, row) of a stream, for ever."""
    for epoch in itertools.count():
        order = obvious_order(rows, seed, epoch)
        for index in order[number * len(order) // count : (number + 1) * len(order) // count]:
            yield epoch, index


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


# ------------------------------------------------------------------------------------------ which rows


def test_the_held_out_part_is_about_its_fraction_everywhere_and_never_changes():
    shards, rows = np.repeat(np.arange(40), 2500), np.tile(np.arange(2500), 40)
    for fraction in (0.01, 0.05, 0.3):
        out = held_out(shards, rows, fraction)
        deviation = (fraction * (1 - fraction) / 2500) ** 0.5
        assert out.mean() == pytest.approx(fraction, abs=5 * deviation / 40**0.5)
        assert np.abs(out.reshape(40, 2500).mean(axis=1) - fraction).max() < 5 * deviation
        # No pattern: neighbours are both held out as often as any two rows.
        assert (out[1:] & out[:-1]).mean() == pytest.approx(fraction**2, abs=5 * fraction / 1e5**0.5)
        # A smaller part lies within a larger one.
        assert not (out & ~held_out(shards, rows, fraction + 0.1)).any()
    assert not held_out(shards, rows, 0.0).any()
    # Pinned: another hash would put images that models were trained on into their evaluation.
    for shard in (0, 7):
        slowly = [row for row in range(500) if obvious_hash(shard, row) < 0.05]
        assert np.flatnonzero(held_out(np.full(500, shard), np.arange(500), 0.05)).tolist() == slowly
    assert [row for row in range(200) if obvious_hash(0, row) < 0.05] == [21, 53, 68, 70, 84, 100, 170, 177]


@pytest.mark.parametrize("block", [None, 13])
def test_training_and_held_out_rows_are_all_rows_once(block):
    sizes = [300, 100, 250]
    train, out, everything = (memory_rows(sizes, block, part=part) for part in ("train", "held_out", "all"))
    assert everything.index.tolist() == list(range(650))
    assert sorted(train.index.tolist() + out.index.tolist()) == list(range(650))
    assert 10 <= len(out) <= 65
    places = [(row.shard, row.row) for row in out.read(out.index)]
    assert held_out(*np.array(places).T, 0.05).all()
    # Neither the seed of a run nor the number of samples changes which rows they are.
    few = memory_rows(sizes, block, part="held_out", max_samples=5)
    assert set(few.index) <= set(out.index)
    half = memory_rows(sizes, block, part="held_out", held_out_fraction=0.5)
    assert 260 <= len(half) <= 390


def test_at_most_so_many_samples_are_evenly_spaced_or_the_first():
    assert memory_rows([7, 4], max_samples=6).index.tolist() == [0, 2, 4, 6, 8, 10]
    assert memory_rows([7, 4], max_samples=1).index.tolist() == [0]
    assert memory_rows([7, 4], max_samples=10).index.tolist() == sorted(set(memory_rows([7, 4], max_samples=10).index))
    assert memory_rows([7, 4], block=3, max_samples=6).index.tolist() == [0, 1, 2, 3, 4, 5]
    assert len(memory_rows([7, 4], max_samples=11)) == len(memory_rows([7, 4], max_samples=12)) == 11


@pytest.mark.parametrize("block", [None, 4])
def test_blocks_of_the_rows_are_those_of_the_source_without_what_is_left_out(block):
    rows = memory_rows([10, 0, 3, 9], block, part="train", held_out_fraction=0.4, max_samples=12)
    pieces = [rows.index[start:stop] for start, stop in rows.blocks]
    assert np.concatenate(pieces).tolist() == rows.index.tolist()
    if block is None:
        assert len(pieces) == 1
    else:
        starts = [0, 4, 8, 10, 13, 17, 21]
        of_block = [np.searchsorted(starts, piece, side="right") for piece in pieces]
        assert [len(set(blocks)) for blocks in of_block] == [1] * len(pieces)
        assert len({blocks[0] for blocks in of_block}) == len(pieces)


def test_rows_are_read_in_the_order_asked_for_runs_of_a_shard_at_once():
    rows = memory_rows([3, 4, 2])
    read = list(rows.read(np.array([8, 7, 0, 2, 1, 3, 0])))
    assert [(row.shard, row.row) for row in read] == [(2, 1), (2, 0), (0, 0), (0, 2), (0, 1), (1, 0), (0, 0)]
    assert rows.source.reads == [(2, (1, 0)), (0, (0, 2, 1)), (1, (0,)), (0, (0,))]


def test_no_rows_left_is_an_error_that_says_so():
    with pytest.raises(DataError, match="no rows are left of the 3 in memory for held_out; give more data"):
        memory_rows([3], part="held_out", held_out_fraction=0.0)


# ------------------------------------------------------------------------------------------ the order


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("block", [None, 10])
@pytest.mark.parametrize("count", [1, 4, 6, 40])
def test_every_row_comes_exactly_once_an_epoch_in_the_order_written_down(sizes, block, count):
    rows = memory_rows(sizes, block)
    order = EpochOrder(rows, seed=5)
    streams = [LogicalStream(order, number, count) for number in range(count)]
    lengths = [stream.length for stream in streams]
    assert max(lengths) - min(lengths) <= 1
    assert sum(lengths) == sum(sizes)
    for epoch in range(3):
        seen = []
        for stream in streams:
            for _ in range(stream.length):
                at, row = stream.next(count=7)
                assert at == epoch
                seen.append(int(rows.shard_starts[row.shard]) + row.row)
        assert sorted(seen) == list(range(sum(sizes)))
        assert seen == obvious_order(rows, 5, epoch)
    assert [stream.position for stream in streams] == [3 * length for length in lengths]


def test_streams_may_read_in_turns_and_be_epochs_apart():
    rows = memory_rows(SIZES["uneven shards"], block=10)
    order = EpochOrder(rows, seed=1)
    streams = [LogicalStream(order, number, 3, position) for number, position in enumerate((0, 200, 999))]
    expected = [itertools.islice(obvious_stream(rows, 1, n, 3), p, None) for n, p in enumerate((0, 200, 999))]
    for turn in range(600):
        number = turn * turn % 3
        epoch, row = streams[number].next(count=2)
        assert (epoch, int(rows.shard_starts[row.shard]) + row.row) == next(expected[number])


@pytest.mark.parametrize("block", [None, 10])
def test_seeds_and_epochs_give_other_orders_and_the_same_ones_again(block):
    rows = memory_rows([173], block)

    def order(seed, epoch):
        stream = LogicalStream(EpochOrder(rows, seed), 0, 1, position=173 * epoch)
        return tuple(stream.next(1)[1].row for _ in range(173))

    orders = [order(seed, epoch) for seed in (0, 1, 2) for epoch in (0, 1, 2)]
    assert len(set(orders)) == 9
    assert order(1, 2) == orders[5]
    # Nor is one the other shifted or nearly so: two permutations agree in one place on average.
    agreements = [sum(a == b for a, b in zip(*pair, strict=True)) for pair in itertools.combinations(orders, 2)]
    assert max(agreements) < 15


def test_a_block_of_a_streaming_source_is_read_once_an_epoch_by_each_stream_that_has_a_part_of_it():
    sizes, count = [40, 1, 75, 22, 35], 4
    rows = memory_rows(sizes, block=10)
    for epoch in range(3):
        order = EpochOrder(rows, seed=0)
        rows.source.reads.clear()
        lengths = [(n + 1) * sum(sizes) // count - n * sum(sizes) // count for n in range(count)]
        streams = [LogicalStream(order, n, count, epoch * lengths[n]) for n in range(count)]
        for turn in range(max(lengths)):
            for stream in streams:
                if turn < stream.length:
                    stream.next(count=2)
        places = [(shard, row) for shard, read in rows.source.reads for row in read]
        assert sorted(places) == [(shard, row) for shard, size in enumerate(sizes) for row in range(size)]
        # Where two streams meet within a block, both read their part of it; nothing else is read in two goes.
        assert len(rows.blocks) <= len(rows.source.reads) <= len(rows.blocks) + count - 1


def test_rows_that_are_cheap_are_read_as_they_are_needed():
    rows = memory_rows([500])
    stream = LogicalStream(EpochOrder(rows, 0), 0, 2)
    for left in (3, 2, 1):
        stream.next(left)
    stream.next(5)
    assert [len(read) for _, read in rows.source.reads] == [3, 5]


# ------------------------------------------------------------------------------------------ plans


@pytest.mark.parametrize("random_access", [True, False])
def test_a_chosen_plan_fits_its_grid_or_there_is_none(random_access):
    refused = chosen = 0
    table = itertools.product(
        (1, 6, 32, 100, 128, 256, 1000, 4096), (1, 2, 3, 4, 8, 64), (0, 1, 2, 3, 5, 8, 16), (1, 37, 500, 1700, 10**6)
    )
    for batch, ranks, workers, samples in table:
        possible = batch % ranks == 0 and ranks * max(workers, 1) <= samples
        if not possible:
            refused += 1
            with pytest.raises(DataError, match=f"{samples} images can't be dealt to {ranks} processes"):
                StreamPlan.choose(batch, ranks, workers, samples, random_access)
            continue
        chosen += 1
        plan = StreamPlan.choose(batch, ranks, workers, samples, random_access)
        assert batch % plan.chunks == 0
        assert plan.chunks % ranks == 0
        assert plan.chunks <= max(ranks, 64 if random_access else 16)
        assert plan.num_streams == plan.chunks * plan.groups <= samples
        for accumulate in (d for d in (1, 2, 3, 4, 8, 16) if batch // ranks % d == 0):
            items = plan.items_per_step(ranks, workers, accumulate)
            assert plan.chunks // ranks % items == 0
            assert accumulate % items == 0
            assert workers == 0 or plan.groups * items % workers == 0
        # Wherever the data is large enough, images are seen equally often, and the run may move to other grids.
        if samples >= 100 * ranks * 4 * 16:
            assert samples // plan.num_streams >= 100
            assert plan.groups % 4 == 0
    assert refused > 100
    assert chosen > 500


def test_plans_of_common_runs():
    choose = StreamPlan.choose
    assert choose(4096, 8, 8, 1_281_167, True) == StreamPlan(4096, chunks=64, groups=8)
    assert choose(4096, 8, 8, 1_281_167, False) == StreamPlan(4096, chunks=16, groups=8)
    assert choose(128, 1, 1, 1707, True) == StreamPlan(128, chunks=4, groups=4)
    assert choose(256, 2, 3, 50_000, True) == StreamPlan(256, chunks=32, groups=12)
    assert choose(64, 4, 2, 100, True) == StreamPlan(64, chunks=4, groups=2)


def test_a_grid_that_does_not_divide_the_streams_is_refused_with_those_that_do():
    plan = StreamPlan(48, chunks=8, groups=4)
    with pytest.raises(DataError, match=r"3 processes don't divide the 8 chunks .* use one of \[1, 2, 4, 8\]"):
        plan.items_per_step(3, 0, 1)
    with pytest.raises(DataError, match=r"3 workers don't divide the 4 items .* 0 or one of \[1, 2, 4\]"):
        plan.items_per_step(2, 3, 1)
    with pytest.raises(DataError, match=r"3 workers .* one of \[1, 2, 4, 8, 16\]"):
        plan.items_per_step(2, 3, 4)
    # Three micro-batches can't be cut from four chunks: the step is one item, cut up later.
    assert plan.items_per_step(2, 4, 3) == 1
    assert plan.items_per_step(2, 4, 6) == 2
    assert plan.items_per_step(1, 32, 8) == 8


# ------------------------------------------------------------------------------------------ global batches

GRIDS = list(itertools.product((1, 2, 4), (0, 1, 2, 4), (1, 2, 4)))


@pytest.mark.parametrize("block", [None, 9])
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


def test_after_a_resume_no_sample_is_decoded_again_and_at_most_a_block_a_stream_is_read_again(monkeypatch):
    rows, plan = memory_rows([61, 3, 80, 29], block=9), StreamPlan(16, chunks=4, groups=2)
    decoded = []

    def counting(image, *arguments):
        decoded.append(image.tobytes())
        return decode_image(image, *arguments)

    monkeypatch.setattr(loader_module, "decode_image", counting)
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
    monkeypatch.setattr(loader_module, "decode_image", lambda image, *_: image)
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
def test_an_evaluation_covers_each_row_once_on_any_grid_with_the_same_pixels_and_noise(worker, block):
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
