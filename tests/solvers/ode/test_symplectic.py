"""The symplectic methods: their orders, what they conserve, and the states they take."""

import itertools
import math

import pytest
import torch

from restpoint.solvers.ode import (
    RK4,
    CheckpointAdjoint,
    ConstantController,
    DirectAdjoint,
    Dopri8,
    Leapfrog,
    ReversibleAdjoint,
    SemiImplicitEuler,
    Yoshida4,
    solve_ode,
)
from restpoint.solvers.tree import StateError

METHODS = [SemiImplicitEuler(), Leapfrog(), Yoshida4()]
F64 = torch.float64


def driven(t, state):
    q, p = state
    return p * (1 + 0.2 * torch.sin(t)), -torch.sin(q) + 0.3 * torch.cos(2 * t)


def kepler(t, state):
    q, p = state
    return p, -q / q.norm(dim=1, keepdim=True) ** 3


def orbit():
    """Eccentricity 0.3, energy -1/2: a period of 2 pi."""
    q = torch.tensor([[0.7, 0.0]], dtype=F64)
    p = torch.tensor([[0.0, math.sqrt(1.3 / 0.7)]], dtype=F64)
    return q, p


def energies(solver, dt, periods=10):
    t = torch.linspace(0, 2 * math.pi * periods, 40 * periods + 1, dtype=F64)
    with torch.no_grad():
        q, p = solve_ode(kepler, orbit(), t, solver=solver, controller=ConstantController(dt=dt)).value
    return (0.5 * (p**2).sum(-1) - 1 / q.norm(dim=-1)).squeeze(1)


@pytest.mark.parametrize("solver", METHODS, ids=repr)
@pytest.mark.parametrize("end", [2.0, -2.0])
def test_observed_order(solver, end):
    state = (torch.tensor([[1.0]], dtype=F64), torch.tensor([[0.5]], dtype=F64))
    exact = torch.cat(solve_ode(driven, state, (0.0, end), solver=Dopri8(), rtol=1e-12, atol=1e-12).value, -1)[-1]
    errors = []
    for dt in (0.1, 0.05, 0.025):
        found = solve_ode(driven, state, (0.0, end), solver=solver, controller=ConstantController(dt=dt))
        errors.append(float((torch.cat(found.value, -1)[-1] - exact).norm()))
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(solver.order, abs=0.35)


@pytest.mark.parametrize(
    "solver, wobble", [(SemiImplicitEuler(), 5e-2), (Leapfrog(), 5e-3), (Yoshida4(), 3e-4)], ids=str
)
def test_energy_does_not_drift(solver, wobble):
    error = (energies(solver, dt=0.12) + 0.5).abs()
    early, late = error[: 3 * 40].max(), error[-3 * 40 :].max()
    assert float(error.max()) < wobble
    assert float(late) < 1.1 * float(early)


def test_energy_of_a_method_that_is_not_symplectic_does():
    error = (energies(RK4(), dt=0.2) + 0.5).abs()
    assert float(error[-3 * 40 :].max()) > 2 * float(error[: 3 * 40].max())


@pytest.mark.parametrize("solver", METHODS, ids=repr)
def test_preserves_volume(solver):
    """The flow's derivative J satisfies J^T Omega J = Omega."""

    def flow(x):
        state = (x[:1].reshape(1, 1), x[1:].reshape(1, 1))
        found = solve_ode(
            driven, state, (0.0, 1.0), solver=solver, controller=ConstantController(dt=0.25), adjoint=DirectAdjoint()
        )
        return torch.cat([part[-1, 0] for part in found.value])

    jacobian = torch.autograd.functional.jacobian(flow, torch.tensor([0.4, -0.8], dtype=F64))
    omega = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=F64)
    torch.testing.assert_close(jacobian.T @ omega @ jacobian, omega, rtol=0, atol=1e-14)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("solver", METHODS, ids=repr)
def test_gradients(solver, per_sample):
    q = torch.tensor([[0.3], [1.0]], dtype=F64, requires_grad=True)
    p = torch.tensor([[-0.2], [0.5]], dtype=F64, requires_grad=True)
    k = torch.tensor(1.3, dtype=F64, requires_grad=True)
    t = torch.linspace(0, 1, 4, dtype=F64, requires_grad=True)
    gradients = []
    for adjoint in (DirectAdjoint(), CheckpointAdjoint(), ReversibleAdjoint()):
        solution = solve_ode(
            lambda t, s: {"p": -k * torch.sin(s["q"]) + torch.cos(t).reshape(-1, 1), "q": s["p"]},
            {"p": p, "q": q},
            t,
            solver=solver,
            controller=ConstantController(dt=0.11, per_sample=per_sample),
            adjoint=adjoint,
        )
        loss = (solution.value["q"] ** 3).sum() + (solution.value["p"] ** 2).sum()
        gradients.append(torch.autograd.grad(loss, [q, p, k, t]))
    for other in gradients[1:]:
        for got, expected in zip(other, gradients[0]):
            torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


class TestStates:
    def test_dict_in_either_order(self):
        q, p = orbit()
        controller = ConstantController(dt=0.1)

        def field(t, s):
            velocity, force = kepler(t, (s["q"], s["p"]))
            return {key: {"q": velocity, "p": force}[key] for key in s}

        expected = solve_ode(kepler, (q, p), (0.0, 1.0), solver=Leapfrog(), controller=controller).value
        for state in ({"q": q, "p": p}, {"p": p, "q": q}):
            found = solve_ode(field, state, (0.0, 1.0), solver=Leapfrog(), controller=controller).value
            torch.testing.assert_close(found["q"], expected[0], rtol=0, atol=0)
            torch.testing.assert_close(found["p"], expected[1], rtol=0, atol=0)

    def test_nested_pair(self):
        q = (torch.ones(2, 1, dtype=F64), torch.ones(2, 3, dtype=F64))
        p = (torch.zeros(2, 1, dtype=F64), torch.zeros(2, 3, dtype=F64))
        found = solve_ode(
            lambda t, s: (s[1], tuple(-x for x in s[0])),
            (q, p),
            (0.0, 2.0),
            solver=Yoshida4(),
            controller=ConstantController(dt=0.05),
        ).value
        for part in (*found[0], *(-x for x in found[1])):
            assert part.shape[:2] == (2, 2)
        torch.testing.assert_close(found[0][1][-1], torch.full((2, 3), math.cos(2), dtype=F64), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize(
        "state",
        [
            torch.ones(1, 4),
            (torch.ones(1, 2),),
            (torch.ones(1, 2), torch.ones(1, 2), torch.ones(1, 2)),
            {"x": torch.ones(1, 2), "v": torch.ones(1, 2)},
        ],
        ids=["tensor", "one", "three", "keys"],
    )
    def test_no_pair(self, state):
        with pytest.raises(StateError, match="Leapfrog: expected a state of positions and momenta"):
            solve_ode(lambda t, s: s, state, (0.0, 1.0), solver=Leapfrog(), controller=ConstantController(dt=0.1))

    @pytest.mark.parametrize(
        "field, message",
        [
            (lambda t, s: (s[1], -s[0] - 0.1 * s[1]), "dp/dt depends on p"),
            (lambda t, s: (s[1] + s[0], -s[0]), "dq/dt depends on q"),
        ],
    )
    def test_not_separable(self, field, message):
        state = (torch.ones(1, 2, dtype=F64), torch.ones(1, 2, dtype=F64))
        with pytest.raises(ValueError, match=message):
            solve_ode(field, state, (0.0, 1.0), solver=Leapfrog(), controller=ConstantController(dt=0.1))

    def test_needs_steps_of_one_length(self):
        with pytest.raises(ValueError, match="ConstantController"):
            solve_ode(kepler, orbit(), (0.0, 1.0), solver=Leapfrog())
