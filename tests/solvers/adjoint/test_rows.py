"""Broken and coupled samples in the backward pass."""

import pytest
import torch
from torch.autograd import gradgradcheck

from restpoint.solvers import (
    GMRES,
    LU,
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
from tests.solvers.problems import name

D = torch.float64
ADJOINTS = [
    ImplicitAdjoint(),
    ImplicitAdjoint(GMRES()),
    ImplicitAdjoint(order=2),
    PhantomAdjoint(),
    JacobianFreeAdjoint(),
    UnrollAdjoint(),
    CheckpointAdjoint(),
    CheckpointAdjoint(recursive=True),
    ReversibleAdjoint(),
]
G = torch.Generator().manual_seed(2)
W = torch.randn(6, 6, generator=G, dtype=D)
W = W * (0.7 / torch.linalg.matrix_norm(W, 2))
X = torch.randn(5, 6, generator=G, dtype=D)
OTHERS = [0, 2, 4]
CLOSE = {"rtol": 1e-13, "max_steps": 300}


def solver_for(adjoint, solver=None):
    return Picard(0.5) if isinstance(adjoint, ReversibleAdjoint) else solver


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=name)
class TestBrokenRows:
    """Rows 1 and 3 break, at once and on the way. A loss over all rows must not notice."""

    @staticmethod
    def f(z, x, w):
        out = torch.tanh(z @ w + x)
        return torch.where((x[:, :1] > 50) & (z[:, :1].abs() > 0.5), torch.nan, out)

    def gradients(self, x, adjoint, solver=None):
        x, w = x.clone().requires_grad_(), W.clone().requires_grad_()
        solver = solver_for(adjoint, solver)
        solution = fixed_point(
            lambda z, x: self.f(z, x, w), torch.zeros_like(x), (x,), solver=solver, adjoint=adjoint, rtol=1e-10,
            max_steps=200,
        )  # fmt: skip
        solution.value.square().sum().backward()
        return x.grad, w.grad

    @pytest.mark.parametrize("solver", [None, Picard(), Broyden(), Newton()], ids=name)
    def test_leave_the_gradients_of_the_others_alone(self, adjoint, solver):
        if isinstance(adjoint, ReversibleAdjoint) and solver is not None:
            pytest.skip("it brings its own iteration")
        if isinstance(adjoint, CheckpointAdjoint) and isinstance(solver, Newton):
            pytest.skip("slow, and the same code")
        x = X.clone()
        x[1] = torch.nan
        x[3] = 100.0
        alone, among = self.gradients(X[OTHERS], adjoint, solver), self.gradients(x, adjoint, solver)
        torch.testing.assert_close(among[0][OTHERS], alone[0], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(among[1], alone[1], rtol=1e-10, atol=1e-12)
        assert (among[0][[1, 3]] == 0).all()

    def test_also_where_something_per_sample_is_closed_over(self, adjoint):
        """The broken row cannot be taken out then, but a loss that leaves it out has no part in it."""
        b = torch.linspace(-1, 1, 5, dtype=D).unsqueeze(1)
        x = X.clone().requires_grad_()

        def f(z, x):
            return torch.where(x[:, :1] > 50, torch.nan, 0.5 * torch.sin(z) + x + b)

        with torch.no_grad():
            x[1] = 100.0
        # More steps would make the reconstruction of the reversible iteration drift, and warn.
        rtol = 1e-5 if isinstance(adjoint, ReversibleAdjoint) else 1e-12
        solution = fixed_point(
            f, torch.zeros_like(x), (x,), solver=solver_for(adjoint), adjoint=adjoint, rtol=rtol, max_steps=200
        )
        value = solution.value[OTHERS]
        (grad,) = torch.autograd.grad(value.sum(), x)
        if not isinstance(adjoint, (JacobianFreeAdjoint, PhantomAdjoint)):
            torch.testing.assert_close(grad[OTHERS], 1 / (1 - 0.5 * value.cos()), rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("mark", [torch.nan, 100.0])
    def test_also_where_samples_share_some_of_the_args(self, adjoint, mark):
        """The rows cannot be taken out then, but a healthy row can stand in for each that is broken."""
        x = X.clone()
        x[1] = x[3] = mark

        def gradient(x, rows):
            w = W.clone().requires_grad_()
            value = fixed_point(
                self.f, torch.zeros_like(x), (x, w), solver=solver_for(adjoint), adjoint=adjoint, rtol=1e-8,
                max_steps=200,
            ).value  # fmt: skip
            return torch.autograd.grad(value[rows].square().sum(), w)[0]

        torch.testing.assert_close(gradient(x, OTHERS), gradient(X[OTHERS], [0, 1, 2]), rtol=1e-10, atol=1e-12)

    def test_a_weight_as_long_as_the_batch_is_not_taken_for_samples(self, adjoint):
        x, a = X.clone(), torch.linspace(-1, 1, 5, dtype=D)
        x[1] = 100.0

        def f(z, x, w, a):
            return self.f(z, x, w) + 0.1 * (a * torch.arange(5, dtype=D)).sum()

        w = W.clone().requires_grad_()
        value = fixed_point(f, torch.zeros_like(x), (x, w, a), solver=solver_for(adjoint), adjoint=adjoint).value
        (grad,) = torch.autograd.grad(value[OTHERS].sum(), w)
        assert torch.isfinite(grad).all()

    def test_all_rows_broken_is_no_error(self, adjoint):
        x = torch.full_like(X, torch.nan).requires_grad_()
        solution = fixed_point(
            lambda z, x: 0.5 * z + x, torch.zeros_like(x), (x,), solver=solver_for(adjoint), adjoint=adjoint
        )
        assert not solution.converged.any()
        assert torch.isfinite(solution.value).all()


def test_statistics_of_the_backward_solve_name_the_broken_rows():
    x = X.clone()
    x[1] = torch.nan
    x.requires_grad_()
    solution = fixed_point(lambda z, x: torch.tanh(z @ W + x), torch.zeros_like(X), (x,))
    assert solution.adjoint_stats is None
    solution.value.sum().backward()
    stats = solution.adjoint_stats
    assert stats.converged.tolist() == [True, False, True, True, True]
    assert (stats.residual[OTHERS] < 1e-9).all()
    assert stats.residual[1].isnan()


def test_a_nan_in_the_loss_stays_in_its_row():
    """As in any backward pass; it must not reach the other rows through the linear solve."""
    for linear in (LU(), GMRES(), BiCGSTAB()):
        x = X.clone().requires_grad_()
        value = fixed_point(
            lambda z, x: torch.tanh(z @ W + x), torch.zeros_like(X), (x,), adjoint=ImplicitAdjoint(linear)
        ).value
        weight = torch.ones_like(X)
        weight[3, 2] = torch.nan
        (grad,) = torch.autograd.grad((weight * value).sum(), x)
        (expected,) = torch.autograd.grad(
            fixed_point(lambda z, x: torch.tanh(z @ W + x), torch.zeros_like(X), (x,)).value.sum(), x
        )
        assert grad[3].isnan().any()
        torch.testing.assert_close(grad[[0, 1, 2, 4]], expected[[0, 1, 2, 4]], rtol=1e-8, atol=1e-8)


# Functions whose samples have to do with each other.


def mean_field(z, x, w):
    """As a normalisation by batch statistics."""
    return torch.tanh(0.5 * z @ w + x + 0.3 * z.mean(dim=0, keepdim=True))


def batch_norm(z, x, w):
    return torch.tanh(torch.nn.functional.batch_norm(0.2 * z @ w + x, None, None, training=True))


def attention(z, x, w):
    """Every sample attends to every other."""
    return 0.6 * torch.softmax(z @ z.T / 3, dim=1) @ torch.tanh(z @ w) + 0.5 * x


def causal(z, x, w):
    """Later samples see earlier ones, and not the other way round."""
    mean = torch.cumsum(z, dim=0) / torch.arange(1, len(z) + 1, dtype=z.dtype).unsqueeze(1)
    return torch.tanh(0.5 * z @ w + x + 0.3 * mean)


def pairs(z, x, w):
    """The third and the fourth, and nobody else."""
    order = torch.arange(len(z))
    order[2], order[3] = 3, 2
    return torch.tanh(0.4 * z @ w + x + 0.3 * z[order])


COUPLED = [mean_field, batch_norm, attention, causal, pairs]
LOSSES = {
    "all": lambda value: value.pow(3).sum(),
    "one": lambda value: value[0].pow(3).sum(),
    "unequal": lambda value: (value.pow(3) * 10.0 ** -torch.arange(0, 10, 2, dtype=D).unsqueeze(1)).sum(),
}


def reference(f, loss, x, w):
    """By a plain loop."""
    z = torch.zeros_like(x)
    for _ in range(200):
        z = f(z, x, w)
    return torch.autograd.grad(LOSSES[loss](z), (x, w))


@pytest.mark.parametrize("f", COUPLED, ids=lambda f: f.__name__)
class TestCoupledRows:
    """Solved row by row these would have a wrong gradient, and nobody would notice."""

    @pytest.mark.parametrize("loss", LOSSES)
    @pytest.mark.parametrize(
        "linear", [LU(), GMRES(), GMRES(3, max_steps=500), BiCGSTAB(), Neumann(), FixedPointLinear()], ids=name
    )
    def test_implicit(self, f, loss, linear):
        x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
        solution = fixed_point(
            lambda z, x: f(z, x, w),
            torch.zeros_like(x),
            (x,),
            adjoint=ImplicitAdjoint(linear),
            rtol=1e-13,
            max_steps=300,
        )
        assert solution.converged.all()
        got = torch.autograd.grad(LOSSES[loss](solution.value), (x, w))
        torch.testing.assert_close(got, reference(f, loss, x, w), rtol=1e-7, atol=1e-10)

    @pytest.mark.parametrize("adjoint", [UnrollAdjoint(), CheckpointAdjoint(), PhantomAdjoint(200, 1.0)], ids=name)
    def test_taped(self, f, adjoint):
        x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
        solution = fixed_point(
            lambda z, x: f(z, x, w),
            torch.zeros_like(x),
            (x,),
            solver=Picard(),
            adjoint=adjoint,
            rtol=1e-13,
            max_steps=300,
        )
        got = torch.autograd.grad(LOSSES["all"](solution.value), (x, w))
        torch.testing.assert_close(got, reference(f, "all", x, w), rtol=1e-7, atol=1e-10)

    def test_torch_func(self, f):
        def loss(x, w):
            solution = fixed_point(lambda z, x: f(z, x, w), torch.zeros_like(x), (x,), rtol=1e-13, max_steps=300)
            return solution.value.pow(3).sum()

        got = torch.func.grad(loss, argnums=(0, 1))(X, W)
        x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
        torch.testing.assert_close(got, reference(f, "all", x, w), rtol=1e-8, atol=1e-10)

    @pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")
    def test_forward_mode(self, f):
        def value(w):
            return fixed_point(lambda z, x: f(z, x, w), torch.zeros_like(X), (X,), rtol=1e-13, max_steps=300).value

        w = W.clone().requires_grad_()
        _, tangent = torch.func.jvp(lambda w: value(w).pow(3).sum(), (W,), (W,))
        expected = (reference(f, "all", X.clone().requires_grad_(), w)[1] * W).sum()
        torch.testing.assert_close(tangent, expected, rtol=1e-8, atol=1e-10)

    def test_second_derivatives(self, f):
        x, w = X[:4, :2].clone().requires_grad_(), W[:2, :2].clone().requires_grad_()

        def value(x, w):
            return fixed_point(
                lambda z, x: f(z, x, w), torch.zeros_like(x), (x,), adjoint=ImplicitAdjoint(order=2), rtol=1e-14,
                max_steps=300,
            ).value  # fmt: skip

        assert gradgradcheck(value, (x, w), fast_mode=True, atol=1e-4)


def test_independent_rows_are_not_taken_for_coupled(monkeypatch):
    """A joint solve is right for them, too, but dear."""
    from restpoint.solvers.adjoint import implicit

    def never(*_):
        raise AssertionError("solved jointly")

    monkeypatch.setattr(implicit, "solve_jointly", never)
    for dtype in (torch.float32, D):
        for linear in (LU(), GMRES(), Neumann()):
            x = X.to(dtype).requires_grad_()
            w = W.to(dtype)
            f = lambda z, x, w=w: torch.tanh(z @ w + x)  # noqa: E731
            value = fixed_point(f, torch.zeros_like(x), (x,), adjoint=ImplicitAdjoint(linear)).value
            (value * 10.0 ** -torch.arange(0, 10, 2).unsqueeze(1)).sum().backward()


def test_coupled_rows_too_many_to_assemble_under_torch_func():
    x = torch.randn(60, 50, dtype=D)

    def loss(x):
        return fixed_point(lambda z, x: 0.5 * torch.sin(z) + 0.1 * z.mean(0) + x, torch.zeros_like(x), (x,)).value.sum()

    with pytest.raises(ValueError, match="a batch whose samples the function couples is assembled.*3000"):
        torch.func.grad(loss)(x)


class TestSingular:
    """Where the implicit function theorem does not hold there is no gradient, and so no number."""

    @pytest.mark.parametrize("order", [1, 2])
    def test_one_of_several_samples(self, order):
        theta = torch.tensor([[0.6], [1.0], [0.0]], dtype=D, requires_grad=True)
        x0 = torch.tensor([[0.5], [0.0], [0.9]], dtype=D)
        solution = root(lambda x, t: x**2 + t**2 - 1, x0, (theta,), adjoint=ImplicitAdjoint(order=order), rtol=1e-14)
        assert solution.converged.all()
        with pytest.raises(Exception, match=r"Jacobian at sample 1 is singular.*third condition") as error:
            solution.value.sum().backward()
        assert type(error.value).__name__ == "SolverError"

    @pytest.mark.parametrize("linear", [GMRES(), Neumann(), BiCGSTAB(), FixedPointLinear()], ids=name)
    def test_an_iterative_solver_warns_of_it(self, linear):
        from restpoint.solvers.solution import AdjointWarning

        theta = torch.ones(1, 1, dtype=D, requires_grad=True)
        value = root(
            lambda x, t: x**2 + t**2 - 1, torch.zeros(1, 1, dtype=D), (theta,), adjoint=ImplicitAdjoint(linear)
        ).value
        with pytest.warns(AdjointWarning, match="residual 1, STAGNATED.*Jacobian may be singular"):
            value.sum().backward()

    def test_a_sample_that_the_loss_leaves_out_is_no_matter(self):
        theta = torch.tensor([[0.6], [1.0]], dtype=D, requires_grad=True)
        solution = root(lambda x, t: x**2 + t**2 - 1, torch.tensor([[0.5], [0.0]], dtype=D), (theta,), rtol=1e-14)
        (grad,) = torch.autograd.grad(solution.value[0].sum(), theta)
        torch.testing.assert_close(grad, torch.tensor([[-0.75], [0.0]], dtype=D))

    def test_a_solve_that_falls_short_warns(self):
        from restpoint.solvers.solution import AdjointWarning

        x = X.clone().requires_grad_()
        value = fixed_point(
            lambda z, x: torch.tanh(z @ W + x), torch.zeros_like(X), (x,), adjoint=ImplicitAdjoint(GMRES(max_steps=1))
        ).value
        with pytest.warns(AdjointWarning, match=r"did not reach its tolerance \(worst: sample \d"):
            value.sum().backward()

    def test_conjugate_gradients_on_what_is_not_symmetric_warn(self):
        from restpoint.solvers.solution import AdjointWarning

        x = X.clone().requires_grad_()
        turn = torch.matrix_exp(3 * (W - W.T))
        f, adjoint = lambda z, x: 0.9 * z @ turn + x, ImplicitAdjoint(CG())
        value = fixed_point(f, torch.zeros_like(X), (x,), adjoint=adjoint, max_steps=300).value
        with pytest.warns(AdjointWarning, match="did not reach its tolerance"):
            value.sum().backward()
