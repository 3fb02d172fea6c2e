"""Every adjoint that claims exactness, with every method, against finite differences and against each other."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from restpoint.solvers import (
    GMRES,
    LU,
    Anderson,
    Broyden,
    CheckpointAdjoint,
    ImplicitAdjoint,
    JacobianFreeAdjoint,
    Newton,
    PhantomAdjoint,
    Picard,
    ReversibleAdjoint,
    UnrollAdjoint,
    fixed_point,
    root,
)
from restpoint.solvers.linear import CG, BiCGSTAB, FixedPointLinear, Neumann
from tests.solvers.problems import CASES, SOLVERS, name

D = torch.float64
CONVERGED = {"rtol": 1e-13, "max_steps": 300}


def small(root=False):
    """Three samples of three numbers: cheap enough for finite differences of second derivatives."""
    g = torch.Generator().manual_seed(11)
    w = 0.25 * torch.randn(3, 3, generator=g, dtype=D)
    x = torch.randn(3, 3, generator=g, dtype=D)
    return w.requires_grad_(), x.requires_grad_()


def value(w, x, solver, adjoint, z0=None, options=CONVERGED, problem=fixed_point):
    z0 = torch.zeros_like(x) if z0 is None else z0
    if problem is root:
        f = lambda z, x: z + 0.3 * torch.sin(z @ w) - x  # noqa: E731
    else:
        f = lambda z, x: torch.tanh(z @ w + x)  # noqa: E731
    return problem(f, z0, (x,), solver=solver, adjoint=adjoint, **options).value


CORE = [Picard(), Anderson(), Anderson(kind="I"), Broyden(), Newton()]
CHECKPOINTS = [CheckpointAdjoint(), CheckpointAdjoint(segments=2), CheckpointAdjoint(recursive=True)]


@pytest.mark.parametrize("problem", [fixed_point, root])
class TestFirstOrder:
    @pytest.mark.parametrize("solver", SOLVERS, ids=name)
    def test_implicit(self, solver, problem):
        w, x = small()
        assert gradcheck(lambda w, x: value(w, x, solver, ImplicitAdjoint(), problem=problem), (w, x), fast_mode=True)

    @pytest.mark.parametrize("adjoint", [ImplicitAdjoint(GMRES()), ImplicitAdjoint(order=2)], ids=name)
    @pytest.mark.parametrize("solver", CORE, ids=name)
    def test_other_implicit(self, solver, adjoint, problem):
        w, x = small()
        assert gradcheck(lambda w, x: value(w, x, solver, adjoint, problem=problem), (w, x), fast_mode=True)

    @pytest.mark.parametrize("solver", SOLVERS, ids=name)
    def test_unrolled_iterate_as_it_is(self, solver, problem):
        """Far from converged, and with respect to the initial value, too."""
        w, x = small()
        z0 = (0.1 * torch.randn_like(x)).requires_grad_()
        few = {"rtol": 0.0, "max_steps": 4}
        assert gradcheck(
            lambda w, x, z0: value(w, x, solver, UnrollAdjoint(), z0, few, problem),
            (w, x, z0),
            fast_mode=True,
            atol=1e-4,
        )

    @pytest.mark.parametrize("solver", SOLVERS, ids=name)
    def test_unrolled_to_convergence(self, solver, problem):
        """Rows end at different steps, and what a frozen row still computes leaves no trace in the gradient."""
        w, x = small()
        with torch.no_grad():
            x[0] *= 1e-3
            x[1] *= 10
        options = {"rtol": 1e-12, "max_steps": 300}
        got, expected = (
            torch.autograd.grad(value(w, x, solver, each, None, options, problem).square().sum(), (w, x))
            for each in (UnrollAdjoint(), ImplicitAdjoint())
        )
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("adjoint", CHECKPOINTS, ids=name)
    @pytest.mark.parametrize("solver", CORE, ids=name)
    def test_checkpointed_is_unrolled(self, solver, adjoint, problem):
        w, x = small()
        z0 = (0.1 * torch.randn_like(x)).requires_grad_()
        for options in ({"rtol": 0.0, "max_steps": 5}, {"rtol": 1e-8, "max_steps": 300}):
            got, expected = (
                torch.autograd.grad(value(w, x, solver, each, z0, options, problem).pow(3).sum(), (w, x, z0))
                for each in (adjoint, UnrollAdjoint())
            )
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)

    @pytest.mark.parametrize("adjoint", [*CHECKPOINTS, ReversibleAdjoint()], ids=name)
    def test_recomputed(self, adjoint, problem):
        """In the full mode, which also asks for the gradient of an output that nothing depends on."""
        w, x = small()
        solver = Picard(0.5) if isinstance(adjoint, ReversibleAdjoint) else Picard()
        few = {"rtol": 0.0, "max_steps": 4}
        assert gradcheck(
            lambda w, x: value(w, x, solver, adjoint, options=few, problem=problem), (w, x), fast_mode=False
        )


class TestSecondOrder:
    @pytest.mark.parametrize("solver", CORE, ids=name)
    @pytest.mark.parametrize("linear", [LU(), GMRES()], ids=name)
    @pytest.mark.parametrize("problem", [fixed_point, root])
    def test_implicit(self, solver, linear, problem):
        w, x = small()
        adjoint = ImplicitAdjoint(linear, order=2)
        assert gradgradcheck(lambda w, x: value(w, x, solver, adjoint, problem=problem), (w, x), fast_mode=True)

    @pytest.mark.parametrize("solver", CORE, ids=name)
    @pytest.mark.parametrize("adjoint", [UnrollAdjoint(), CheckpointAdjoint()], ids=name)
    def test_taped(self, solver, adjoint):
        w, x = small()
        z0 = (0.1 * torch.randn_like(x)).requires_grad_()
        few = {"rtol": 0.0, "max_steps": 3}
        assert gradgradcheck(
            lambda w, x, z0: value(w, x, solver, adjoint, z0, few), (w, x, z0), fast_mode=True, atol=1e-4
        )

    def test_hessian_equals_that_of_unrolling(self):
        w, x = small()

        def hessian(adjoint):
            return torch.autograd.functional.hessian(lambda w, x: value(w, x, Picard(), adjoint).pow(3).sum(), (w, x))

        for row, expected in zip(hessian(ImplicitAdjoint(order=2)), hessian(UnrollAdjoint()), strict=True):
            torch.testing.assert_close(row, expected, rtol=1e-9, atol=1e-10)

    @pytest.mark.parametrize("adjoint", [ImplicitAdjoint(), ImplicitAdjoint(GMRES())], ids=name)
    def test_order_1_refuses_to_record_a_graph(self, adjoint):
        """A second derivative through one chord step would be silently wrong."""
        w, x = small()
        loss = value(w, x, Anderson(), adjoint).square().sum()
        with pytest.raises(RuntimeError, match=r"create_graph=True.*ImplicitAdjoint\(order=2\)"):
            torch.autograd.grad(loss, w, create_graph=True)

    def test_order_2_refuses_a_third_derivative(self):
        w, x = small()
        (first,) = torch.autograd.grad(
            value(w, x, Anderson(), ImplicitAdjoint(order=2)).pow(3).sum(), w, create_graph=True
        )
        (second,) = torch.autograd.grad(first.sum(), w, retain_graph=True)
        assert torch.isfinite(second).all()
        with pytest.raises(RuntimeError, match="no third derivative"):
            torch.autograd.grad(first.sum(), w, create_graph=True)

    def test_reversible_refuses_to_record_a_graph(self):
        w, x = small()
        loss = value(w, x, Picard(0.5), ReversibleAdjoint()).sum()
        with pytest.raises(RuntimeError, match=r"ReversibleAdjoint.*create_graph=True"):
            torch.autograd.grad(loss, w, create_graph=True)


@pytest.mark.parametrize(
    "linear",
    [LU(), GMRES(), GMRES(3, max_steps=500), BiCGSTAB(), Neumann(), FixedPointLinear(), FixedPointLinear(Picard()),
     Anderson(), Picard(), Broyden()],
    ids=name,
)  # fmt: skip
@pytest.mark.parametrize("case", CASES, ids=name)
def test_every_linear_solver_gives_the_same_gradient(linear, case):
    if case.root and isinstance(linear, (Neumann, Picard)):
        linear = LU()
    problem = root if case.root else fixed_point
    grads = []
    for adjoint in (ImplicitAdjoint(linear), UnrollAdjoint()):
        x, parameter = case.x.clone().requires_grad_(), case.parameter.clone().requires_grad_()
        solution = problem(
            lambda z, x: case.f(z, x, parameter), case.z0, (x,), solver=Picard(0.9), adjoint=adjoint,  # noqa: B023
            rtol=1e-12, max_steps=600,
        )  # fmt: skip
        grads.append(torch.autograd.grad(solution.value.square().sum(), (x, parameter)))
    torch.testing.assert_close(*grads, rtol=1e-7, atol=1e-7)


def test_conjugate_gradients_for_a_symmetric_jacobian():
    case = CASES[1]
    assert case.name == "linear"
    x = case.x.clone().requires_grad_()
    solution = fixed_point(
        lambda z, x: case.f(z, x, case.parameter), case.z0, (x,), adjoint=ImplicitAdjoint(CG()), rtol=1e-12,
        solver=Newton(),
    )  # fmt: skip
    (grad,) = torch.autograd.grad(solution.value.sum(), x)
    torch.testing.assert_close(
        grad, torch.linalg.solve(torch.eye(6, dtype=D) - case.parameter, torch.ones(6, dtype=D)).expand(4, 6)
    )


class TestApproximate:
    """Phantom and Jacobian-free: their error is the one that their formulas say."""

    case = CASES[1]

    def grads(self, adjoint):
        x, s = self.case.x.clone().requires_grad_(), self.case.parameter
        solution = fixed_point(
            lambda z, x: self.case.f(z, x, s), self.case.z0, (x,), adjoint=adjoint, solver=Newton(), rtol=1e-13
        )
        return torch.autograd.grad(solution.value.sum(), x)[0], solution.value

    @pytest.mark.parametrize("steps", [1, 2, 5, 20])
    @pytest.mark.parametrize("damping", [1.0, 0.7])
    def test_phantom_is_a_truncated_neumann_series(self, steps, damping):
        grad, _ = self.grads(PhantomAdjoint(steps, damping))
        s, g = self.case.parameter, torch.ones(4, 6, dtype=D)
        expected, term = torch.zeros_like(g), damping * g
        for _ in range(steps):
            expected = expected + term
            term = (1 - damping) * term + damping * term @ s.T
        torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-12)

    def test_phantom_approaches_the_implicit_gradient_at_the_stated_rate(self):
        exact, _ = self.grads(ImplicitAdjoint())
        errors = torch.stack([(self.grads(PhantomAdjoint(k, 1.0))[0] - exact).norm() for k in (40, 60)])
        assert (errors[1] / errors[0]) ** (1 / 20) == pytest.approx(0.9, abs=0.005)

    def test_jacobian_free_takes_the_jacobian_for_the_identity(self):
        grad, _ = self.grads(JacobianFreeAdjoint())
        torch.testing.assert_close(grad, torch.ones(4, 6, dtype=D))

    def test_values_are_the_rest_point(self):
        reference = self.case.reference()
        for adjoint in (PhantomAdjoint(), JacobianFreeAdjoint()):
            torch.testing.assert_close(self.grads(adjoint)[1], reference)
