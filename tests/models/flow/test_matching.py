"""Flow matching regresses on the field that carries one density to the other, and its pairs are what they say."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.distributions import Normal

from restpoint.models.flow import ContinuousFlow
from restpoint.models.flow.coupling import COUPLINGS

MEAN, STD = 1.5, 0.4


class Between(nn.Module):
    """The field whose flow of straight lines in the mean carries N(0, 1) to N(MEAN, STD^2): E[x - z | y at t].

    With `offset`, `slope` and `drift` it is another one.
    """

    def __init__(self):
        super().__init__()
        self.offset, self.slope, self.drift = (nn.Parameter(torch.zeros((), dtype=torch.float64)) for _ in range(3))

    def forward(self, t, y):
        t = t.reshape(-1, 1)
        variance = (t * STD) ** 2 + (1 - t) ** 2
        found = MEAN + (t * STD**2 - (1 - t)) / variance * (y - t * MEAN)
        return found + self.offset + self.slope * y + self.drift * t


class Straight(nn.Module):
    """The field of the optimal transport from N(0, 1) to N(MEAN, STD^2)."""

    def forward(self, t, y):
        t = t.reshape(-1, 1)
        return MEAN + (STD - 1) * (y - t * MEAN) / (1 - t + t * STD)


def data(n):
    return MEAN + STD * torch.randn(n, 1, dtype=torch.float64)


def test_the_closed_field_between_two_normal_densities_has_the_second_as_its_density():
    flow = ContinuousFlow(Between(), 1, rtol=1e-9, atol=1e-9)
    x = data(6)
    torch.testing.assert_close(flow.log_prob(x), Normal(MEAN, STD).log_prob(x[:, 0]), rtol=1e-6, atol=1e-7)


def test_the_closed_field_is_what_matching_regresses_on():
    """Its loss is the variance that no field explains, pi STD / 2, and no direction makes it less."""
    flow = ContinuousFlow(Between(), 1)
    losses = flow.matching_loss(data(200_000))
    error = float(losses.detach().std()) / len(losses) ** 0.5
    assert float(losses.detach().mean()) == pytest.approx(math.pi * STD / 2, abs=4 * error)
    gradient = torch.autograd.grad(losses.mean(), list(flow.parameters()))
    assert all(abs(float(g)) < 0.02 for g in gradient)
    with torch.no_grad():
        flow.field.offset += 0.5
    assert float(flow.matching_loss(data(200_000)).mean().detach()) == pytest.approx(math.pi * STD / 2 + 0.25, abs=0.02)


def test_optimal_pairs_on_a_line_are_those_of_the_order():
    z, x = torch.randn(50, 1), torch.randn(50, 1)
    chosen = z[COUPLINGS["optimal"](z, x)]
    assert chosen[:, 0].argsort().equal(x[:, 0].argsort())
    # In large batches the pairs lie on the lines from z to MEAN + STD z, which a field follows without error.
    straight = ContinuousFlow(Straight(), 1)
    assert float(straight.matching_loss(data(300), coupling="optimal").mean()) < 0.02
    assert float(straight.matching_loss(data(300)).mean()) > 0.5


def test_optimal_pairs_are_the_best_of_all():
    z, x = torch.randn(5, 2, 3), torch.randn(5, 2, 3)
    chosen = COUPLINGS["optimal"](z, x)
    assert chosen.sort().values.equal(torch.arange(5))

    def cost(order):
        return float((z[list(order)] - x).square().sum())

    assert cost(chosen.tolist()) == pytest.approx(min(cost(p) for p in itertools.permutations(range(5))))
    assert COUPLINGS["independent"](z, x).equal(torch.arange(5))


def test_an_unknown_coupling_says_which_there_are():
    flow = ContinuousFlow(Between(), 1)
    with pytest.raises(ValueError, match="'independent', 'optimal'; got 'optimum'. Did you mean 'optimal'"):
        flow.matching_loss(data(4), coupling="optimum")
