"""What a pretraining run is made of."""

import numpy as np
from runs import load_pretrain_recipe

from hf_mae.data.splits import open_splits
from hf_mae.training.build import open_data


def test_the_split_that_is_held_out_is_the_one_of_pretraining():
    recipe = load_pretrain_recipe(["--recipe", "quickstart"])
    data = open_data(recipe)
    rows, eval_rows, evaluated_on = open_splits("digits")
    assert np.array_equal(rows.index, data.rows.index)
    assert np.array_equal(eval_rows.index, data.eval_rows.index)
    assert evaluated_on == data.evaluated_on
