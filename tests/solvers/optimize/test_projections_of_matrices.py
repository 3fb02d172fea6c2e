import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from restpoint.solvers import SolverError, Status, project_birkhoff, project_simplex, sinkhorn
from restpoint.solvers.solution import MaxStepsWarning

# Forward-mode differentiation makes torch load decompositions that it scripts.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")

D = torch.float64


def scores_of(*shape, seed=0):
    return torch.randn(*shape, dtype=D, generator=torch.Generator().manual_seed(seed))


def marginals(batch, n, m):
    rng = torch.Generator().manual_seed(5)
    return [torch.rand(batch, k, dtype=D, generator=rng) + 0.5 for k in (n, m)]


def iterate(scores, rows, columns, steps):
    """Sinkhorn's iteration itself, in logarithms."""
    f, g = torch.zeros_like(rows), torch.zeros_like(columns)
    for _ in range(steps):
        f = rows.log() - (scores + g.unsqueeze(-2)).logsumexp(-1)
        g = columns.log() - (scores + f.unsqueeze(-1)).logsumexp(-2)
    return (scores + f.unsqueeze(-1) + g.unsqueeze(-2)).exp()


class TestSinkhorn:
    @pytest.mark.parametrize("temperature", [3.0, 1.0, 0.2])
    def test_against_the_iteration(self, temperature):
        x = scores_of(3, 4, 6)
        rows, columns = marginals(3, 4, 6)
        columns = columns * (rows.sum(1) / columns.sum(1)).unsqueeze(1)
        solution = sinkhorn(x, rows, columns, temperature=temperature, throw=True)
        torch.testing.assert_close(solution.value, iterate(x / temperature, rows, columns, 500), rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(solution.value.sum(-1), rows)
        torch.testing.assert_close(solution.value.sum(-2), columns, rtol=1e-8, atol=0)

    def test_doubly_stochastic_by_default(self):
        p = sinkhorn(scores_of(2, 3, 5, 5)).value
        assert p.shape == (2, 3, 5, 5)
        for dim in (-1, -2):
            torch.testing.assert_close(p.sum(dim), torch.ones(2, 3, 5, dtype=D))
        torch.testing.assert_close(sinkhorn(scores_of(3, 6)).value.sum(-2), torch.full((6,), 0.5, dtype=D))

    def test_an_assignment_as_the_temperature_falls(self):
        from scipy.optimize import linear_sum_assignment

        x = scores_of(6, 8, 8)
        for dtype in (torch.float32, D):
            solution = sinkhorn(x.to(dtype), temperature=2e-3, throw=True)
            for p, s in zip(solution.value, x, strict=True):
                rows, columns = linear_sum_assignment(s.numpy(), maximize=True)
                assert p[rows, columns].min() > 0.9

    def test_float32_gradient_at_low_temperature(self):
        x, w = scores_of(4, 8, 8), scores_of(8, 8, seed=1)
        found = []
        for dtype in (torch.float32, D):
            leaf = x.float().to(dtype).requires_grad_()
            found.append(torch.autograd.grad((sinkhorn(leaf, temperature=0.02).value * w).sum(), leaf)[0].double())
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)

    def test_derivatives(self):
        x, heat = scores_of(1, 2, 3).requires_grad_(), torch.tensor(0.6, dtype=D, requires_grad=True)
        rows, columns = (t.requires_grad_() for t in marginals(1, 2, 3))

        def plan(x, rows, columns, heat):
            return sinkhorn(x, rows, columns, temperature=heat, rtol=1e-13).value

        assert gradcheck(plan, (x, rows, columns, heat), check_forward_ad=True)
        assert gradgradcheck(plan, (x, rows, columns, heat), check_fwd_over_rev=True)

    def test_a_third_derivative(self):
        """Of a 2 x 2 plan, which is a logistic function."""
        t = torch.tensor(0.7, dtype=D)

        def corner(t):
            zero = torch.zeros((), dtype=D)
            return sinkhorn(torch.stack([t, zero, zero, zero]).reshape(2, 2)).value[0, 0]

        f, g = corner, lambda t: torch.sigmoid(t / 2)
        for _ in range(4):
            torch.testing.assert_close(f(t), g(t), rtol=1e-8, atol=1e-10)
            f, g = torch.func.grad(f), torch.func.grad(g)
        leaf = t.clone().requires_grad_()
        value, wanted = corner(leaf), torch.sigmoid(leaf / 2)
        for _ in range(3):
            (value,) = torch.autograd.grad(value, leaf, create_graph=True)
            (wanted,) = torch.autograd.grad(wanted, leaf, create_graph=True)
            torch.testing.assert_close(value, wanted, rtol=1e-8, atol=1e-10)

    def test_torch_func(self):
        x = scores_of(3, 4, 4)

        def norm(s):
            return sinkhorn(s, temperature=0.5, rtol=1e-12).value.square().sum()

        torch.testing.assert_close(torch.func.vmap(norm)(x), torch.stack([norm(s) for s in x]))
        hessian = torch.autograd.functional.hessian(norm, x[0])
        torch.testing.assert_close(torch.func.hessian(norm)(x[0]), hessian)
        torch.testing.assert_close(torch.func.jacrev(torch.func.jacrev(norm))(x[0]), hessian)
        torch.testing.assert_close(torch.func.vmap(torch.func.hessian(norm))(x)[0], hessian)

    def test_excluded_entries(self):
        x = scores_of(5, 5).masked_fill(torch.ones(5, 5).triu(2).bool(), -torch.inf)
        solution = sinkhorn(x, throw=True)
        assert (solution.value[x == -torch.inf] == 0).all()
        torch.testing.assert_close(solution.value.sum(-2), torch.ones(5, dtype=D))
        # Two rows that want the same one column.
        impossible = torch.zeros(1, 3, 3, dtype=D)
        impossible[0, :2, 1:] = -torch.inf
        with pytest.raises(SolverError, match="sample 0, used up max_steps"):
            sinkhorn(impossible, throw=True)
        with pytest.warns(MaxStepsWarning):
            sinkhorn(impossible, throw="warn")

    def test_samples_do_not_touch_each_other(self):
        x = scores_of(4, 5, 5)
        broken = x.clone()
        broken[1, 0, 0] = torch.nan
        solution, alone = sinkhorn(broken), sinkhorn(x)
        assert solution.stats.status.tolist() == [
            Status.CONVERGED,
            Status.NON_FINITE,
            Status.CONVERGED,
            Status.CONVERGED,
        ]
        kept = [0, 2, 3]
        assert torch.equal(solution.value[kept], alone.value[kept])
        assert solution.stats.steps[kept].equal(alone.stats.steps[kept])

    def test_errors(self):
        x = scores_of(2, 3, 4)
        with pytest.raises(ValueError, match=r"sinkhorn: rows must be positive and finite; got 0"):
            sinkhorn(x, torch.tensor([1.0, 0.0, 1.0]))
        with pytest.raises(ValueError, match=r"temperature must be positive and finite; got -1"):
            sinkhorn(x, temperature=-1)
        with pytest.raises(ValueError, match=r"temperature has to broadcast to shape \(2, 1, 1\); got \(3,\)"):
            sinkhorn(x, temperature=torch.ones(3))
        with pytest.raises(ValueError, match=r"max_steps must be at least 1"):
            sinkhorn(x, max_steps=0)
        x[1, :, 2] = -torch.inf
        with pytest.raises(ValueError, match=r"column 2 of sample 1 has no entry above -inf"):
            sinkhorn(x)
        with pytest.raises(ValueError, match=r"non-empty matrix"):
            sinkhorn(torch.zeros(2, 0, 3))


@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (3, 20), (20, 3), (12, 12)], ids=str)
@pytest.mark.parametrize("scale", [0.2, 20.0, 200.0])
def test_uneven_sums(shape, scale):
    """Marginals that differ by a factor of a thousand, and scores by far more than any of them."""
    rng = torch.Generator().manual_seed(2)
    x = scale * scores_of(4, *shape)
    rows, columns = (torch.rand(4, k, dtype=D, generator=rng) ** 4 + 1e-3 for k in shape)
    columns = columns * (rows.sum(1) / columns.sum(1)).unsqueeze(1)
    for balance in (sinkhorn, project_birkhoff):
        solution = balance(x, rows, columns, throw=True)
        torch.testing.assert_close(solution.value.sum(-1), rows)
        assert ((solution.value.sum(-2) - columns).abs().sum(-1) < 1e-8 * columns.sum(-1)).all()
        alone = balance(x[2:3], rows[2:3], columns[2:3])
        torch.testing.assert_close(solution.value[2:3], alone.value, rtol=1e-6, atol=1e-8)


class TestBirkhoff:
    @pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
    def test_against_alternating_projections(self, scale):
        """Dykstra's: the nearest point of the intersection of row-wise and column-wise simplices."""
        x = scores_of(3, 4, 4)
        p, of_rows, of_columns = scale * x, 0.0, 0.0
        for _ in range(400):
            q = project_simplex(p + of_rows, dim=-1)
            of_rows = p + of_rows - q
            p = project_simplex(q + of_columns, dim=-2)
            of_columns = q + of_columns - p
        solution = project_birkhoff(scale * x, throw=True)
        torch.testing.assert_close(solution.value, p, rtol=0, atol=1e-6)

    def test_optimal_at_any_scale(self):
        """No vertex, which is a permutation, lies beyond it in the direction of the point."""
        from scipy.optimize import linear_sum_assignment

        for scale in (0.1, 1.0, 100.0, 1e4):
            x = scale * scores_of(5, 12, 12)
            solution = project_birkhoff(x, throw=True)
            for p, s in zip(solution.value, x, strict=True):
                beyond = s - p
                rows, columns = linear_sum_assignment(beyond.numpy(), maximize=True)
                assert beyond[rows, columns].sum().item() == pytest.approx((beyond * p).sum().item(), abs=1e-6 * scale)
                assert p.min() >= 0
                torch.testing.assert_close(p.sum(0), torch.ones(12, dtype=D), rtol=0, atol=1e-7)

    def test_idempotent_and_sparse(self):
        p = project_birkhoff(3 * scores_of(4, 7, 7)).value
        assert (p == 0).double().mean() > 0.4
        torch.testing.assert_close(project_birkhoff(p).value, p, rtol=0, atol=1e-7)

    def test_derivatives(self):
        x = scores_of(1, 2, 3).requires_grad_()
        rows, columns = (t.requires_grad_() for t in marginals(1, 2, 3))

        def projected(x, rows, columns):
            return project_birkhoff(x, rows, columns, rtol=1e-13).value

        assert gradcheck(projected, (x, rows, columns), check_forward_ad=True)
        assert gradgradcheck(projected, (x, rows, columns), check_fwd_over_rev=True)

    def test_derivative_where_the_support_falls_apart(self):
        """At a permutation nothing moves."""
        x = 100 * torch.eye(4, dtype=D)[[2, 0, 3, 1]] + scores_of(4, 4)
        assert (torch.func.jacrev(lambda s: project_birkhoff(s).value)(x).abs() < 1e-9).all()
        pair = torch.block_diag(scores_of(2, 2) / 5, scores_of(2, 2, seed=1) / 5) * 0.1 + 50 * torch.block_diag(
            torch.ones(2, 2, dtype=D), torch.ones(2, 2, dtype=D)
        )
        jacobian = torch.func.jacrev(lambda s: project_birkhoff(s).value)(pair)
        own = torch.tensor([[1.0, -1], [-1, 1]], dtype=D) / 2
        torch.testing.assert_close(jacobian[0, 0, :2, :2], own / 2)
        assert (jacobian[0, 0, 2:].abs() < 1e-9).all()
