"""Micro-batches."""

import pytest

from hf_mae.errors import UserError
from hf_mae.optim.batch import micro_batch


def test_micro_batches_hold_all_masks_of_an_image():
    assert micro_batch(96, None, 2, masks=4) == (48, 1)
    assert micro_batch(960, None, 1, masks=10) == (60, 16)
    assert micro_batch(640, None, 1, masks=128) == (128, 5)
    with pytest.raises(
        UserError, match=r"can't be split evenly over 5 processes; use \[1, 2, 3, 4\] .* multiple of 20 images"
    ):
        micro_batch(96, None, 5, masks=4)
