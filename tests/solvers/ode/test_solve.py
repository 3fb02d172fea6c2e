"""solve_ode against closed forms, and its adjoints against each other."""

import pytest
import torch

from restpoint.solvers.ode import (
    RK4,
    Bosh3,
    CheckpointAdjoint,
    ConstantController,
    DirectAdjoint,
    Dopri5,
    Euler,
    Heun,
    Midpoint,
    Ralston,
    Tsit5,
    solve_ode,
)

ADAPTIVE = [Heun(), Bosh3(), Dopri5(), Tsit5()]
FIXED = [Euler(), Midpoint(), Ralston(), RK4()]


@pytest.mark.parametrize("solver", ADAPTIVE, ids=repr)
@pytest.mark.parametrize("end", [1.5, -1.5])
def test_linear_system(solver, end):
    matrix = torch.tensor([[-0.5, 2.0], [-2.0, -0.3]], dtype=torch.float64)
    y0 = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = torch.linspace(0, end, 7, dtype=torch.float64)
    solution = solve_ode(lambda t, y: y @ matrix, y0, t, solver=solver, rtol=1e-6, atol=1e-8)
    exact = torch.stack([y0 @ torch.matrix_exp(matrix * x) for x in t])
    torch.testing.assert_close(solution.value, exact, rtol=1e-4, atol=1e-4)
    assert solution.converged.all()


@pytest.mark.parametrize("solver", ADAPTIVE + FIXED, ids=repr)
def test_checkpointed_equals_taped(solver):
    weight = torch.randn(2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    scale = torch.rand(3, 1, dtype=torch.float64).requires_grad_()
    y0 = torch.ones(3, 2, dtype=torch.float64).requires_grad_()
    t = torch.linspace(0, 1, 5, dtype=torch.float64).requires_grad_()
    knobs = {"controller": ConstantController(dt=0.07)} if solver.error_order is None else {"rtol": 1e-4}
    gradients = []
    for adjoint in (DirectAdjoint(), CheckpointAdjoint(), CheckpointAdjoint(recursive=True), CheckpointAdjoint(3)):
        solution = solve_ode(
            lambda t, y, s: torch.tanh(y @ weight) * s + torch.sin(t),
            y0,
            t,
            (scale,),
            solver=solver,
            adjoint=adjoint,
            **knobs,
        )
        loss = (solution.value**3).sum()
        gradients.append(torch.autograd.grad(loss, [weight, scale, y0, t]))
    for other in gradients[1:]:
        for got, expected in zip(other, gradients[0]):
            torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
