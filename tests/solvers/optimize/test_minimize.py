"""minimize: methods, statuses, derivatives through stationarity, equality constraints."""

import math

import pytest
import scipy.optimize
import torch
from torch.autograd import gradcheck, gradgradcheck

from restpoint.solvers import (
    CG,
    LBFGS,
    Cholesky,
    GradientDescent,
    ImplicitAdjoint,
    NewtonCG,
    SolverError,
    StateError,
    Status,
    UnrollAdjoint,
    minimize,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")

D = torch.float64
METHODS = [LBFGS(), NewtonCG(), GradientDescent(), GradientDescent(step=0.05)]
SECOND = ImplicitAdjoint(order=2)


def data(batch=4, n=5):
    g = torch.Generator().manual_seed(1)
    return torch.randn(batch, n, generator=g, dtype=D), torch.randn(n, n, generator=g, dtype=D) / n**0.5


def energy(y, x, w):
    """Strictly convex, and not quadratic."""
    return (torch.cosh(y) - 1).sum(1) + 0.5 * (y @ w - x).square().sum(1) + 0.1 * y.pow(4).sum(1)


def rosenbrock(y):
    return (100 * (y[:, 1:] - y[:, :-1] ** 2) ** 2 + (1 - y[:, :-1]) ** 2).sum(1)


class TestMethods:
    @pytest.mark.parametrize("solver", METHODS, ids=str)
    def test_find_the_minimum(self, solver):
        x, w = data()
        solution = minimize(energy, torch.zeros_like(x), (x, w), solver=solver, rtol=1e-10, max_steps=2000)
        assert solution.converged.all()
        for i in range(len(x)):
            theirs = scipy.optimize.minimize(
                lambda y, i=i: float(energy(torch.from_numpy(y)[None], x[i : i + 1], w)), x[i] * 0, tol=1e-14
            )
            assert (solution.value[i] - torch.from_numpy(theirs.x)).abs().max() < 1e-5
            assert float(solution.energy[i]) <= theirs.fun + 1e-12

    @pytest.mark.parametrize("solver", METHODS[:3], ids=str)
    def test_follow_a_curved_valley(self, solver):
        solution = minimize(rosenbrock, torch.zeros(2, 4, dtype=D), solver=solver, rtol=1e-10, max_steps=4000)
        assert solution.converged.all()
        torch.testing.assert_close(solution.value, torch.ones(2, 4, dtype=D), rtol=0, atol=1e-7)

    @pytest.mark.parametrize("solver", METHODS, ids=str)
    def test_samples_have_nothing_to_do_with_each_other(self, solver):
        x, w = data()
        x[2] = torch.nan
        solution = minimize(energy, torch.zeros_like(x), (x, w), solver=solver, rtol=1e-9, max_steps=1000)
        assert solution.stats.status[2] == Status.NON_FINITE
        others = [0, 1, 3]
        alone = minimize(energy, torch.zeros_like(x[others]), (x[others], w), solver=solver, rtol=1e-9, max_steps=1000)
        torch.testing.assert_close(solution.value[others], alone.value, rtol=0, atol=1e-13)
        assert torch.equal(solution.stats.steps[others], alone.stats.steps)

    def test_states_of_any_structure(self):
        target = {"a": torch.randn(3, 2), "b": (torch.randn(3, 4, 1),)}
        start = {"a": torch.zeros(3, 2), "b": (torch.zeros(3, 4, 1),)}

        def distance(y, t):
            return (y["a"] - t["a"]).square().sum(1) + (y["b"][0] - t["b"][0]).square().sum((1, 2))

        solution = minimize(distance, start, (target,))
        torch.testing.assert_close(solution.value, target, rtol=1e-5, atol=1e-5)

    def test_options(self):
        for cls, name, value in ((LBFGS, "memory", 0), (GradientDescent, "step", -1.0), (NewtonCG, "inner", 0)):
            with pytest.raises(ValueError, match=f"{cls.__name__}: {name} must be"):
                cls(**{name: value})


class TestStatus:
    def test_unbounded(self):
        solution = minimize(lambda y: -y.square().sum(1), torch.ones(2, 3))
        assert (solution.stats.status == Status.UNBOUNDED).all()
        with pytest.raises(SolverError, match="has no finite optimum"):
            minimize(lambda y: -y.square().sum(1), torch.ones(2, 3), throw=True)

    def test_too_few_steps(self):
        solution = minimize(rosenbrock, torch.zeros(2, 4, dtype=D), max_steps=2)
        assert (solution.stats.status == Status.MAX_STEPS).all()
        assert (solution.stats.steps == 2).all()

    def test_no_descent(self):
        """A slope that does not belong to the energy."""
        solution = minimize(lambda y: y.abs().sum(1) - 2 * (y - y.detach()).sum(1), torch.ones(1, 1))
        assert solution.stats.status[0] == Status.STAGNATED

    def test_at_the_minimum_already(self):
        solution = minimize(lambda y: y.square().sum(1), torch.zeros(2, 3))
        assert solution.converged.all()
        assert (solution.stats.steps == 0).all()

    @pytest.mark.parametrize(
        ("function", "message"),
        [
            (lambda y: y.sum(), r"expected one number a sample, shape \(2,\), got \(\)"),
            (lambda y: y, r"got \(2, 3\)"),
            (lambda y: 1.0, "expected a tensor of shape"),
        ],
    )
    def test_an_energy_that_is_none(self, function, message):
        with pytest.raises(StateError, match=message):
            minimize(function, torch.zeros(2, 3))

    def test_a_constraint_that_is_none(self):
        with pytest.raises(StateError, match=r"equality\(y\): expected a tensor of shape \(batch, p\)"):
            minimize(lambda y: y.square().sum(1), torch.ones(2, 3), equality=lambda y: y.sum())

    def test_an_adjoint_that_would_differentiate_something_else(self):
        with pytest.raises(Exception, match="adjoint"):
            minimize(lambda y: y.square().sum(1), torch.ones(2, 3), adjoint=UnrollAdjoint())


class TestDerivatives:
    @pytest.mark.parametrize("linear", [Cholesky(), CG(rtol=1e-13)], ids=str)
    def test_first_and_second_order(self, linear):
        x, w = (t.requires_grad_() for t in data(2, 3))

        def solve(x, w):
            adjoint = ImplicitAdjoint(linear, order=2)
            solution = minimize(energy, torch.zeros_like(x), (x, w), rtol=1e-13, adjoint=adjoint)
            return solution.value, solution.energy

        assert gradcheck(solve, (x, w), fast_mode=True)
        assert gradgradcheck(solve, (x, w), fast_mode=True)

    def test_of_closures(self):
        x, w = data()
        w.requires_grad_()
        value = minimize(lambda y: energy(y, x, w), torch.zeros_like(x), rtol=1e-12).value
        assert torch.autograd.grad(value.sum(), w)[0].abs().max() > 0

    def test_large_states_by_conjugate_gradients(self):
        x, _ = data(2, 60)
        x.requires_grad_()
        solution = minimize(lambda y, x: (torch.cosh(y) - x * y).sum(1), torch.zeros_like(x), (x,), rtol=1e-12)
        (slope,) = torch.autograd.grad(solution.value.sum(), x)
        torch.testing.assert_close(solution.value, torch.asinh(x), rtol=0, atol=1e-10)
        torch.testing.assert_close(slope, 1 / (1 + x.detach() ** 2).sqrt(), rtol=1e-8, atol=1e-8)

    def test_under_transforms(self):
        x, w = data()

        def one(x):
            return minimize(energy, torch.zeros(1, 5, dtype=D), (x[None], w), rtol=1e-12).value[0]

        together = torch.func.vmap(one)(x)
        torch.testing.assert_close(together, torch.stack([one(row) for row in x]), rtol=0, atol=1e-11)
        backward, forward = torch.func.vmap(torch.func.jacrev(one))(x), torch.func.vmap(torch.func.jacfwd(one))(x)
        torch.testing.assert_close(backward, forward, rtol=0, atol=1e-9)

    def test_a_flat_minimum_has_none(self):
        x = torch.ones(1, 2, dtype=D, requires_grad=True)
        solution = minimize(lambda y, x: (y[:, 0] - x[:, 0]).square(), torch.zeros(1, 2, dtype=D), (x,))
        with pytest.raises(SolverError, match="singular"):
            solution.value.sum().backward()

    def test_a_broken_sample_does_not_reach_what_is_shared(self):
        x, w = data()
        x[1] = torch.nan
        w.requires_grad_()
        solution = minimize(lambda y, x: energy(y, x, w), torch.zeros_like(x), (x,))
        solution.value[solution.converged].sum().backward()
        assert torch.isfinite(w.grad).all()


class TestEquality:
    """Deep declarative nodes."""

    @staticmethod
    def distance(y, x, r):
        return 0.5 * (y - x).square().sum(1) + 0.1 * y.pow(4).sum(1)

    @staticmethod
    def shape(y, x, r):
        return torch.stack([y.square().sum(1) - r, y.sum(1) - 0.3], 1)

    def test_derivatives(self):
        x, r = data(1, 4)[0].requires_grad_(), torch.tensor([1.2], dtype=D, requires_grad=True)
        found = minimize(self.distance, x.detach(), (x, r), equality=self.shape, rtol=1e-12)
        assert found.converged.all()
        assert self.shape(found.value, x, r).abs().max() < 1e-12

        def solve(x, r):
            solution = minimize(
                self.distance, found.value.detach(), (x, r), equality=self.shape, rtol=1e-13, adjoint=SECOND
            )
            return solution.value, solution.multipliers, solution.energy

        assert gradcheck(solve, (x, r), fast_mode=True)
        assert gradgradcheck(solve, (x, r), fast_mode=True)

    def test_projection_onto_the_sphere(self):
        x = torch.tensor([[3.0, 4.0], [0.0, -2.0]], dtype=D, requires_grad=True)
        solution = minimize(
            lambda y, x: (y - x).square().sum(1), x, (x,), equality=lambda y, x: y.square().sum(1, keepdim=True) - 1
        )
        unit = torch.nn.functional.normalize(x, dim=1)
        torch.testing.assert_close(solution.value, unit, rtol=0, atol=1e-9)
        weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=D)
        ours, theirs = (
            torch.autograd.grad((weight * v).sum(), x, retain_graph=True)[0] for v in (solution.value, unit)
        )
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)

    def test_agrees_with_scipy(self):
        x, r = data(1, 4)[0], torch.tensor([1.3], dtype=D)
        ours = minimize(self.distance, x, (x, r), equality=self.shape)
        theirs = scipy.optimize.minimize(
            lambda y: float(self.distance(torch.from_numpy(y)[None], x, r)), x[0].numpy(),
            method="trust-constr", tol=1e-10,
            constraints=scipy.optimize.NonlinearConstraint(
                lambda y: self.shape(torch.from_numpy(y)[None], x, r)[0].numpy(), 0, 0
            ),
        )  # fmt: skip
        assert abs(float(ours.energy[0]) - theirs.fun) < 1e-6

    def test_constraints_that_repeat_each_other_have_no_multipliers(self):
        x = torch.ones(1, 2, dtype=D, requires_grad=True)
        solution = minimize(
            lambda y, x: (y - x).square().sum(1), x.detach(), (x,),
            equality=lambda y, x: torch.stack([y.sum(1) - 1, 2 * y.sum(1) - 2], 1),
        )  # fmt: skip
        assert not solution.converged.all() or math.isfinite(float(solution.value.sum()))
        with pytest.raises(SolverError):
            solution.value.sum().backward()


@pytest.mark.parametrize("constrained", [False, True])
def test_a_broken_sample_reaches_neither_the_minimum_nor_the_energy_of_others(constrained):
    scale = torch.ones(3, dtype=torch.float64, requires_grad=True)
    target = torch.linspace(-1, 2, 12, dtype=torch.float64).view(4, 3)
    target[2, 1] = torch.nan
    kept = torch.tensor([0, 1, 3])

    def gradients(target, rows):
        solution = minimize(
            lambda y, a: ((y - scale * a) ** 2 + y**4).sum(1), torch.zeros_like(target), (target,),
            equality=(lambda y, a: y.sum(1, keepdim=True) - scale[0]) if constrained else None,
        )  # fmt: skip
        assert solution.energy.isfinite().sum() == 3
        parts = solution.value[rows].sin().sum(), solution.energy[rows].sum()
        return [torch.autograd.grad(part, scale, retain_graph=True)[0] for part in parts]

    for ours, alone in zip(gradients(target, kept), gradients(target[kept], slice(None)), strict=True):
        torch.testing.assert_close(ours, alone, rtol=1e-7, atol=1e-9)
