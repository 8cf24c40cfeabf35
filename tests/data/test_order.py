import itertools

import numpy as np
import pytest
from memory_source import memory_rows
from obvious_order import obvious_hash, obvious_order, obvious_stream

from hf_mae.data.order import EpochOrder, LogicalStream, StreamPlan, held_out
from hf_mae.errors import DataError

# Shards fewer than the streams, as many, and more; with and without blocks; none of the sizes divides another.
SIZES = {"one shard": [173], "uneven shards": [40, 1, 75, 0, 22, 35], "many small shards": [3, 5, 2, 7, 1] * 8}


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


def test_at_least_one_of_a_few_rows_is_held_out():
    never = 1e-12  # a fraction for which the hash chooses no row
    train, out = (memory_rows([3, 1], part=part, held_out_fraction=never) for part in ("train", "held_out"))
    assert (train.index.tolist(), out.index.tolist()) == ([0, 1, 2], [3])


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
    with pytest.raises(DataError, match="of memory has 3 rows, too few to train on some and evaluate on others"):
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


def test_a_block_is_read_once_an_epoch_by_each_stream_with_a_part_of_it():
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
            with pytest.raises(DataError, match=f"{samples} images can't be split among {ranks} processes"):
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
