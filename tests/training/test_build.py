"""What a pretraining run is made of."""

import numpy as np
import pytest
from runs import load_pretrain_recipe

from hf_mae import PretrainRecipe, model_config_of
from hf_mae.data.sources import open_splits
from hf_mae.errors import UserError
from hf_mae.keys.data_keys import SplitKeys
from hf_mae.training.build import open_data


def test_the_split_that_is_held_out_is_the_one_of_pretraining():
    recipe = load_pretrain_recipe(["--recipe", "quickstart"])
    data = open_data(recipe)
    rows, eval_rows, evaluated_on = open_splits(SplitKeys(dataset="digits"))
    assert np.array_equal(rows.index, data.rows.index)
    assert np.array_equal(eval_rows.index, data.eval_rows.index)
    assert evaluated_on == data.evaluated_on


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"hidden_size": 30}, "hidden_size 30 must be a multiple of num_attention_heads 12"),
        ({"hidden_size": "wide"}, "hidden_size"),
    ],
    ids=["a value that doesn't fit", "a value of another type"],
)
def test_model_keys_that_make_no_model_are_one_line(keys, message):
    with pytest.raises(UserError, match=message) as raised:
        model_config_of(PretrainRecipe(**keys), 3)
    assert "\n" not in str(raised.value)
