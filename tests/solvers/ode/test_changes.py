"""Tensors that are changed in place between a solve and its backward pass."""

import pytest
import torch

from restpoint.solvers import SolverError
from restpoint.solvers.ode import (
    BacksolveAdjoint,
    CheckpointAdjoint,
    InterpolatedAdjoint,
    ReversibleAdjoint,
    ReversibleHeun,
    Tsit5,
    solve_ode,
)

WAYS = [
    (Tsit5(), CheckpointAdjoint()),
    (Tsit5(), CheckpointAdjoint(segments=2)),
    (Tsit5(), BacksolveAdjoint(fallback=False)),
    (Tsit5(), InterpolatedAdjoint()),
    (ReversibleHeun(), ReversibleAdjoint()),
]


def start():
    return torch.tensor([[1.0, 2.0]], dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("given", [False, True], ids=["closed over", "args"])
@pytest.mark.parametrize("solver, adjoint", WAYS, ids=repr)
def test_a_change_raises(solver, adjoint, given):
    rate, y0 = torch.ones(1, dtype=torch.float64), start()
    field, args = (lambda t, y, c: -c * y, (rate,)) if given else (lambda t, y: -rate * y, ())
    solution = solve_ode(field, y0, [0.0, 1.0], args, solver=solver, adjoint=adjoint)
    rate.mul_(3)
    with pytest.raises(SolverError):
        torch.autograd.grad(solution.value[-1].sum(), y0)


@pytest.mark.parametrize("solver, adjoint", WAYS, ids=repr)
def test_a_change_raises_for_second_derivatives(solver, adjoint):
    rate, y0 = torch.ones(1, dtype=torch.float64), start()
    solution = solve_ode(lambda t, y: -rate * y**2, y0, [0.0, 1.0], solver=solver, adjoint=adjoint)
    rate.mul_(3)
    with pytest.raises(SolverError, match="in place"):
        torch.autograd.grad(solution.value[-1].sum(), y0, create_graph=True)


@pytest.mark.parametrize("solver, adjoint", WAYS, ids=repr)
def test_a_field_may_count_its_evaluations(solver, adjoint):
    count, y0 = torch.zeros(1), start()

    def field(t, y):
        count.add_(1)
        return -y

    solution = solve_ode(field, y0, [0.0, 1.0], solver=solver, adjoint=adjoint)
    (grad,) = torch.autograd.grad(solution.value[-1].sum(), y0)
    torch.testing.assert_close(grad, torch.full_like(grad, 1 / torch.e), rtol=1e-2, atol=0)
