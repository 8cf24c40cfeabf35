"""Learning rates and values that change during a run, as functions of the step."""

import itertools
import math

import pytest
from golden import GOLDEN

from hf_mae.optim.schedule import lr_at, read_points, stages, value_at


def test_the_schedule_is_the_originals():
    (name,) = (key for key in GOLDEN if key.startswith("schedule"))
    assert name.startswith("schedule lr 2.4e-3, warm-up 40, 800 epochs, min 0")
    for epoch, expected in GOLDEN[name].items():
        # The figures are printed to ten places.
        assert lr_at(float(epoch), 2.4e-3, 40, 800) == pytest.approx(expected, abs=6e-11, rel=0), epoch


def test_a_schedule_by_hand():
    rates = [lr_at(step, 8.0, 4, 8, min_lr=2.0) for step in range(10)]
    half = 3 * math.cos(math.pi / 4)
    assert rates == pytest.approx([0, 2, 4, 6, 8, 5 + half, 5, 5 - half, 2, 2], abs=1e-12)
    assert lr_at(0, 1.0, 0, 10) == 1.0  # no warm-up: no step without learning
    assert lr_at(0, 1.0, 0, 0) == 1.0
    assert lr_at(5, 1.0, 10, 10) == 0.5  # the warm-up is all of the run
    assert lr_at(10**9, 1.0, 10, 100, min_lr=0.1) == pytest.approx(0.1)


@pytest.mark.parametrize(("warmup", "total", "low"), [(40, 800, 0.0), (1, 7, 1e-4), (0, 50, 0.0), (5.5, 30.25, 1e-6)])
def test_the_schedule_is_continuous_rises_then_falls(warmup, total, low):
    steps = [total * i / 5000 for i in range(5001)]
    rates = [lr_at(step, 1e-3, warmup, total, low) for step in steps]
    steepest = max(1e-3 / max(warmup, 1e-9) if warmup else 0, 1e-3 * math.pi / 2 / (total - warmup))
    assert max(abs(b - a) for a, b in itertools.pairwise(rates)) <= steepest * total / 5000 * 1.01
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert steps[peak] == pytest.approx(warmup, abs=total / 5000)
    assert rates[-1] == pytest.approx(low, abs=1e-15)


def test_the_unit_does_not_matter():
    for epoch in (0.3, 12, 40, 555.5):
        assert lr_at(epoch * 313, 2e-3, 40 * 313, 800 * 313) == pytest.approx(lr_at(epoch, 2e-3, 40, 800), rel=1e-12)


def test_a_value_holds_from_its_part_of_the_run_on():
    points = read_points(["0:7", "0.25:8", "0.5:9"], int)
    assert points == [(0.0, 7), (0.25, 8), (0.5, 9)]
    assert [value_at(stages(points, 8), step) for step in range(8)] == [7, 7, 8, 8, 9, 9, 9, 9]
    assert [value_at(stages(points, 5), step) for step in range(5)] == [7, 7, 8, 9, 9]
    assert [value_at(stages(points, 1), step) for step in range(1)] == [7]
