"""RNODE's regularisers are the integrals that they are said to be, by the divergence's own noise, and cost no steps."""

import pytest
import torch

from restpoint.models.flow import FFJORD, Hutchinson
from restpoint.solvers.ode import Tsit5, solve_ode

EXACT = {"rtol": 1e-9, "atol": 1e-9}


def along(flow, x, rate):
    """The integral of rate(t, y) on the way from the data to the base, by Gauss-Legendre on the solve's own output."""
    nodes = 0.5 + 0.5 * torch.tensor([-0.9061798459, -0.5384693101, 0.0, 0.5384693101, 0.9061798459]).double()
    weights = 0.5 * torch.tensor([0.2369268851, 0.4786286705, 0.5688888889, 0.4786286705, 0.2369268851]).double()
    starts = torch.arange(4, dtype=torch.float64) / 4
    times = (starts.view(-1, 1) + nodes / 4).flatten()
    backwards = torch.cat([torch.ones(1).double(), times.flip(0)])
    y = solve_ode(flow.field, x, backwards, solver=Tsit5(), **EXACT).value[1:].flip(0)
    rates = torch.stack([rate(t, state) for t, state in zip(times, y, strict=True)])
    return (rates * (weights / 4).repeat(4).view(-1, 1)).sum(0)


@pytest.mark.parametrize("divergence", ["exact", "rademacher"])
def test_the_regularisers_are_those_of_direct_quadrature(divergence):
    flow = FFJORD(dim=3, hidden=(6,), divergence=divergence, **EXACT).double()
    x = torch.randn(2, 3, dtype=torch.float64)
    torch.manual_seed(5)
    with torch.no_grad():
        carried = flow.transport(x, energies=True)
    torch.manual_seed(5)
    # The noise of the trace is the noise of the norm: one product with the Jacobian gives both.
    noise = Hutchinson().draw(flow.field, x)[0] if divergence == "rademacher" else None

    def squares(t, y):
        jacobian = torch.func.vmap(torch.func.jacrev(lambda row: flow.field(t, row.unsqueeze(0))[0]))(y).detach()
        if noise is None:
            return jacobian.square().sum((1, 2))
        return (noise.unsqueeze(1) @ jacobian).square().sum((1, 2))

    with torch.no_grad():
        kinetic = along(flow, x, lambda t, y: flow.field(t, y).square().sum(1))
    torch.testing.assert_close(carried.kinetic, kinetic, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(carried.jacobian, along(flow, x, squares), rtol=1e-6, atol=1e-7)


def test_the_regularisers_take_no_part_in_the_choice_of_steps():
    flow = FFJORD(dim=2, hidden=(8,)).double()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.mul_(3)
    x = torch.randn(4, 2, dtype=torch.float64)
    with torch.no_grad():
        plain, loaded = flow.transport(x), flow.transport(x, energies=True)
    assert loaded.solution.stats.steps.equal(plain.solution.stats.steps)
    assert loaded.value.equal(plain.value)
    assert loaded.log_det.equal(plain.log_det)
    assert float(loaded.kinetic.min()) > 0
