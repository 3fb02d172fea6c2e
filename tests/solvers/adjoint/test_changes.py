"""Adjoints that compute again in the backward pass notice what was changed in place since the forward pass."""

import pytest
import torch
from torch import nn

from restpoint.solvers import CheckpointAdjoint, ReversibleAdjoint, UnrollAdjoint, fixed_point
from tests.solvers.problems import name

D = torch.float64
REPEATING = [CheckpointAdjoint(), CheckpointAdjoint(recursive=True), ReversibleAdjoint()]


class Cell(nn.Module):
    """A weight, a bias whose derivative autograd saves nothing for, and a tensor without a gradient."""

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(0.2 * torch.randn(4, 4, generator=g, dtype=D))
        self.bias = nn.Parameter(torch.randn(4, generator=g, dtype=D))
        self.frozen = nn.Parameter(torch.randn(4, generator=g, dtype=D), requires_grad=False)

    def forward(self, z, x):
        return torch.tanh(z @ self.weight + self.bias * self.frozen + x)


def run(cell, adjoint, shift, seen=None):
    x = torch.linspace(-1, 1, 12, dtype=D).reshape(3, 4).requires_grad_()

    def f(z, x):
        if seen is not None:
            seen.add_(1)
        return cell(z, x + shift)

    return fixed_point(f, torch.zeros_like(x), (x,), adjoint=adjoint, rtol=1e-8).value, x


@pytest.mark.parametrize("adjoint", REPEATING, ids=name)
@pytest.mark.parametrize("which", ["weight", "bias", "frozen", "shift", "args"])
def test_a_change_is_an_error(adjoint, which):
    cell, shift = Cell(), torch.ones(4, dtype=D)
    value, x = run(cell, adjoint, shift)
    with torch.no_grad():
        {**dict(cell.named_parameters()), "shift": shift, "args": x}[which].mul_(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        value.sum().backward()


@pytest.mark.parametrize("adjoint", [*REPEATING, UnrollAdjoint()], ids=name)
def test_what_does_not_matter_may_change(adjoint):
    """A counter of the function itself, and a parameter that it does not use."""
    cell, seen = Cell(), torch.zeros((), dtype=torch.int64)
    cell.other = nn.Parameter(torch.ones(1, dtype=D))
    value, _ = run(cell, adjoint, torch.ones(4, dtype=D), seen)
    with torch.no_grad():
        cell.other.mul_(2)
        seen.zero_()
    value.sum().backward()
    assert cell.weight.grad.abs().sum() > 0
