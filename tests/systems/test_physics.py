"""Differentiable physics: constants of nature recovered from observed trajectories, through the solver."""

import math

import pytest
import torch

from restpoint.solvers import Dopri8, Tsit5, minimize
from restpoint.solvers.ode import CheckpointAdjoint, ConstantController, ReversibleAdjoint, Yoshida4, solve_ode

TIMES = torch.linspace(0, 3, 11, dtype=torch.float64)
TIGHT = {"solver": Dopri8(), "rtol": 1e-9, "atol": 1e-10}


def spring(t, state, stiffness, damping):
    """A unit mass on a damped spring."""
    x, v = state.unbind(1)
    return torch.stack([v, -stiffness * x - damping * v], dim=1)


def swing(t, state, length):
    """A pendulum in the gravity of the earth."""
    angle, speed = state.unbind(1)
    return torch.stack([speed, -9.81 / length * angle.sin()], dim=1)


def exact_spring(stiffness, damping):
    """From x = 1 at rest."""
    rate = math.sqrt(stiffness - damping**2 / 4)
    return torch.exp(-damping / 2 * TIMES) * (torch.cos(rate * TIMES) + damping / (2 * rate) * torch.sin(rate * TIMES))


def fitted(simulate, guess, observed, steps=6):
    """Least squares by Gauss-Newton steps; the adjoint gives the Jacobian, an observation at a time."""
    value = guess
    for _ in range(steps):
        value = value.detach().requires_grad_()
        predicted = simulate(value)
        rows = [torch.autograd.grad(p, value, retain_graph=True)[0] for p in predicted]
        value = (
            value + torch.linalg.lstsq(torch.stack(rows), (observed - predicted.detach()).unsqueeze(1)).solution[:, 0]
        )
    return value.detach()


def test_the_stiffness_and_damping_of_a_spring():
    def simulate(constants):
        start = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
        return solve_ode(lambda t, y: spring(t, y, *constants), start, TIMES, **TIGHT).value[:, 0, 0]

    observed = exact_spring(7.3, 0.4)
    found = fitted(simulate, torch.tensor([6.0, 0.1], dtype=torch.float64), observed)
    torch.testing.assert_close(found, torch.tensor([7.3, 0.4], dtype=torch.float64), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("adjoint", [CheckpointAdjoint(), ReversibleAdjoint()], ids=["checkpoint", "reversible"])
def test_the_length_of_a_pendulum_from_noisy_angles(adjoint):
    start = torch.tensor([[1.2, 0.0], [0.4, 1.0], [2.5, 0.0]], dtype=torch.float64)
    truth = solve_ode(lambda t, y: swing(t, y, 0.83), start, TIMES, **TIGHT).value[..., 0]
    noise = 0.01 * torch.randn(truth.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    reversible = isinstance(adjoint, ReversibleAdjoint)

    def simulate(length):
        if not reversible:
            return (
                solve_ode(
                    lambda t, y: swing(t, y, length),
                    start,
                    TIMES,
                    solver=Tsit5(),
                    rtol=1e-6,
                    atol=1e-7,
                    adjoint=adjoint,
                )
                .value[5::5, :, 0]
                .flatten()
            )
        field = lambda t, y: (y[1], -9.81 / length * y[0].sin())  # noqa: E731
        state = solve_ode(
            field, (start[:, :1], start[:, 1:]), TIMES, solver=Yoshida4(), controller=ConstantController(dt=0.05),
            adjoint=adjoint,
        ).value  # fmt: skip
        return state[0][5::5, :, 0].flatten()

    found = fitted(simulate, torch.tensor([0.9], dtype=torch.float64), (truth + noise)[5::5].flatten(), steps=4)
    assert abs(float(found) - 0.83) < 5e-3


def test_a_gradient_through_the_simulation_equals_a_difference():
    def final(stiffness):
        start = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
        return solve_ode(lambda t, y: spring(t, y, stiffness, 0.2), start, TIMES, **TIGHT).value[-1, 0, 0]

    stiffness = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(final(stiffness), stiffness)
    with torch.no_grad():
        difference = (final(stiffness + 1e-5) - final(stiffness - 1e-5)) / 2e-5
    torch.testing.assert_close(gradient, difference, rtol=1e-6, atol=1e-8)


def test_a_hanging_chain_at_rest_tells_its_springs():
    """Equilibrium instead of motion: the shape that minimises the energy, differentiated through its stationarity."""
    weights = torch.tensor([[1.0, 2.0, 0.5]], dtype=torch.float64)
    stiffness = torch.tensor([[3.0, 5.0, 4.0]], dtype=torch.float64, requires_grad=True)

    def energy(y, k, w):
        stretch = torch.diff(y, dim=1, prepend=torch.zeros_like(y[:, :1]))
        return (k * stretch.square() / 2 - w * y).sum(1)

    shape = minimize(energy, torch.zeros(1, 3, dtype=torch.float64), (stiffness, weights)).value
    load = weights.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(shape, (load / stiffness).cumsum(1), rtol=1e-6, atol=1e-6)
    (gradient,) = torch.autograd.grad(shape[0, 2], stiffness)
    torch.testing.assert_close(gradient, -(load / stiffness.square()).detach(), rtol=1e-6, atol=1e-6)
