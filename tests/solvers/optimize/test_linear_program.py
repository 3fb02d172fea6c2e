"""linear_program: vertices, duals, smoothed programmes, PDHG with dense and sparse constraints."""

import numpy as np
import pytest
import scipy.optimize
import scipy.sparse
import torch
from torch.autograd import gradcheck, gradgradcheck

from restpoint.solvers import PDHG, CentralPath, InteriorPoint, SolverWarning, Status, linear_program, quadratic_program
from tests.solvers.optimize.quadratic_problems import D, linear, quadratic, times, violation

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")


def requiring(*tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


def reference(c, G, h, A, b):
    found = scipy.optimize.linprog(c, G, h, A, b, bounds=(None, None))
    return found.fun, found.x


def csr(matrix):
    matrix = scipy.sparse.csr_matrix(matrix)
    parts = (matrix.indptr.astype(np.int64), matrix.indices.astype(np.int64), matrix.data)
    return torch.sparse_csr_tensor(*map(torch.from_numpy, parts), matrix.shape, check_invariants=True)


@pytest.mark.parametrize("solver", [InteriorPoint(), PDHG()], ids=["interior point", "pdhg"])
class TestVertex:
    def test_agrees_with_scipy(self, solver):
        problem = linear(5, 10, 25, 3)
        ours = linear_program(*problem, solver=solver)
        assert ours.converged.all()
        for i in range(5):
            value, x = reference(*[t[i].numpy() for t in problem])
            assert abs(value - float(ours.objective[i])) < 1e-5
            np.testing.assert_allclose(ours.value[i], x, atol=1e-5)

    def test_closes_the_gap(self, solver):
        c, G, h, A, b = linear(20, 12, 30, 2)
        solution = linear_program(c, G, h, A, b, solver=solver)
        z, y = solution.duals
        gap = solution.objective + (h * z).sum(1) + (b * y).sum(1)
        assert gap.abs().max() < 1e-10
        assert (times(G, solution.value) - h).max() < 1e-12
        assert (c + times(G.mT, z) + times(A.mT, y)).abs().max() < 1e-11
        assert z.min() >= 0

    def test_derivatives(self, solver):
        problem = requiring(*linear(2, 5, 9, 1))

        def exact(*given):
            solution = linear_program(*given, solver=solver)
            return solution.objective, *solution.duals

        assert gradcheck(exact, problem, fast_mode=True)
        c, *rest = problem
        assert gradcheck(lambda *a: linear_program(c.detach(), *a, solver=solver).value, rest, fast_mode=True)
        assert gradgradcheck(lambda *a: linear_program(c.detach(), *a, solver=solver).value, rest, fast_mode=True)


class TestTowardsTheObjective:
    """The vertex does not move with c: never a silent zero."""

    def test_backward_raises_and_says_what_to_do(self):
        problem = requiring(*linear(2, 5, 9, 1))
        for quantity in ("value", "slack"):
            with pytest.raises(RuntimeError, match=r"adjoint=CentralPath\(barrier\)"):
                getattr(linear_program(*problem), quantity).sum().backward()

    def test_so_do_transforms(self):
        c, *rest = (t[0] for t in linear(1, 5, 9, 1))
        for transform in (torch.func.jacrev, torch.func.jacfwd):
            with pytest.raises(RuntimeError, match="is a vertex"):
                transform(lambda c: linear_program(c, *rest).value)(c)
        gradient = torch.func.grad(lambda c: linear_program(c, *rest).objective.sum())(c)
        torch.testing.assert_close(gradient, linear_program(c, *rest).value[0], rtol=0, atol=1e-12)

    def test_a_constant_objective_is_no_obstacle(self):
        c, G, h, A, b = linear(2, 5, 9, 1)
        h.requires_grad_()
        linear_program(c, G, h, A, b).value.sum().backward()
        assert h.grad.abs().max() > 0

    def test_smoothed(self):
        problem = requiring(*linear(2, 4, 8, 1))

        def smooth(*given):
            solution = linear_program(*given, adjoint=CentralPath(0.1))
            return solution.value, solution.objective

        assert gradcheck(smooth, problem, fast_mode=True)
        assert gradgradcheck(smooth, problem, fast_mode=True)
        c = problem[0]
        (gradient,) = torch.autograd.grad(linear_program(*problem, adjoint=CentralPath(0.1)).value.square().sum(), c)
        assert gradient.abs().max() > 1e-3

    def test_smoothed_argmax(self):
        """Over the simplex: x_i = barrier / (y - c_i), with y such that the sum is one; argmax as the barrier falls."""
        scores = torch.tensor([[1.0, 3.0, 2.0]], dtype=D, requires_grad=True)
        simplex = (-torch.eye(3, dtype=D), torch.zeros(3, dtype=D), torch.ones(1, 3, dtype=D), torch.ones(1, dtype=D))
        soft = linear_program(-scores, *simplex, adjoint=CentralPath(0.5))
        pushes = 0.5 / soft.value
        torch.testing.assert_close(pushes - pushes[:, :1], scores[:, :1] - scores, rtol=0, atol=1e-9)
        hard = linear_program(-scores.detach(), *simplex).value
        torch.testing.assert_close(hard, torch.tensor([[0.0, 1, 0]], dtype=D), rtol=0, atol=1e-12)
        near = linear_program(-scores, *simplex, adjoint=CentralPath(1e-6)).value
        torch.testing.assert_close(near, hard, rtol=0, atol=1e-5)


class TestFailures:
    def test_an_optimum_that_is_not_unique(self):
        """The gradient towards the bound of a face that the objective is indifferent on does not exist."""
        box = torch.cat([torch.eye(2, dtype=D), -torch.eye(2, dtype=D)])
        c = torch.tensor([[1.0, 0.0]], dtype=D)
        h = torch.ones(1, 4, dtype=D, requires_grad=True)
        solution = linear_program(c, box, h)
        assert solution.converged.all()
        torch.testing.assert_close(solution.objective, -torch.ones(1, dtype=D))
        with pytest.warns(SolverWarning, match="not unique"):
            solution.value.sum().backward()

    @pytest.mark.parametrize("solver", [InteriorPoint(), PDHG()], ids=["interior point", "pdhg"])
    def test_infeasible_and_unbounded(self, solver):
        G = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, -1.0]], dtype=D).expand(3, 3, 2)
        h = torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0], [1.0, 0.0, 0.0]], dtype=D)
        c = torch.tensor([[-1.0, 1.0], [1.0, 1.0], [0.0, -1.0]], dtype=D)
        solution = linear_program(c, G, h, solver=solver, max_steps=None if solver == InteriorPoint() else 2000)
        assert solution.stats.status.tolist() == [Status.CONVERGED, Status.INFEASIBLE, Status.UNBOUNDED]
        torch.testing.assert_close(solution.value[0], torch.tensor([1.0, 0.0], dtype=D), rtol=0, atol=1e-10)
        assert solution.value[1:].isnan().all()

    def test_names_its_own_arguments(self):
        with pytest.raises(ValueError, match=r"c: expected shape \(batch, n\) or \(n,\)"):
            linear_program(torch.ones(()))
        with pytest.raises(ValueError, match=r"G: expected shape \(m, n\)"):
            linear_program(torch.ones(3), torch.ones(2, 4), torch.ones(2))

    def test_pdhg_is_for_linear_programmes(self):
        with pytest.raises(ValueError, match="quadratic objective"):
            quadratic_program(*quadratic(1, 3, 3, 1), solver=PDHG())
        with pytest.raises(ValueError, match="restart must be between"):
            PDHG(restart=1.0)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
class TestSparse:
    def test_small_ones_are_solved_exactly(self):
        c, G, h, A, b = linear(3, 8, 20, 2)
        h = times(G[0], times(torch.linalg.pinv(A), b)) + 0.5
        b = times(A[0], times(torch.linalg.pinv(A), b))
        # The objective is bounded on all samples' sets.
        c = -times(G[0].mT, torch.rand(3, 20, dtype=D))
        h, b = requiring(h, b)
        sparse = linear_program(c, csr(G[0]), h, csr(A[0]), b)
        dense = linear_program(c, G[0], h, A[0], b)
        torch.testing.assert_close(sparse.value, dense.value, rtol=0, atol=1e-10)
        ours, theirs = (torch.autograd.grad(s.value.square().sum(), (h, b)) for s in (sparse, dense))
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)

    def test_large_ones_to_the_tolerance(self):
        n, rows = 400, 300
        random = scipy.sparse.random(rows, n, density=0.02, random_state=0, format="csr")
        G = scipy.sparse.vstack([random, scipy.sparse.eye(n), -scipy.sparse.eye(n)])
        g = torch.Generator().manual_seed(0)
        h = 0.1 + torch.rand(len(G.toarray()), generator=g, dtype=D)
        c = torch.randn(2, n, generator=g, dtype=D)
        c, h = requiring(c, h)
        solution = linear_program(c, csr(G), h, rtol=1e-6)
        assert solution.converged.all()
        for i in range(2):
            found = scipy.optimize.linprog(c[i].detach().numpy(), G, h.detach().numpy(), bounds=(None, None))
            assert abs(float(solution.objective[i].detach()) - found.fun) < 1e-5 * abs(found.fun)
        on_c, on_h = torch.autograd.grad(solution.objective.sum(), (c, h))
        assert torch.equal(on_c, solution.value.detach())
        torch.testing.assert_close(on_h, -solution.duals.inequality.detach().sum(0))
        with pytest.raises(RuntimeError, match="only solution.objective is differentiable"):
            linear_program(c.detach(), csr(G), h, rtol=1e-2).value.sum().backward()
        again = linear_program(c, csr(G), h, rtol=1e-6, start=solution)
        assert (again.stats.steps <= 40).all()

    def test_what_it_refuses(self):
        G = torch.eye(3, dtype=D).to_sparse_csr()
        with pytest.raises(ValueError, match="G requires a gradient"):
            linear_program(torch.ones(3, dtype=D), G.clone().requires_grad_(), torch.ones(3, dtype=D))
        large = scipy.sparse.eye(2000, format="csr")
        with pytest.raises(ValueError, match=r"are for PDHG\(\)"):
            linear_program(torch.ones(2000), csr(large), torch.ones(2000), solver=InteriorPoint())


@pytest.mark.parametrize("seed", range(3))
def test_small_integers_make_every_kind_of_degenerate_programme(seed):
    """Infeasible, unbounded, with ties and redundant rows: statuses and optima as scipy's."""
    rng = np.random.default_rng(seed)
    n, m, p = int(rng.integers(2, 7)), int(rng.integers(2, 14)), int(rng.integers(0, 3))
    shapes = ((20, n), (20, m, n), (20, m), (20, p, n), (20, p))
    c, G, h, A, b = (rng.integers(-2, 3, shape).astype(float) for shape in shapes)
    ours = linear_program(*[torch.from_numpy(t) for t in (c, G, h, A, b)])
    kinds = {0: Status.CONVERGED, 2: Status.INFEASIBLE, 3: Status.UNBOUNDED}
    for i in range(20):
        theirs = scipy.optimize.linprog(c[i], G[i], h[i], A[i], b[i], bounds=(None, None))
        # What is unbounded and has not been looked for a feasible point goes by either name there.
        feasible = scipy.optimize.linprog(0 * c[i], G[i], h[i], A[i], b[i], bounds=(None, None)).status == 0
        if theirs.status == 0 or not feasible:
            assert ours.stats.status[i] == kinds[theirs.status if theirs.status == 0 else 2]
        else:
            assert ours.stats.status[i] == Status.UNBOUNDED
        if theirs.status == 0:
            assert abs(float(ours.objective[i]) - theirs.fun) < 1e-6 * (1 + abs(theirs.fun))


@pytest.mark.parametrize("seed", range(3))
def test_small_integers_make_every_kind_of_degenerate_quadratic_programme(seed):
    rng = np.random.default_rng(seed)
    n, m = int(rng.integers(2, 7)), int(rng.integers(2, 14))
    root = rng.integers(-1, 2, (20, n, int(rng.integers(1, n + 1)))).astype(float)
    q, G, h = rng.integers(-2, 3, (20, n)), rng.integers(-2, 3, (20, m, n)), rng.integers(0, 4, (20, m))
    Q = torch.from_numpy(root @ root.transpose(0, 2, 1))
    q, G, h = (torch.from_numpy(t.astype(float)) for t in (q, G, h))
    solution = quadratic_program(Q, q, G, h)
    ended = solution.converged
    assert ((solution.stats.status == Status.UNBOUNDED) | ended).all()
    rays = solution.certificate.ray[~ended]
    assert (times(Q[~ended], rays).abs() < 1e-8).all() and (times(G[~ended], rays) < 1e-8).all()
    assert ((q[~ended] * rays).sum(1) < -1e-8).all()
    problem = (Q, q, G, h, torch.zeros(20, 0, n, dtype=D), torch.zeros(20, 0, dtype=D))
    assert (violation(problem, solution)[ended] < 1e-9).all()


def test_slopes_of_a_degenerate_optimum_are_a_dual_optimum():
    """Three bounds meet in the plane: multipliers that are least, but of a wrong sign, would be no slope at all."""
    c = torch.tensor([-1.0, 0.0], dtype=D)
    # x <= 1, y <= 1, x + y <= 2, x - 3 y <= -2: all four meet in (1, 1).
    G = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, -3.0], [-1.0, 0.0], [0.0, -1.0]], dtype=D)
    h = torch.tensor([[1.0, 1.0, 2.0, -2.0, 5.0, 5.0]], dtype=D, requires_grad=True)
    solution = linear_program(c, G, h)
    (slope,) = torch.autograd.grad(-solution.objective.sum(), h)
    assert (slope >= 0).all()
    torch.testing.assert_close(slope @ G, -c[None], rtol=0, atol=1e-9)
    torch.testing.assert_close(slope, solution.duals.inequality.detach(), rtol=0, atol=1e-12)
