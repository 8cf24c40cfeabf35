"""LARS by hand."""

import pytest
import torch
from torch import nn

from hf_mae.optim.lars import LARS


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


def test_lars_skips_parameters_without_a_gradient_and_biases_get_plain_momentum():
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
