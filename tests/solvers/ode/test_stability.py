"""Steps as long as stability allows, and no longer: beyond, the derivative of the steps grows without bound."""

import pytest
import torch

from restpoint.solvers.ode import (
    RK4,
    Bosh3,
    CheckpointAdjoint,
    Dopri5,
    Dopri8,
    Euler,
    Heun,
    IController,
    Midpoint,
    PIDController,
    Tsit5,
    solve_ode,
)

F64 = torch.float64
MU = torch.tensor([[5.0], [37.0]], dtype=F64)


def van_der_pol(t, y, mu):
    return torch.stack([y[:, 1], mu[:, 0] * (1 - y[:, 0] ** 2) * y[:, 1] - y[:, 0]], 1)


REACHES = [(Euler(), 2.0), (Midpoint(), 2.0), (Heun(), 2.0), (Bosh3(), 2.51), (RK4(), 2.785), (Dopri5(), 3.307)]


@pytest.mark.parametrize("solver, reach", REACHES)
def test_intervals_of_stability(solver, reach):
    """Hairer, Wanner 1996, section IV.2."""
    assert solver.tableau.reach == pytest.approx(reach, abs=5e-3)


def gradients(solver, control, adjoint, tolerance):
    y0 = torch.tensor([[2.0, 0.0], [2.0, 0.0]], dtype=F64, requires_grad=True)
    mu = MU.clone().requires_grad_()
    options = {"controller": control, "adjoint": adjoint, "rtol": tolerance, "atol": tolerance}
    solution = solve_ode(van_der_pol, y0, (0.0, 12.0), (mu,), solver=solver, **options)
    return solution.stats, torch.autograd.grad(solution.value[-1, :, 0].sum(), [y0, mu])


@pytest.fixture(scope="module")
def expected():
    return gradients(Dopri8(), PIDController(per_sample=True, max_step=0.01), CheckpointAdjoint(), 1e-9)[1]


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("controller", [PIDController, IController])
@pytest.mark.parametrize("solver", [Dopri5(), Tsit5(), Dopri8(), Bosh3()], ids=repr)
def test_gradients_of_a_rather_stiff_problem(solver, controller, per_sample, expected):
    """Hundreds of steps at the limit of stability."""
    stats, found = gradients(solver, controller(per_sample=per_sample), CheckpointAdjoint(), 1e-6)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-4)
    if per_sample:
        # Hardly a step of the stiff one is rejected, though stability is all that bounds it.
        assert int(stats.accepted[1]) > 100
        assert int(stats.rejected[1]) < 0.05 * int(stats.accepted[1])


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("controller", [PIDController, IController])
def test_heun_needs_no_bound(controller, per_sample, expected):
    """Nor does Bosh3 above: neither has two stages at one time, by which steps are bounded."""
    assert Heun().tableau.twins is None
    assert Bosh3().tableau.twins is None
    _, found = gradients(Heun(), controller(per_sample=per_sample), CheckpointAdjoint(), 1e-4)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3)


def test_inside_torch_func(expected):
    """The same steps, and so the same gradient."""

    def loss(mu):
        y0 = torch.tensor([[2.0, 0.0], [2.0, 0.0]], dtype=F64)
        return solve_ode(van_der_pol, y0, (0.0, 12.0), (mu,), rtol=1e-6, atol=1e-6).value[-1, :, 0].sum()

    torch.testing.assert_close(torch.func.grad(loss)(MU), expected[1], rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize(
    "field, y0, end",
    [
        (lambda t, y: torch.stack([y[:, 1], -y[:, 0]], 1), [[1.0, 0.0]], 10.0),
        # At rest but for rounding.
        (lambda t, y: -1e-6 * (3 * y - 1 - 2 * y * y.reciprocal()), [[1.0 + 1e-13, 1.0 - 1e-13]], 1e5),
    ],
)
def test_problems_that_are_not_stiff_are_left_alone(field, y0, end, per_sample, monkeypatch):
    def steps():
        control = PIDController(per_sample=per_sample)
        return int(solve_ode(field, torch.tensor(y0, dtype=F64), (0.0, end), controller=control).stats.steps[0])

    found = steps()
    monkeypatch.setattr(Tsit5, "strain", lambda self, h, step: None)
    assert found == steps()
