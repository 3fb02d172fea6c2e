"""Derivatives of implicit methods: of their exact stages, to second order, and where they must refuse."""

import pytest
import torch

from restpoint.solvers import SolverError
from restpoint.solvers.ode import (
    CheckpointAdjoint,
    ConstantController,
    DirectAdjoint,
    ImplicitEuler,
    Kvaerno3,
    Kvaerno5,
    PIDController,
    StageNewton,
    solve_ode,
)

F64 = torch.float64
WEIGHT = torch.tensor([[0.4, -0.7, 0.2], [0.1, 0.5, -0.3], [-0.6, 0.2, 0.3]], dtype=F64)
RATES = torch.tensor([20.0, 2.0, 0.2], dtype=F64)
# Forward-mode differentiation makes torch load decompositions that warn on their own account.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")


def field(t, y, scale):
    return torch.tanh(y @ WEIGHT.T) * scale - RATES * y + torch.sin(3 * t).reshape(-1, 1)


def exact(method, **knobs):
    """Stage equations solved so closely that finite differences do not feel it."""
    return method(newton=StageNewton(kappa=1e-7, **knobs))


def inputs(requires_grad=True):
    y0 = torch.tensor([[0.3, -1.0, 0.6], [1.1, 0.2, -0.4]], dtype=F64)
    scale = torch.tensor([[0.8], [0.3]], dtype=F64)
    return [x.requires_grad_(requires_grad) for x in (y0, scale)]


def end(y0, scale, solver=None, **knobs):
    controller = ConstantController(dt=0.21)
    solver = solver or exact(Kvaerno3)
    return solve_ode(field, y0, (0.0, 0.4), (scale,), solver=solver, controller=controller, **knobs).value[-1]


@pytest.mark.parametrize("adjoint", [DirectAdjoint(), CheckpointAdjoint()], ids=repr)
@pytest.mark.parametrize("method, per_sample", [(ImplicitEuler, False), (Kvaerno3, True), (Kvaerno5, False)], ids=str)
def test_gradcheck(method, per_sample, adjoint):
    t = torch.tensor([0.0, 0.15, 0.4], dtype=F64, requires_grad=True)

    def solve(y0, scale, t):
        return solve_ode(
            field,
            y0,
            t,
            (scale,),
            solver=exact(method),
            controller=ConstantController(dt=0.21, per_sample=per_sample),
            adjoint=adjoint,
        ).value[1:]

    assert torch.autograd.gradcheck(solve, (*inputs(), t), eps=1e-5, atol=1e-6, fast_mode=True)
    assert torch.autograd.gradgradcheck(solve, (*inputs(), t), eps=1e-5, atol=1e-5, fast_mode=True)


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("method", [ImplicitEuler, Kvaerno3, Kvaerno5])
def test_adjoints_agree(method, per_sample):
    weight = WEIGHT.clone().requires_grad_()
    y0, scale = inputs()
    t = torch.linspace(0, 0.5, 4, dtype=F64, requires_grad=True)
    gradients = []
    for adjoint in (DirectAdjoint(), CheckpointAdjoint(), CheckpointAdjoint(recursive=True)):
        solution = solve_ode(
            lambda t, y, s: torch.tanh(y @ weight.T) * s - RATES * y + torch.sin(3 * t).reshape(-1, 1),
            y0,
            t,
            (scale,),
            solver=method(),
            controller=PIDController(per_sample=per_sample),
            adjoint=adjoint,
            rtol=1e-2,
            atol=1e-3,
        )
        gradients.append(torch.autograd.grad((solution.value**3).sum(), [weight, y0, scale, t]))
    for other in gradients[1:]:
        for got, expected in zip(other, gradients[0]):
            torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


def test_krylov_agrees_with_dense():
    y0, scale = inputs()
    gradients = []
    for solver in (exact(Kvaerno3), exact(Kvaerno3, dense_size=0)):
        for adjoint in (DirectAdjoint(), CheckpointAdjoint()):
            loss = (end(y0, scale, solver, adjoint=adjoint) ** 2).sum()
            gradients.append(torch.autograd.grad(loss, (y0, scale)))
    for other in gradients[1:]:
        for got, expected in zip(other, gradients[0]):
            torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-8)


def test_second_derivatives_through_krylov():
    def solve(y0, scale):
        return end(y0, scale, exact(Kvaerno3, dense_size=0))

    assert torch.autograd.gradgradcheck(solve, inputs(), eps=1e-5, atol=1e-5, fast_mode=True)


class TestTransforms:
    def test_first_derivatives(self):
        y0, scale = inputs(requires_grad=False)
        expected = torch.autograd.functional.jacobian(lambda s: end(y0, s), scale)
        for transform in (torch.func.jacrev, torch.func.jacfwd):
            torch.testing.assert_close(transform(lambda s: end(y0, s))(scale), expected, rtol=1e-7, atol=1e-9)

    def test_hessian(self):
        y0, scale = inputs(requires_grad=False)

        def loss(scale):
            return (end(y0, scale, exact(ImplicitEuler)) ** 3).sum()

        expected = torch.autograd.functional.hessian(loss, scale)
        torch.testing.assert_close(torch.func.hessian(loss)(scale), expected, rtol=1e-7, atol=1e-9)

    def test_vmap(self):
        y0, scale = inputs(requires_grad=False)
        found = torch.func.vmap(lambda y, s: end(y[None], s[None])[0])(y0, scale)
        torch.testing.assert_close(found, end(y0, scale), rtol=1e-9, atol=1e-9)


class TestStiff:
    def test_robertson(self):
        rates = torch.tensor([0.04, 1e4, 3e7], dtype=F64)

        def final(factors):
            k1, k2, k3 = rates * factors

            def robertson(t, y):
                a, b, c = y.unbind(-1)
                return torch.stack([-k1 * a + k2 * b * c, k1 * a - k2 * b * c - k3 * b * b, k3 * b * b], -1)

            y0 = torch.tensor([[1.0, 0.0, 0.0]], dtype=F64)
            return solve_ode(robertson, y0, (0.0, 1e5), solver=Kvaerno5(), rtol=1e-7, atol=1e-10).value[-1, 0]

        factors = torch.ones(3, dtype=F64, requires_grad=True)
        end = final(factors)
        (gradient,) = torch.autograd.grad(end[2], factors)
        # Faster rates are the same as a longer time: the derivatives by the logarithms of the rates add up to t dc/dt.
        torch.testing.assert_close(gradient.sum(), 1e5 * rates[2] * end[1].detach() ** 2, rtol=1e-5, atol=0)
        with torch.no_grad():
            nudge = 1e-3 * torch.tensor([1.0, 0.0, 0.0], dtype=F64)
            difference = (final(1 + nudge) - final(1 - nudge))[2] / 2e-3
        torch.testing.assert_close(gradient[0], difference, rtol=1e-4, atol=0)

    def test_van_der_pol(self):
        """Along the slow solution y' = -y / (mu (y^2 - 1)), so the end depends on y0 alone and not on y'0."""
        y0 = torch.tensor([[2.0, 0.0]], dtype=F64, requires_grad=True)

        def field(t, y):
            position, speed = y.unbind(-1)
            return torch.stack([speed, 1000 * (1 - position**2) * speed - position], -1)

        value = solve_ode(field, y0, (0.0, 500.0), solver=Kvaerno5(), rtol=1e-7, atol=1e-9).value[-1, 0, 0]
        (gradient,) = torch.autograd.grad(value, y0)
        # ln y - y^2 / 2 = -t / mu + const, up to O(1 / mu^2).
        end = value.detach()
        expected = (2 - 1 / 2) / (end - 1 / end)
        torch.testing.assert_close(gradient[0, 0], expected, rtol=1e-4, atol=0)
        assert abs(float(gradient[0, 1])) < 1e-3


class TestRefusals:
    def test_third_derivative(self):
        y0, scale = inputs()
        (first,) = torch.autograd.grad(end(y0, scale, adjoint=DirectAdjoint()).sum(), scale, create_graph=True)
        torch.autograd.grad(first.sum(), scale, retain_graph=True)
        with pytest.raises(RuntimeError, match="third derivative"):
            torch.autograd.grad(first.sum(), scale, create_graph=True)

    @pytest.mark.parametrize("adjoint", [DirectAdjoint(), CheckpointAdjoint()], ids=repr)
    def test_coupled_samples(self, adjoint):
        y0, _ = inputs()
        solution = solve_ode(
            lambda t, y: torch.tanh(3 * (y - y.mean(0))) - 20 * y, y0, (0.0, 0.4), solver=Kvaerno3(), adjoint=adjoint
        )
        with pytest.raises(SolverError, match="depend on another"):
            solution.value[-1, 0].sum().backward()

    def test_a_broken_sample_leaves_the_gradient_of_the_others(self):
        y0, scale = inputs()
        ends = torch.tensor([[0.2], [9.0]], dtype=F64)

        def breaks(t, y, scale):
            return torch.where(t.reshape(-1, 1) < ends, field(t, y, scale), torch.nan)

        solution = solve_ode(
            breaks,
            y0,
            (0.0, 0.4),
            (scale,),
            solver=Kvaerno3(),
            controller=PIDController(per_sample=True),
            throw=False,
        )
        assert solution.converged.tolist() == [False, True]
        (gradient,) = torch.autograd.grad(solution.value[-1, 1].sum(), y0)
        alone = solve_ode(
            field, y0[1:], (0.0, 0.4), (scale[1:],), solver=Kvaerno3(), controller=PIDController(per_sample=True)
        )
        (expected,) = torch.autograd.grad(alone.value[-1].sum(), y0)
        torch.testing.assert_close(gradient[1], expected[1], rtol=1e-10, atol=1e-12)


def test_autocast():
    y0, scale = (x.detach().float() for x in inputs())
    weight = WEIGHT.float().requires_grad_()

    def loss():
        solution = solve_ode(
            lambda t, y: -10 * y + torch.tanh(y @ weight.T).float() * scale,
            y0,
            (0.0, 0.4),
            solver=Kvaerno3(),
            controller=ConstantController(dt=0.2),
            rtol=1e-2,
            atol=1e-2,
        )
        return (solution.value[-1] ** 2).sum()

    (expected,) = torch.autograd.grad(loss(), weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss()
    (found,) = torch.autograd.grad(value, weight)
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.02 * float(expected.abs().max()))
