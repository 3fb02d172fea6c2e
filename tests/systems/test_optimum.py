"""Systems that are an optimum, on the public interface: KKT systems, layers, argmins, flows."""

import numpy as np
import pytest
import scipy.optimize
import torch
from torch.autograd import gradcheck, gradgradcheck

from restpoint.solvers import CentralPath, fixed_point, linear_program, minimize, quadratic_program, root, sparsemax
from restpoint.solvers.adjoint import UnrollAdjoint

D = torch.float64


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def simplex(n):
    """-x <= 0 and sum(x) = 1."""
    return -torch.eye(n, dtype=D), torch.zeros(n, dtype=D), torch.ones(1, n, dtype=D), torch.ones(1, dtype=D)


class TestSoftmaxThroughItsKKTSystem:
    """max theta'z + H(z) subject to z'1 = 1: the root of (log z + 1 - theta + u, z'1 - 1)."""

    @staticmethod
    def stationarity(point, theta):
        z, u = point
        return z.log() + 1 - theta + u, z.sum(1, keepdim=True) - 1

    def check(self, theta):
        theta = theta.requires_grad_()
        n = theta.shape[1]
        start = torch.full_like(theta, 1 / n), torch.zeros_like(theta[:, :1])
        z, u = root(self.stationarity, start, (theta,), rtol=1e-14, atol=1e-15, max_steps=200).value
        torch.testing.assert_close(z, theta.softmax(1), rtol=0, atol=1e-12)
        # The multiplier is logsumexp - 1 in this sign, whatever its sign.
        torch.testing.assert_close(u, theta.logsumexp(1, keepdim=True) - 1, rtol=0, atol=1e-11)
        rows = [torch.autograd.grad(z[:, i].sum(), theta, retain_graph=True)[0] for i in range(n)]
        p = theta.detach().softmax(1)
        exact = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
        torch.testing.assert_close(torch.stack(rows, 1), exact, rtol=0, atol=1e-10)

    def test_jacobian(self):
        self.check(0.5 * random(6, 5))

    def test_jacobian_where_the_multiplier_is_zero(self):
        """logsumexp(theta) = 1, where the row u (z'1 - 1) = 0 would make the system singular."""
        theta = 0.5 * random(6, 5)
        self.check(theta - theta.logsumexp(1, keepdim=True) + 1)

    def test_as_the_minimum_of_an_energy(self):
        theta = random(3, 4).requires_grad_()
        solution = minimize(
            lambda z, t: (z * z.clamp_min(1e-12).log() - t * z).sum(1), torch.full((3, 4), 0.25, dtype=D), (theta,),
            equality=lambda z, t: z.sum(1, keepdim=True) - 1, rtol=1e-12,
        )  # fmt: skip
        torch.testing.assert_close(solution.value, theta.softmax(1), rtol=0, atol=1e-9)
        weight = random(3, 4, seed=1)
        ours, theirs = (torch.autograd.grad((weight * p).sum(), theta)[0] for p in (solution.value, theta.softmax(1)))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-8)


class TestRegularisedArgmax:
    def test_sparsemax_three_ways(self):
        """The quadratic programme, the closed form, and the support's own formula."""
        theta = random(8, 6).requires_grad_()
        programme = quadratic_program(torch.eye(6, dtype=D), -theta, *simplex(6))
        closed = sparsemax(theta)
        torch.testing.assert_close(programme.value, closed, rtol=0, atol=1e-9)
        support = (closed > 0).to(D).detach()
        assert (support.sum(1) < 6).any()
        exact = torch.diag_embed(support) - support.unsqueeze(2) * support.unsqueeze(1) / support.sum(1)[:, None, None]
        for value in (programme.value, closed):
            rows = [torch.autograd.grad(value[:, i].sum(), theta, retain_graph=True)[0] for i in range(6)]
            torch.testing.assert_close(torch.stack(rows, 1), exact, rtol=0, atol=1e-9)

    def test_argmax_without_regularisation_is_never_a_silent_zero(self):
        theta = random(3, 4).requires_grad_()
        hard = linear_program(-theta, *simplex(4))
        torch.testing.assert_close(
            hard.value.detach(), torch.nn.functional.one_hot(theta.argmax(1), 4).to(D), rtol=0, atol=1e-10
        )
        with pytest.raises(RuntimeError, match="CentralPath"):
            hard.value[:, 0].sum().backward()
        smooth = linear_program(-theta, *simplex(4), adjoint=CentralPath(0.2)).value
        (gradient,) = torch.autograd.grad(smooth[:, 0].sum(), theta)
        assert (gradient.abs() > 1e-4).all()


class TestOptNet:
    """min 1/2 z'Qz + q'z subject to Az = b and Gz <= h, all six learnable; the row of the equations is Az - b = 0."""

    def problem(self, shared):
        n, m, p, batch = 4, 3, 2, 3
        factor, q = random(batch, n, n, seed=1), random(batch, n, seed=2)
        G, A = random(batch, m, n, seed=3), random(batch, p, n, seed=4)
        if shared:
            factor, G, A = factor[0], G[0], A[0]
        h, b = 0.2 + random(batch, m, seed=5).abs(), torch.zeros(batch, p, dtype=D)
        return [t.requires_grad_() for t in (factor, q, G, h, A, b)]

    @staticmethod
    def layer(factor, q, G, h, A, b):
        return quadratic_program(factor @ factor.mT + torch.eye(4, dtype=D), q, G, h, A, b)

    @pytest.mark.parametrize("shared", [False, True])
    def test_derivatives(self, shared):
        problem = self.problem(shared)
        assert gradcheck(lambda *p: self.layer(*p).value, problem, fast_mode=True)
        assert gradgradcheck(lambda *p: self.layer(*p).value, problem, fast_mode=True)

    @pytest.mark.parametrize("shared", [False, True])
    def test_optimality_conditions(self, shared):
        factor, q, G, h, A, b = (t.detach() for t in self.problem(shared))
        solution = self.layer(factor, q, G, h, A, b)
        x, (z, y) = solution.value[..., None], solution.duals
        Q = factor @ factor.mT + torch.eye(4, dtype=D)
        conditions = [
            (Q @ x + G.mT @ z[..., None] + A.mT @ y[..., None])[..., 0] + q,
            (A @ x)[..., 0] - b,
            ((G @ x)[..., 0] - h).clamp_min(0),
            z * ((G @ x)[..., 0] - h),
        ]
        assert max(float(c.abs().max()) for c in conditions) < 1e-9


class TestGeneralConvexLayers:
    def test_a_quadratic_layer_agrees_with_a_general_solver(self):
        cvxpy = pytest.importorskip("cvxpy")
        n = 5
        target, G = random(1, n), random(6, n, seed=1)
        h = 0.3 + random(6, seed=2).abs()
        x = cvxpy.Variable(n)
        problem = cvxpy.Problem(
            cvxpy.Minimize(cvxpy.sum_squares(x - target[0].numpy()) / 2 + cvxpy.norm1(x)), [G.numpy() @ x <= h.numpy()]
        )
        problem.solve(solver="CLARABEL", tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12)
        ours = self.lasso_in_a_polytope(target, G, h)
        np.testing.assert_allclose(ours[0].detach(), x.value, atol=1e-7)

    @staticmethod
    def lasso_in_a_polytope(target, G, h):
        """argmin |x - target|^2 / 2 + |x|_1 subject to Gx <= h, with |x|_1 through bounds t >= x, t >= -x."""
        n, m, batch = target.shape[1], len(G), len(target)
        eye = torch.eye(n, dtype=D)
        Q = torch.block_diag(eye, torch.zeros(n, n, dtype=D))
        q = torch.cat([-target, torch.ones(batch, n, dtype=D)], 1)
        rows = torch.cat([torch.cat([G, torch.zeros(m, n, dtype=D)], 1), torch.cat([eye, -eye], 1),
                          torch.cat([-eye, -eye], 1)])  # fmt: skip
        return quadratic_program(Q, q, rows, torch.cat([h, torch.zeros(2 * n, dtype=D)])).value[:, :n]

    @pytest.mark.filterwarnings("ignore")
    def test_a_layer_agrees_with_cvxpylayers_at_tight_settings(self):
        """At its default settings it stops far earlier."""
        cvxpy, layers = pytest.importorskip("cvxpy"), pytest.importorskip("cvxpylayers.torch")
        target, G, h = random(3, 5).requires_grad_(), random(6, 5, seed=1), 0.3 + random(6, seed=2).abs()
        x, parameter = cvxpy.Variable(5), cvxpy.Parameter(5)
        objective = cvxpy.Minimize(cvxpy.sum_squares(x - parameter) / 2 + cvxpy.norm1(x))
        problem = cvxpy.Problem(objective, [G.numpy() @ x <= h.numpy()])
        layer = layers.CvxpyLayer(problem, parameters=[parameter], variables=[x])
        (theirs,) = layer(target, solver_args={"eps": 1e-12, "max_iters": 100_000})
        ours = self.lasso_in_a_polytope(target, G, h)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)
        grads = [torch.autograd.grad(value.square().sum(), target)[0] for value in (ours, theirs)]
        torch.testing.assert_close(*grads, rtol=0, atol=1e-6)

    def test_projection_onto_the_second_order_cone(self):
        """A cone's projection as the root of its optimality conditions, against the closed form."""
        point = torch.tensor([[0.5, 2.0, -1.0], [-0.2, 1.0, 0.5]], dtype=D, requires_grad=True)

        def distance(y, p):
            return (y - p).square().sum(1)

        # Outside of the cone and of its polar, the projection lies on the boundary.
        solution = minimize(
            distance, torch.tensor([[2.0, 1.5, -0.5], [1.0, 0.8, 0.4]], dtype=D), (point,),
            equality=lambda y, p: (y[:, 1:].norm(dim=1) - y[:, 0]).unsqueeze(1), rtol=1e-12,
        )  # fmt: skip
        size = point[:, 1:].norm(dim=1, keepdim=True)
        top = (point[:, :1] + size) / 2
        closed = torch.cat([top, top * point[:, 1:] / size], 1)
        torch.testing.assert_close(solution.value, closed, rtol=0, atol=1e-9)
        weight = random(2, 3)
        ours, theirs = (torch.autograd.grad((weight * v).sum(), point)[0] for v in (solution.value, closed))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-8)


class TestArgminDifferentiation:
    def test_of_an_energy_equals_unrolled_descent(self):
        """A structured prediction: a chain of labels whose neighbours attract each other, with learnable strength."""
        unary = random(4, 6).requires_grad_()
        strength = torch.tensor(0.7, dtype=D, requires_grad=True)

        def energy(y, unary):
            return (
                torch.nn.functional.softplus(y).sum(1) - (unary * y).sum(1) + 0.3 * y.square().sum(1)
                + strength * (y[:, 1:] - y[:, :-1]).square().sum(1)
            )  # fmt: skip

        def step(y, unary):
            with torch.enable_grad():
                y = y if y.requires_grad else y.detach().requires_grad_()
                return y - 0.2 * torch.autograd.grad(energy(y, unary).sum(), y, create_graph=True)[0]

        implicit = minimize(energy, torch.zeros(4, 6, dtype=D), (unary,), rtol=1e-13).value
        unrolled = fixed_point(
            step, torch.zeros(4, 6, dtype=D), (unary,), solver=None, adjoint=UnrollAdjoint(), rtol=0.0, max_steps=200
        ).value
        torch.testing.assert_close(implicit, unrolled, rtol=0, atol=1e-10)
        weight = random(4, 6, seed=1)
        ours, theirs = (torch.autograd.grad((weight * v).sum(), (unary, strength)) for v in (implicit, unrolled))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-8)

    def test_the_starting_point_teaches_nothing(self):
        start = random(2, 3).requires_grad_()
        value = minimize(lambda y: y.cosh().sum(1), start, rtol=1e-12).value
        assert not value.requires_grad

    def test_deep_declarative_node(self):
        """Robust weighted averages on the unit circle."""
        points = random(2, 5, 2).requires_grad_()

        def energy(y, points):
            return ((y.unsqueeze(1) - points).square().sum(2) + 1).sqrt().sum(1)

        def circle(y, points):
            return y.square().sum(1, keepdim=True) - 1

        start = torch.nn.functional.normalize(points.detach().mean(1), dim=1)

        def node(points):
            return minimize(energy, start, (points,), equality=circle, rtol=1e-13).value

        assert gradcheck(node, (points,), fast_mode=True)


class TestNetworkTraffic:
    """Maximum flow over paths under capacities of the edges they share."""

    EDGES = [("a", "b"), ("a", "c"), ("b", "c"), ("b", "d"), ("c", "d")]
    PATHS = [["ab", "bd"], ["ac", "cd"], ["ab", "bc", "cd"]]

    def incidence(self):
        names = ["".join(edge) for edge in self.EDGES]
        return torch.tensor([[float(name in path) for path in self.PATHS] for name in names], dtype=D)

    def programme(self, capacity):
        uses = self.incidence()
        G = torch.cat([uses, -torch.eye(3, dtype=D)])
        h = torch.cat([capacity, capacity.new_zeros(*capacity.shape[:-1], 3)], -1)
        return -torch.ones(3, dtype=D), G, h

    def test_primal_meets_dual(self):
        capacity = torch.tensor([[3.0, 2.0, 1.0, 1.5, 2.5], [1.0, 4.0, 2.0, 0.7, 3.3]], dtype=D)
        solution = linear_program(*self.programme(capacity))
        bound = (solution.duals.inequality[:, :5] * capacity).sum(1)
        torch.testing.assert_close(-solution.objective, bound, rtol=0, atol=1e-8)
        for i in range(2):
            c, G, h = self.programme(capacity[i])
            found = scipy.optimize.linprog(c.numpy(), G.numpy(), h.numpy(), bounds=(None, None))
            assert abs(float(solution.objective[i]) - found.fun) < 1e-8

    def test_the_duals_are_the_derivatives(self):
        capacity = torch.tensor([[3.0, 2.0, 1.0, 1.5, 2.7]], dtype=D, requires_grad=True)
        solution = linear_program(*self.programme(capacity))
        (gradient,) = torch.autograd.grad(-solution.objective.sum(), capacity)
        torch.testing.assert_close(gradient, solution.duals.inequality[:, :5].detach(), rtol=0, atol=1e-10)
        # An edge more of a bottleneck's capacity is an edge more of flow.
        for edge in range(5):
            more, less = (capacity.detach().clone() for _ in range(2))
            more[0, edge] += 1e-3
            less[0, edge] -= 1e-3
            values = [-linear_program(*self.programme(c)).objective for c in (more, less)]
            assert abs(float((values[0] - values[1]) / 2e-3 - gradient[0, edge])) < 1e-8

    def test_a_degenerate_optimum_is_reported(self):
        """Both routes are equally good for the shared bottleneck: how the flow is split has no derivative."""
        capacity = torch.tensor([[1.0, 5.0, 5.0, 5.0, 10.0]], dtype=D, requires_grad=True)
        solution = linear_program(*self.programme(capacity))
        assert solution.converged.all()
        with pytest.warns(UserWarning, match="not unique"):
            solution.value[:, 0].sum().backward()

    def test_learns_capacities_from_observed_flows(self):
        """A smoothed flow is differentiable in the capacities, and gradient descent recovers those that bind."""
        truth = torch.tensor([[3.0, 2.0, 1.0, 1.5, 2.5]], dtype=D)
        observed = linear_program(*self.programme(truth), adjoint=CentralPath(0.05)).value
        guess = torch.full((1, 5), 2.0, dtype=D, requires_grad=True)
        optimiser = torch.optim.Adam([guess], lr=0.1)
        for _ in range(50):
            optimiser.zero_grad()
            flows = linear_program(*self.programme(guess), adjoint=CentralPath(0.05), rtol=1e-6).value
            loss = (flows - observed).square().sum()
            loss.backward()
            optimiser.step()
        assert loss < 1e-3
