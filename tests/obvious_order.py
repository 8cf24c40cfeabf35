"""The order of samples, written down as lists: slow, and easy to check."""

import itertools

import numpy as np

from hf_mae.data.order import Rows


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


def obvious_hash(shard: int, row: int) -> float:
    """splitmix64 of a row's place, in [0, 1)."""
    key = ((shard << 40) + row + 0x9E3779B97F4A7C15) * 0xBF58476D1CE4E5B9 % 2**64
    key = (key ^ key >> 27) * 0x94D049BB133111EB % 2**64
    return (key ^ key >> 31) / 2**64
