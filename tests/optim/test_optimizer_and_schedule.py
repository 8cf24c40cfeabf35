import itertools
import math

import pytest
import torch
from golden import GOLDEN
from tiny import draw_noise, pixels, tiny
from torch import nn

from hf_mae import MAEForPreTraining
from hf_mae.optim.groups import adamw, parameter_groups
from hf_mae.optim.lars import LARS
from hf_mae.optim.schedule import lr_at

# ------------------------------------------------------------------------------------------ schedule


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


# ------------------------------------------------------------------------------------------ optimizer


def test_all_but_one_dimensional_parameters_are_decayed_tokens_among_them():
    model = MAEForPreTraining(tiny(MAEForPreTraining).config)
    groups = parameter_groups(model, 0.05)
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0]
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed, spared = ([name_of[id(parameter)] for parameter in group["params"]] for group in groups)
    assert sorted(decayed + spared) == sorted(name_of.values())
    # By name, the other way round: weights of linear layers and of the patch projection, and the two tokens.
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}
    assert set(decayed) == linear | {"mae.embeddings.cls_token", "decoder.mask_token"}
    assert all(name.endswith(".bias") or "norm" in name for name in spared)
    assert any("norm" in name and name.endswith(".weight") for name in spared)


def test_frozen_parameters_are_left_out_and_so_is_an_empty_group():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1, bias=False))
    model[0].weight.requires_grad_(False)
    groups = parameter_groups(model, 0.1)
    assert [[p.shape for p in group["params"]] for group in groups] == [[(1, 3)], [(3,)]]
    model[0].bias.requires_grad_(False)
    (group,) = parameter_groups(model, 0.1)
    assert group["weight_decay"] == 0.1


def test_trainable_positions_are_decayed_and_fixed_ones_are_not_trained():
    for trainable in (False, True):
        model = tiny(MAEForPreTraining, trainable_positions=trainable)
        tables = [p for name, p in model.named_parameters() if "position" in name and p.requires_grad]
        decayed = {id(p) for p in parameter_groups(model, 0.05)[0]["params"]}
        assert len(tables) == trainable
        assert all(id(table) in decayed for table in tables)


def test_steps_of_the_optimizer_are_adamws_formula():
    model = tiny(MAEForPreTraining)
    optimizer = adamw(model, (0.9, 0.95), 0.05)
    assert all(group["betas"] == (0.9, 0.95) for group in optimizer.param_groups)
    by_hand = {name: p.detach().double() for name, p in model.named_parameters() if p.requires_grad}
    before = {name: value.clone() for name, value in by_hand.items()}
    first = {name: torch.zeros_like(value) for name, value in by_hand.items()}
    second = {name: torch.zeros_like(value) for name, value in by_hand.items()}
    for step, lr in enumerate((1e-2, 3e-2, 2e-2), start=1):
        for group in optimizer.param_groups:
            group["lr"] = lr
        model(pixels(seed=step), noise=draw_noise()).loss.backward()
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            gradient = parameter.grad.double()
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.95 * second[name] + 0.05 * gradient**2
            update = first[name] / (1 - 0.9**step) / ((second[name] / (1 - 0.95**step)).sqrt() + 1e-8)
            decay = 0.05 if parameter.ndim > 1 else 0.0
            by_hand[name] = by_hand[name] * (1 - lr * decay) - lr * update
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.allclose(parameter.double(), by_hand[name], atol=2e-6, rtol=1e-5), name
            assert (by_hand[name] - before[name]).abs().max() > 1e-2, name


def test_a_learning_rate_that_nobody_set_changes_nothing():
    model = tiny(MAEForPreTraining)
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = adamw(model, (0.9, 0.95), 0.05)
    model(pixels(), noise=draw_noise()).loss.backward()
    optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


# ------------------------------------------------------------------------------------------ LARS


def test_two_steps_of_lars_by_hand():
    weight, bias = nn.Parameter(torch.tensor([[3.0, 0.0], [0.0, 4.0]])), nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = LARS([weight, bias], lr=2.0, momentum=0.9, trust_coefficient=0.1)
    weight.grad, bias.grad = torch.tensor([[0.0, 6.0], [8.0, 0.0]]), torch.tensor([0.5, -1.0])
    optimizer.step()
    # |weight| = 5, |gradient| = 10: scaled by 0.1 * 5 / 10 = 0.05. The bias takes its gradient as it is.
    torch.testing.assert_close(weight.detach(), torch.tensor([[3.0, -0.6], [-0.8, 4.0]]))
    torch.testing.assert_close(bias.detach(), torch.tensor([0.0, 4.0]))
    weight.grad, bias.grad = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.zeros(2)
    optimizer.step()
    # |weight| = sqrt(9 + 0.36 + 0.64 + 16) = sqrt(26), |gradient| = 1.
    first, buffer = 0.1 * 26**0.5, torch.tensor([[0.0, 0.3], [0.4, 0.0]]) * 0.9
    expected = torch.tensor([[3.0, -0.6], [-0.8, 4.0]]) - 2 * (buffer + torch.tensor([[first, 0.0], [0.0, 0.0]]))
    torch.testing.assert_close(weight.detach(), expected)
    torch.testing.assert_close(bias.detach(), torch.tensor([0.0, 4.0]) - 2 * 0.9 * torch.tensor([0.5, -1.0]))


def test_lars_decays_weights_before_it_scales_and_never_biases():
    weight, bias = nn.Parameter(torch.tensor([[3.0, 4.0]])), nn.Parameter(torch.tensor([5.0]))
    weight.grad, bias.grad = torch.tensor([[1.0, 0.0]]), torch.tensor([0.0])
    LARS([weight, bias], lr=1.0, weight_decay=0.5, trust_coefficient=0.01).step()
    update = torch.tensor([[2.5, 2.0]])
    torch.testing.assert_close(weight.detach(), torch.tensor([[3.0, 4.0]]) - update * 0.01 * 5 / update.norm())
    assert bias.item() == 5.0


@pytest.mark.parametrize(("value", "gradient"), [(0.0, 2.0), (3.0, 0.0)])
def test_lars_leaves_an_update_as_it_is_where_there_is_nothing_to_scale_by(value, gradient):
    weight = nn.Parameter(torch.full((1, 2), value))
    weight.grad = torch.full((1, 2), gradient)
    LARS([weight], lr=0.5).step()
    assert (weight == value - 0.5 * gradient).all()


def test_lars_leaves_what_has_no_gradient_and_a_missing_trust_ratio_is_plain_momentum():
    idle, bias = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = LARS([idle, bias], lr=0.1, momentum=0.9)
    twin = nn.Parameter(bias.detach().clone())
    plain = torch.optim.SGD([twin], lr=0.1, momentum=0.9)
    for step in range(4):
        bias.grad = torch.tensor([1.0, -2.0]) * step
        twin.grad = bias.grad.clone()
        optimizer.step()
        plain.step()
        torch.testing.assert_close(bias, twin)
    assert (idle == 1).all()
