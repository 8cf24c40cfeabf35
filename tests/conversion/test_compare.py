"""Two implementations' outputs are the same, or the first that differs is named."""

import pytest
import torch
from tiny import tiny_config

from hf_mae.conversion.compare import TOLERANCE, compare, compare_runs, make_probe
from hf_mae.errors import UserError

OUTPUTS = {"loss": torch.tensor(0.5), "logits": torch.tensor([[100.0, -1.0]])}


def test_the_difference_is_a_share_of_the_scale_where_that_is_above_one():
    assert compare(OUTPUTS, OUTPUTS) == 0
    assert compare(OUTPUTS, OUTPUTS | {"loss": OUTPUTS["loss"] + 5e-6}) == pytest.approx(5e-6, rel=0.05)
    assert compare(OUTPUTS, OUTPUTS | {"logits": OUTPUTS["logits"] + 5e-4}) == pytest.approx(5e-6, rel=0.05)


@pytest.mark.parametrize(
    ("got", "message"),
    [
        ({"loss": OUTPUTS["loss"]}, r"\['loss'\] instead of \['logits', 'loss'\]"),
        (OUTPUTS | {"logits": torch.zeros(2, 1)}, r"logits: shape \(2, 1\) instead of \(1, 2\)"),
        (OUTPUTS | {"loss": torch.tensor(0.6)}, r"loss: a difference of 0\.1 on a scale of 1"),
        (OUTPUTS | {"loss": torch.tensor(torch.nan)}, "loss: a difference of nan"),
        (OUTPUTS | {"logits": OUTPUTS["logits"] + 2e-3}, r"logits: a difference of 0\.002 on a scale of 100"),
    ],
)
def test_what_differs_is_named(got, message):
    with pytest.raises(ValueError, match=message):
        compare(OUTPUTS, got)


def test_two_runs_get_the_same_images_and_the_pair_is_named():
    config = tiny_config()

    def run(probe):
        return {"mean": probe.images.mean(dim=0)}

    assert torch.equal(make_probe(config).images, make_probe(config).images)
    assert compare_runs(run, run, config, "a and b") == 0
    with pytest.raises(UserError, match=rf"a and b differ by more than {TOLERANCE:g} .* in mean: .*; nothing was"):
        compare_runs(run, lambda probe: {"mean": probe.images.mean(dim=0) + 1}, config, "a and b")
