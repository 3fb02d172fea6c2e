"""Systems of implicit differentiation for machine learning: those that rest on root and fixed_point alone."""

import pytest
import torch
from torch.utils import checkpoint

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
    SolverError,
    Status,
    UnrollAdjoint,
    fixed_point,
    root,
)
from restpoint.solvers.linear import CG, LinearOperator, Neumann
from restpoint.solvers.solution import AdjointWarning

D = torch.float64


class TestUnitCircle:
    """x^2 + theta^2 = 1: dx/dtheta = -theta / x, where x is not zero."""

    @staticmethod
    def circle(x, theta):
        return x**2 + theta**2 - 1

    def test_derivative(self):
        theta = torch.linspace(-0.99, 0.99, 21, dtype=D).unsqueeze(1).requires_grad_()
        for sign in (1, -1):
            solution = root(self.circle, torch.full_like(theta, sign), (theta,), rtol=1e-15)
            x = solution.value.detach()
            torch.testing.assert_close(x, sign * (1 - theta.detach() ** 2).sqrt(), rtol=1e-14, atol=1e-15)
            (slope,) = torch.autograd.grad(solution.value.sum(), theta)
            torch.testing.assert_close(slope, -theta.detach() / x, rtol=1e-14, atol=1e-14)

    def test_second_derivative(self):
        theta = torch.tensor([[0.3]], dtype=D, requires_grad=True)
        x = root(self.circle, torch.ones(1, 1, dtype=D), (theta,), rtol=1e-15, adjoint=ImplicitAdjoint(order=2)).value
        (slope,) = torch.autograd.grad(x.sum(), theta, create_graph=True)
        (curvature,) = torch.autograd.grad(slope.sum(), theta)
        # d2x/dtheta2 = -(1 + (dx/dtheta)^2) / x = -1 / x^3
        torch.testing.assert_close(curvature, -1 / x.detach() ** 3, rtol=1e-13, atol=0)

    def test_at_x_0_the_third_condition_fails(self):
        """An error that says so, and not a number."""
        theta = torch.ones(1, 1, dtype=D, requires_grad=True)
        solution = root(self.circle, torch.zeros(1, 1, dtype=D), (theta,))
        assert solution.converged.all()
        with pytest.raises(SolverError, match="third condition of the implicit function theorem fails"):
            solution.value.sum().backward()
        assert theta.grad is None


class TestCubic:
    """y = x^3 + 2 x^2 + x y + 4, so y = (x^3 + 2 x^2 + 4) / (1 - x)."""

    x = torch.tensor([[-3.0], [-0.5], [0.25], [0.9], [2.0], [7.0]], dtype=D)

    @staticmethod
    def constraint(y, x):
        return y - (x**3 + 2 * x**2 + x * y + 4)

    def test_derivative_is_the_quotient_rule(self):
        x = self.x.clone().requires_grad_()
        y = root(self.constraint, torch.zeros_like(x), (x,), rtol=1e-15).value
        (slope,) = torch.autograd.grad(y.sum(), x)
        u, du, v = self.x**3 + 2 * self.x**2 + 4, 3 * self.x**2 + 4 * self.x, 1 - self.x
        torch.testing.assert_close(y.detach(), u / v, rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(slope, (du * v + u) / v**2, rtol=1e-13, atol=1e-13)

    def test_constraint_solved_inside_an_objective(self):
        """L(x, y(x)) = x^2 + sin y: the total derivative, with respect to x through both."""
        x = self.x.clone().requires_grad_()
        y = root(self.constraint, torch.zeros_like(x), (x,), rtol=1e-15).value
        (total,) = torch.autograd.grad((x**2 + torch.sin(y)).sum(), x)
        z = self.x.clone().requires_grad_()
        closed = (z**3 + 2 * z**2 + 4) / (1 - z)
        (expected,) = torch.autograd.grad((z**2 + torch.sin(closed)).sum(), z)
        torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)

    def test_no_solution_at_the_pole(self):
        """At x = 1 no y satisfies it."""
        solution = root(self.constraint, torch.zeros(1, 1, dtype=D), (torch.ones(1, 1, dtype=D),), rtol=1e-12)
        assert not solution.converged.any()


class TestSoftmaxByItsKKTSystem:
    """argmin_z -theta'z + sum_i z_i log z_i with z'1 = 1, by stationarity and the primal row z'1 - 1 = 0.

    With the row u (z'1 - 1) = 0 the system is singular where the multiplier u = logsumexp(theta) - 1 is zero.
    """

    @staticmethod
    def kkt(state, theta):
        z, u = state["z"], state["u"]
        return {"z": torch.log(z) + 1 - theta + u, "u": z.sum(dim=1, keepdim=True) - 1}

    def solve(self, theta, **options):
        batch, n = theta.shape
        start = {"z": torch.full_like(theta, 1 / n), "u": theta.new_zeros(batch, 1)}
        # Ill-conditioned where some z is tiny: a factorisation, also for the larger ones.
        return root(
            self.kkt, start, (theta,), solver=Newton(LU()), adjoint=ImplicitAdjoint(LU()), rtol=1e-14, **options
        )

    @staticmethod
    def thetas(normaliser, n=5):
        """Random ones, moved such that their logsumexp is `normaliser`; as they are for None."""
        theta = 2 * torch.randn(4, n, generator=torch.Generator().manual_seed(n), dtype=D)
        return theta if normaliser is None else theta - theta.logsumexp(dim=1, keepdim=True) + normaliser

    @pytest.mark.parametrize("normaliser", [None, 0.0, 1.0, -3.0, 20.0])
    @pytest.mark.parametrize("n", [2, 5, 40])
    def test_jacobian(self, normaliser, n):
        theta = self.thetas(normaliser, n).requires_grad_()
        solution = self.solve(theta)
        z = solution.value["z"]
        assert solution.converged.all()
        torch.testing.assert_close(z.detach(), theta.detach().softmax(dim=1), rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(solution.value["u"].detach(), theta.detach().logsumexp(1, keepdim=True) - 1)
        rows = [torch.autograd.grad(z[:, i].sum(), theta, retain_graph=True)[0] for i in range(n)]
        z = z.detach()
        expected = torch.diag_embed(z) - z.unsqueeze(2) * z.unsqueeze(1)
        torch.testing.assert_close(torch.stack(rows, dim=1), expected, rtol=1e-10, atol=1e-10)

    def test_multiplier_has_the_gradient_of_logsumexp(self):
        theta = self.thetas(1.0).requires_grad_()
        (grad,) = torch.autograd.grad(self.solve(theta).value["u"].sum(), theta)
        torch.testing.assert_close(grad, theta.detach().softmax(dim=1), rtol=1e-10, atol=1e-12)

    def test_torch_func_gives_the_whole_jacobian(self):
        theta = self.thetas(0.0)[:1]
        jacobian = torch.func.jacrev(lambda t: self.solve(t).value["z"])(theta)[0, :, 0]
        z = theta.softmax(dim=1)[0]
        torch.testing.assert_close(jacobian, torch.diag(z) - torch.outer(z, z), rtol=1e-10, atol=1e-10)

    def test_the_complementary_row_is_singular_where_the_multiplier_vanishes(self):
        """What the primal row avoids."""

        def complementary(state, theta):
            rows = self.kkt(state, theta)
            return {"z": rows["z"], "u": state["u"] * rows["u"]}

        theta = self.thetas(1.0).requires_grad_()
        exact = {"z": theta.detach().softmax(dim=1), "u": theta.new_zeros(4, 1)}
        solution = root(complementary, exact, (theta,), rtol=1e-10)
        with pytest.raises(SolverError, match="singular"):
            solution.value["z"][:, 0].sum().backward()


class TestApproximateInverses:
    """Neumann(k), conjugate gradients, the identity: the error against k, and what diverges says so."""

    @staticmethod
    def problem(radius, n=12):
        g = torch.Generator().manual_seed(3)
        s = torch.randn(n, n, generator=g, dtype=D)
        s = s + s.T
        s = s * (radius / torch.linalg.eigvalsh(s).abs().max())
        return s, torch.randn(3, n, generator=g, dtype=D)

    def gradient(self, s, x, adjoint):
        x = x.clone().requires_grad_()
        value = fixed_point(lambda z, x: z @ s + x, torch.zeros_like(x), (x,), solver=Newton(), adjoint=adjoint).value
        return torch.autograd.grad(value[:, 0].sum(), x)[0]

    @pytest.mark.filterwarnings("ignore::restpoint.solvers.solution.AdjointWarning")
    def test_error_of_a_truncated_neumann_series(self):
        """It falls like radius^k: k terms are the sum of (I - A)^i for i < k."""
        s, x = self.problem(0.8)
        exact = self.gradient(s, x, ImplicitAdjoint())
        g = torch.zeros_like(x)
        g[:, 0] = 1
        errors = []
        for k in (1, 2, 4, 8, 16, 32):
            got = self.gradient(s, x, ImplicitAdjoint(Neumann(rtol=0.0, max_steps=k)))
            series, term = torch.zeros_like(g), g
            for _ in range(k):
                series, term = series + term, term @ s
            torch.testing.assert_close(got, series, rtol=1e-12, atol=1e-13)
            errors.append((got - exact).norm().item())
        assert errors == sorted(errors, reverse=True)
        assert errors[-1] < 1.1 * errors[-2] * 0.8**16 * 2

    def test_one_term_is_the_jacobian_free_gradient(self):
        s, x = self.problem(0.8)
        with pytest.warns(AdjointWarning):
            one = self.gradient(s, x, ImplicitAdjoint(Neumann(rtol=0.0, max_steps=1)))
        torch.testing.assert_close(one, self.gradient(s, x, JacobianFreeAdjoint()))

    def test_a_divergent_series_is_noticed(self):
        s, x = self.problem(1.5)
        with pytest.warns(AdjointWarning, match="did not reach its tolerance"):
            self.gradient(s, x, ImplicitAdjoint(Neumann()))
        operator = LinearOperator.from_matrix(torch.eye(12, dtype=D) - s, batch=3)
        assert (Neumann().solve(operator, x).stats.status == Status.STAGNATED).all()

    def test_krylov_methods_need_no_contraction(self):
        s, x = self.problem(1.5)
        exact = torch.linalg.solve(torch.eye(12, dtype=D) - s, torch.eye(12, dtype=D)[0]).expand(3, 12)
        torch.testing.assert_close(self.gradient(s, x, ImplicitAdjoint(GMRES())), exact, rtol=1e-8, atol=1e-8)

    def test_conjugate_gradients_beat_the_series(self):
        """In steps to the same tolerance, on a symmetric positive definite matrix."""
        s, x = self.problem(0.95)
        operator = LinearOperator.from_matrix(torch.eye(12, dtype=D) - s, batch=3)
        gradients, series = CG(rtol=1e-8), Neumann(rtol=1e-8, max_steps=2000)
        assert gradients.solve(operator, x).stats.steps.max() < 0.2 * series.solve(operator, x).stats.steps.max()

    def test_the_softmax_system_needs_a_preconditioner(self):
        """The plain series of its KKT Jacobian diverges (spectral radius 18 at n = 5).

        With diag(z) and a Schur step on the sum it is exact in one term.
        """
        g = torch.Generator().manual_seed(5)
        z = torch.randn(1, 5, generator=g, dtype=D).softmax(dim=1)
        matrix = torch.zeros(1, 6, 6, dtype=D)
        matrix[:, :5, :5] = torch.diag_embed(1 / z)
        matrix[:, :5, 5] = matrix[:, 5, :5] = 1
        b = torch.randn(1, 6, generator=g, dtype=D)
        operator = LinearOperator.from_matrix(matrix)
        assert (torch.linalg.eigvals(torch.eye(6, dtype=D) - matrix).abs().max() > 1).all()
        assert (Neumann().solve(operator, b).stats.status == Status.STAGNATED).all()

        def precondition(v):
            top, bottom = v[:, :5], v[:, 5:]
            multiplier = (z * top).sum(dim=1, keepdim=True) - bottom
            return torch.cat([z * (top - multiplier), multiplier], dim=1)

        solution = Neumann(rtol=1e-12).solve(operator, b, preconditioner=precondition)
        assert (solution.stats.steps == 1).all()
        torch.testing.assert_close(solution.value, torch.linalg.solve(matrix, b), rtol=1e-12, atol=1e-12)


class TestSchurComplement:
    """Automatic differentiation as a triangular solve.

    A programme v_i = phi_i(v_j, j < i) is the root of its extended system; the Jacobian of that is triangular, and
    the derivative of its last variables with respect to its inputs is a Schur complement.
    """

    @staticmethod
    def programme(x):
        """(batch, 2) -> all intermediate values, (batch, 5)."""
        a, b = x[:, 0], x[:, 1]
        v1 = torch.sin(a)
        v2 = v1 * b
        v3 = torch.exp(v2)
        v4 = v3 + a * v1
        v5 = v4 / (1 + v2**2)
        return torch.stack([v1, v2, v3, v4, v5], dim=1)

    @staticmethod
    def extended(v, x):
        """Each value less the operation that makes it."""
        a, b = x[:, 0], x[:, 1]
        made = [
            torch.sin(a), v[:, 0] * b, torch.exp(v[:, 1]), v[:, 2] + a * v[:, 0], v[:, 3] / (1 + v[:, 1] ** 2),
        ]  # fmt: skip
        return v - torch.stack(made, dim=1)

    x = torch.tensor([[0.3, -0.7], [1.2, 0.4]], dtype=D)

    def test_triangular_solve_equals_autograd(self):
        v = self.programme(self.x)
        (expected,) = torch.autograd.grad(self.programme(x := self.x.clone().requires_grad_())[:, 4].sum(), x)
        for row in range(2):
            one = lambda v, x: self.extended(v[None], x[None])[0]  # noqa: E731
            by_v, by_x = torch.func.jacrev(one, argnums=(0, 1))(v[row], self.x[row])
            assert torch.equal(by_v, by_v.tril()), "the extended Jacobian is triangular"
            assert (by_v.diagonal() == 1).all()
            forward = -torch.linalg.solve_triangular(by_v, by_x, upper=False, unitriangular=True)[4]
            seed = torch.eye(5, dtype=D)[4:].T
            backward = -(torch.linalg.solve_triangular(by_v.T, seed, upper=True, unitriangular=True).T @ by_x)[0]
            torch.testing.assert_close(forward, expected[row], rtol=1e-13, atol=1e-14)
            torch.testing.assert_close(backward, expected[row], rtol=1e-13, atol=1e-14)

    def test_root_of_the_extended_system(self):
        """The programme run by a root finder, and differentiated by the implicit function theorem."""
        x = self.x.clone().requires_grad_()
        solution = root(self.extended, torch.zeros(2, 5, dtype=D), (x,), rtol=1e-14)
        torch.testing.assert_close(solution.value.detach(), self.programme(self.x), rtol=1e-12, atol=1e-13)
        (got,) = torch.autograd.grad(solution.value[:, 4].sum(), x)
        y = self.x.clone().requires_grad_()
        (expected,) = torch.autograd.grad(self.programme(y)[:, 4].sum(), y)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)

    def test_a_triangular_system_takes_as_many_picard_steps_as_it_is_deep(self):
        solution = fixed_point(
            lambda v, x: v - self.extended(v, x), torch.zeros(2, 5, dtype=D), (self.x,), solver=Picard(), rtol=1e-15
        )
        assert (solution.stats.steps <= 5).all()
        torch.testing.assert_close(solution.value, self.programme(self.x), rtol=1e-15, atol=1e-15)


class TestMemoryOfDifferentiation:
    """What is kept between the forward and the backward pass, in numbers."""

    n, batch = 64, 8

    def kept(self, adjoint, steps):
        g = torch.Generator().manual_seed(0)
        w = (0.05 * torch.randn(self.n, self.n, generator=g)).requires_grad_()
        x = torch.randn(self.batch, self.n, generator=g)
        seen = {}

        def pack(t):
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        solver = Picard(0.3) if isinstance(adjoint, ReversibleAdjoint) else Picard()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            value = fixed_point(
                lambda z, x: torch.tanh(z @ w + x), torch.zeros_like(x), (x,), solver=solver, adjoint=adjoint, rtol=0.0,
                max_steps=steps,
            ).value  # fmt: skip
        del value
        return sum(seen.values())

    @pytest.mark.parametrize(
        "adjoint", [ImplicitAdjoint(), PhantomAdjoint(), JacobianFreeAdjoint()], ids=lambda a: type(a).__name__
    )
    def test_does_not_depend_on_the_number_of_steps(self, adjoint):
        assert self.kept(adjoint, 80) == self.kept(adjoint, 10)

    def test_grows_with_it_when_unrolled(self):
        assert self.kept(UnrollAdjoint(), 80) > 4 * self.kept(UnrollAdjoint(), 10)


class TestCheckpointing:
    """Griewank: O(sqrt K) or O(log K) states, and an exact gradient."""

    @staticmethod
    def run(adjoint, steps, monkeypatch=None):
        g = torch.Generator().manual_seed(0)
        w = (0.2 * torch.randn(8, 8, generator=g, dtype=D)).requires_grad_()
        x = torch.randn(2, 8, generator=g, dtype=D)
        calls = []

        def f(z, x):
            calls.append(1)
            return torch.tanh(z @ w + x)

        value = fixed_point(
            f, torch.zeros_like(x), (x,), solver=Picard(), adjoint=adjoint, rtol=0.0, max_steps=steps
        ).value
        forward = len(calls)
        (grad,) = torch.autograd.grad(value.sum(), w)
        return grad, forward, len(calls) - forward

    @pytest.mark.parametrize("steps", [1, 2, 9, 30])
    @pytest.mark.parametrize("recursive", [False, True])
    def test_gradient_is_exact(self, steps, recursive):
        expected, _, _ = self.run(UnrollAdjoint(), steps)
        got, _, _ = self.run(CheckpointAdjoint(recursive=recursive), steps)
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-15)

    def test_costs_one_more_evaluation_a_step(self):
        _, _, again = self.run(CheckpointAdjoint(), 36)
        assert 30 <= again <= 36

    def test_recursion_costs_a_logarithm_of_evaluations(self):
        _, _, again = self.run(CheckpointAdjoint(recursive=True), 32)
        assert 32 < again <= 32 * 6

    @pytest.mark.parametrize(("segments", "regions"), [(None, 6), (3, 3), (100, 36)])
    def test_keeps_as_many_states_as_it_has_segments(self, segments, regions, monkeypatch):
        made, original = [], checkpoint.checkpoint

        def counted(*args, **options):
            made.append(1)
            return original(*args, **options)

        monkeypatch.setattr(checkpoint, "checkpoint", counted)
        self.run(CheckpointAdjoint(segments=segments), 36)
        assert len(made) == regions


class TestReversibleComputation:
    """The two-state iteration, run backwards."""

    g = torch.Generator().manual_seed(9)
    w = torch.randn(6, 6, generator=g, dtype=D)
    w = w * (0.6 / torch.linalg.matrix_norm(w, 2))
    x = torch.randn(4, 6, generator=g, dtype=D)

    def f(self, z):
        return torch.tanh(z @ self.w + self.x)

    @pytest.mark.parametrize("damping", [0.1, 0.3, 0.5])
    @torch.no_grad()
    def test_inverse_to_1e_10(self, damping):
        """u_{k+1} = (1 - b) u_{k-1} + b f(u_k), ten steps there and back."""
        from restpoint.solvers.adjoint.reversible import _Walk
        from restpoint.solvers.fixed_point.problem import Problem
        from restpoint.solvers.tree import flatten

        u = previous = torch.randn(4, 6, generator=torch.Generator().manual_seed(1), dtype=D)
        _, spec = flatten(u)
        path = [u]
        walk = _Walk(Problem(lambda z: self.f(z), (), spec, False, "f(z)"), damping, u, None)
        for _ in range(10):
            u, before = (1 - damping) * previous + damping * self.f(u), u
            previous = before
            walk.record(before, u, None)
            path.append(u)
        for index in range(9, -1, -1):
            walk.weigh(index, torch.ones_like(u))
            torch.testing.assert_close(walk.at(index), path[index], rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("steps", [1, 2, 3, 10, 20])
    def test_gradient_is_that_of_the_recurrence(self, steps):
        w = self.w.clone().requires_grad_()
        z0 = 0.1 * self.x
        value = fixed_point(
            lambda z, x: torch.tanh(z @ w + x), z0, (self.x,), solver=Picard(0.4), adjoint=ReversibleAdjoint(),
            rtol=0.0, max_steps=steps,
        ).value  # fmt: skip
        (got,) = torch.autograd.grad(value.pow(2).sum(), w)
        v = self.w.clone().requires_grad_()
        previous = u = z0
        for _ in range(steps):
            previous, u = u, 0.6 * previous + 0.4 * torch.tanh(u @ v + self.x)
        torch.testing.assert_close(value.detach(), u.detach(), rtol=1e-13, atol=1e-14)
        (expected,) = torch.autograd.grad(u.pow(2).sum(), v)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)

    def test_rows_that_rest_at_different_steps(self):
        """A row that has converged is frozen, and the way back passes it by."""
        w, x = (
            self.w.clone().requires_grad_(),
            (self.x * torch.tensor([[1e-4], [0.1], [1], [3]], dtype=D)).requires_grad_(),
        )
        grads = []
        for adjoint, solver in ((ReversibleAdjoint(), Picard(0.4)), (ImplicitAdjoint(), Newton())):
            solution = fixed_point(
                lambda z, x: torch.tanh(z @ w + x), torch.zeros_like(x), (x,), solver=solver, adjoint=adjoint,
                rtol=1e-7, max_steps=100,
            )  # fmt: skip
            assert solution.converged.all()
            grads.append(torch.autograd.grad(solution.value.sum(), (w, x)))
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)

    def reversible(self, f, damping, steps):
        return fixed_point(
            f, torch.zeros_like(self.x), (self.x,), solver=Picard(damping), adjoint=ReversibleAdjoint(), rtol=0.0,
            max_steps=steps,
        ).value  # fmt: skip

    @pytest.mark.parametrize("steps", [30, 60, 400])
    def test_drift_is_noticed(self, steps):
        """A large damping amplifies rounding by 1 / (1 - b) each step back, until it overflows."""
        w = torch.linalg.qr(self.w)[0].mul(0.99).requires_grad_()
        value = self.reversible(lambda z, x: z @ w + x, 0.9, steps)
        with pytest.warns(AdjointWarning, match="reconstruction of sample .* has drifted"):
            value.sum().backward()

    def test_drift_that_the_gradient_does_not_feel_is_none(self):
        """Where the map contracts well, the early states have drifted and carry no gradient."""
        w, v = (self.w.clone().requires_grad_() for _ in range(2))
        value = self.reversible(lambda z, x: torch.tanh(z @ w + x), 0.95, 25)
        (got,) = torch.autograd.grad(value.sum(), w)
        previous = u = torch.zeros_like(self.x)
        for _ in range(25):
            previous, u = u, 0.05 * previous + 0.95 * torch.tanh(u @ v + self.x)
        torch.testing.assert_close(got, torch.autograd.grad(u.sum(), v)[0], rtol=1e-7, atol=1e-7)


class TestPowerIteration:
    """The dominant eigenvector as a fixed point of v -> A v / |A v|."""

    @staticmethod
    def matrices():
        g = torch.Generator().manual_seed(2)
        a = torch.randn(3, 6, 6, generator=g, dtype=D)
        vectors, _ = torch.linalg.qr(a)
        values = torch.tensor([5.0, 3.0, 2.0, 1.0, 0.5, 0.1], dtype=D)
        return vectors @ torch.diag(values) @ vectors.mT

    @staticmethod
    def step(v, a):
        image = (a @ v.unsqueeze(2)).squeeze(2)
        return image / image.norm(dim=1, keepdim=True)

    @pytest.mark.parametrize("solver", [Picard(), Anderson(), Broyden()], ids=lambda s: type(s).__name__)
    def test_gradient_is_that_of_eigh(self, solver):
        a = self.matrices().requires_grad_()
        symmetric = (a + a.mT) / 2
        start = torch.ones(3, 6, dtype=D)
        solution = fixed_point(self.step, start / 6**0.5, (symmetric,), solver=solver, rtol=1e-13, max_steps=300)
        assert solution.converged.all()
        v = solution.value
        g = torch.arange(6, dtype=D)
        got = torch.autograd.grad((v * g).sum(), a)[0]
        b = self.matrices().requires_grad_()
        u = torch.linalg.eigh((b + b.mT) / 2)[1][:, :, -1]
        u = u * torch.sign((u * v.detach()).sum(dim=1, keepdim=True))
        torch.testing.assert_close(v.detach(), u.detach(), rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(got, torch.autograd.grad((u * g).sum(), b)[0], rtol=1e-9, atol=1e-9)

    def test_rate_is_the_ratio_of_the_eigenvalues(self):
        a = self.matrices()
        start = torch.ones(3, 6, dtype=D) / 6**0.5
        path = fixed_point(self.step, start, (a,), solver=Picard(), rtol=0.0, max_steps=30, trajectory=True).trajectory
        errors = (path[-10:-1] - path[-1]).norm(dim=2)
        rates = errors[1:5] / errors[:4]
        torch.testing.assert_close(rates, torch.full_like(rates, 0.6), rtol=0.05, atol=0)


class TestArgminOfAnEnergy:
    """Structured prediction: y = argmin E(y, x; theta), through the root of the energy's gradient."""

    g = torch.Generator().manual_seed(6)
    w = 0.5 * torch.randn(5, 5, generator=g, dtype=D)
    x = torch.randn(4, 5, generator=g, dtype=D)

    @staticmethod
    def energy(y, x, w):
        """Strongly convex in y, and not quadratic: (batch,)."""
        smooth = 0.5 * (y - x).square().sum(dim=1)
        return smooth + torch.nn.functional.softplus(y @ w).sum(dim=1) + 0.1 * torch.cosh(y).sum(dim=1)

    def gradient(self, y, x, w):
        with torch.enable_grad():
            y = y if y.requires_grad else y.requires_grad_()
            (g,) = torch.autograd.grad(self.energy(y, x, w).sum(), y, create_graph=True)
        return g

    def descent(self, x, w, steps=1500):
        y = torch.zeros_like(x)
        for _ in range(steps):
            y = y - 0.3 * (y - x + torch.sigmoid(y @ w) @ w.T + 0.1 * torch.sinh(y))
        return y

    @pytest.mark.parametrize("solver", [Newton(), Broyden(), Anderson()], ids=lambda s: type(s).__name__)
    def test_equals_unrolled_descent(self, solver):
        x, w = self.x.clone().requires_grad_(), self.w.clone().requires_grad_()
        stationarity = lambda y, x: 0.3 * (y - x + torch.sigmoid(y @ w) @ w.T + 0.1 * torch.sinh(y))  # noqa: E731
        solution = root(stationarity, torch.zeros_like(x), (x,), solver=solver, rtol=1e-13, max_steps=200)
        assert solution.converged.all()
        got = torch.autograd.grad(solution.value.pow(3).sum(), (x, w))
        expected = torch.autograd.grad(self.descent(x, w).pow(3).sum(), (x, w))
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-9)

    def test_energy_differentiated_by_autograd(self):
        """The user writes the energy only; its gradient is taken inside the residual."""
        w = self.w.clone().requires_grad_()
        solution = root(lambda y, x: self.gradient(y.clone(), x, w), torch.zeros_like(self.x), (self.x,), rtol=1e-13)
        assert solution.converged.all()
        (got,) = torch.autograd.grad(solution.value.pow(3).sum(), w)
        (expected,) = torch.autograd.grad(self.descent(self.x, w).pow(3).sum(), w)
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-9)

    @pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")
    def test_hessian_of_the_outer_loss(self):
        def outer(w, solve):
            if solve:
                stationarity = lambda y, x: y - x + torch.sigmoid(y @ w) @ w.T + 0.1 * torch.sinh(y)  # noqa: E731
                y = root(stationarity, torch.zeros_like(self.x), (self.x,), rtol=1e-13).value
            else:
                y = self.descent(self.x, w, 200)
            return y.pow(2).sum()

        v = torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=D)
        products = [
            torch.func.jvp(torch.func.grad(lambda w: outer(w, solve)), (self.w,), (v,))[1]  # noqa: B023
            for solve in (True, False)
        ]
        torch.testing.assert_close(*products, rtol=1e-7, atol=1e-8)


class TestDeepDeclarativeNode:
    """y = argmin |y - x|^2 / 2 subject to h(y; a) = 0, through the root of its KKT system."""

    @staticmethod
    def constraint(y, a):
        """On an ellipsoid."""
        return (a * y.square()).sum(dim=1, keepdim=True) - 1

    def kkt(self, state, x, a):
        y, multiplier = state
        # The constraint's gradient is 2 a y.
        return y - x + multiplier * 2 * a * y, self.constraint(y, a)

    def project(self, x, a, **options):
        start = x / (a * x.square()).sum(dim=1, keepdim=True).sqrt()
        multiplier = ((x - start) * (2 * a * start)).sum(dim=1, keepdim=True) / (2 * a * start).square().sum(
            1, keepdim=True
        )
        start, multiplier = start.detach(), multiplier.detach()
        return root(self.kkt, (start, multiplier), (x, a), rtol=1e-14, max_steps=100, **options)

    g = torch.Generator().manual_seed(12)
    x = torch.randn(3, 4, generator=g, dtype=D) * 1.5
    a = 0.5 + torch.rand(3, 4, generator=g, dtype=D)

    def test_gradcheck(self):
        x, a = self.x.clone().requires_grad_(), self.a.clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda x, a: self.project(x, a).value, (x, a))

    def test_gradgradcheck(self):
        x, a = self.x[:1].clone().requires_grad_(), self.a[:1].clone().requires_grad_()
        adjoint = ImplicitAdjoint(order=2)
        assert torch.autograd.gradgradcheck(
            lambda x, a: self.project(x, a, adjoint=adjoint).value, (x, a), fast_mode=True
        )

    def test_is_the_minimum_on_the_constraint(self):
        solution = self.project(self.x, self.a)
        y, multiplier = solution.value
        assert solution.converged.all()
        torch.testing.assert_close((self.a * y.square()).sum(dim=1), torch.ones(3, dtype=D))
        # Second-order condition: 1 + 2 lambda a is positive, so the Lagrangian is convex.
        assert (1 + 2 * multiplier * self.a > 0).all()

    def test_gradient_is_the_formula_of_the_paper(self):
        """Proposition 4.5 of Gould, Hartley and Campbell: H^-1 less its part along the constraint."""
        x = self.x.clone().requires_grad_()
        y, multiplier = self.project(x, self.a).value
        rows = [torch.autograd.grad(y[:, i].sum(), x, retain_graph=True)[0] for i in range(4)]
        got = torch.stack(rows, dim=1)
        inverse = torch.diag_embed(1 / (1 + 2 * multiplier.detach() * self.a))
        normal = (2 * self.a * y.detach()).unsqueeze(2)
        along = inverse @ normal
        expected = inverse - along @ along.mT / (normal.mT @ along)
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-11)


class TestInitialisation:
    """A start that is learnt, or taken over, saves evaluations and changes no result."""

    g = torch.Generator().manual_seed(21)
    w = torch.randn(10, 10, generator=g, dtype=D)
    w = w * (0.85 / torch.linalg.matrix_norm(w, 2))
    train, test = torch.randn(400, 10, generator=g, dtype=D), torch.randn(60, 10, generator=g, dtype=D)

    def solve(self, x, z0=None, solver=None):
        z0 = torch.zeros_like(x) if z0 is None else z0
        return fixed_point(lambda z, x: torch.tanh(z @ self.w + x), z0, (x,), solver=solver, rtol=1e-8, max_steps=200)

    @pytest.mark.parametrize("solver", [Picard(), Anderson(), Broyden(), Newton()], ids=lambda s: type(s).__name__)
    def test_learnt_by_regression(self, solver):
        """z0 = x M + b, fitted to rest points of other inputs by least squares."""
        features = lambda x: torch.cat([x, torch.tanh(x), torch.ones(len(x), 1, dtype=D)], dim=1)  # noqa: E731
        with torch.no_grad():
            fitted = torch.linalg.lstsq(features(self.train), self.solve(self.train).value).solution
            cold, warm = (
                self.solve(self.test, None, solver),
                self.solve(self.test, features(self.test) @ fitted, solver),
            )
        assert warm.stats.evaluations.sum() < cold.stats.evaluations.sum()
        torch.testing.assert_close(warm.value, cold.value, rtol=1e-6, atol=1e-6)

    def test_learnt_by_gradient_descent_through_unrolling(self):
        """The derivative with respect to the start is zero at a rest point, so a few unrolled steps train it."""
        matrix = torch.zeros(10, 10, dtype=D, requires_grad=True)
        optimiser = torch.optim.Adam([matrix], lr=0.05)
        target = self.solve(self.train).value
        for _ in range(60):
            value = fixed_point(
                lambda z, x: torch.tanh(z @ self.w + x), torch.tanh(self.train @ matrix), (self.train,),
                solver=Picard(), adjoint=UnrollAdjoint(), rtol=0.0, max_steps=2,
            ).value  # fmt: skip
            optimiser.zero_grad()
            (value - target).square().mean().backward()
            optimiser.step()
        with torch.no_grad():
            cold = self.solve(self.test, None, Picard())
            warm = self.solve(self.test, torch.tanh(self.test @ matrix), Picard())
        assert warm.stats.evaluations.double().mean() < cold.stats.evaluations.double().mean() - 1

    def test_implicit_gradient_towards_the_start_is_none(self):
        z0 = torch.zeros(60, 10, dtype=D, requires_grad=True)
        x = self.test.clone().requires_grad_()
        value = self.solve(x, z0).value
        assert torch.autograd.grad(value.sum(), z0, allow_unused=True)[0] is None

    def test_of_the_solution_before(self):
        with torch.no_grad():
            before = self.solve(self.test)
            after = self.solve(self.test + 1e-4, before)
        assert (after.stats.evaluations < before.stats.evaluations).all()
