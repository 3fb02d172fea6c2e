"""quadratic_program where others break: degenerate, ill-conditioned, without an optimum, or not a programme at all."""

import pytest
import torch

from restpoint.solvers import InteriorPoint, SolverError, SolverWarning, Status, quadratic_program
from tests.solvers.optimize.quadratic_problems import D, generator, quadratic, times, violation

N, BATCH = 20, 16


def problem(seed=0):
    return quadratic(BATCH, N, N, 4, seed)


def gradients(given, *, rows=slice(None)):
    given = [t.detach().clone().requires_grad_() for t in given]
    solution = quadratic_program(*given)
    weight = torch.randn(BATCH, N, generator=generator(5), dtype=D)
    (solution.value[rows] * weight[rows]).sum().backward()
    return solution, [t.grad for t in given]


class TestDegenerate:
    def test_duplicate_rows(self):
        Q, q, G, h, A, b = problem()
        twice = [Q, q, *(torch.cat([t, t], 1) for t in (G, h, A, b))]
        once, expected = gradients((Q, q, G, h, A, b))
        solution, found = gradients(twice)
        assert solution.converged.all()
        torch.testing.assert_close(solution.value, once.value, rtol=0, atol=1e-10)
        for single, double in zip(expected, found, strict=True):
            # What the two copies of a row feel together is what the row alone felt.
            halves = (
                double if double.shape == single.shape else double[:, : single.shape[1]] + double[:, single.shape[1] :]
            )
            torch.testing.assert_close(halves, single, rtol=1e-8, atol=1e-8)

    def test_more_active_constraints_than_dimensions(self):
        """A cone's tip, in which all of the rows meet."""
        G = torch.randn(4, 12, 5, generator=generator(1), dtype=D)
        q = -times(G.mT, 0.1 + torch.rand(4, 12, generator=generator(2), dtype=D))
        given = (torch.eye(5, dtype=D).expand(4, 5, 5), -q, -G, torch.zeros(4, 12, dtype=D))
        q = given[1].clone().requires_grad_()
        solution = quadratic_program(given[0], q, *given[2:])
        assert solution.converged.all()
        assert violation((*given, G[:, :0], G[:, :0, 0]), solution).max() < 1e-8

    def test_semidefinite(self):
        _, _, G, h, A, b = problem()
        factor = torch.randn(BATCH, N, 6, generator=generator(3), dtype=D)
        q = -times(G.mT, torch.rand(BATCH, N, generator=generator(4), dtype=D))
        given = (factor @ factor.mT, q, G, h, A, b)
        solution = quadratic_program(*given)
        assert solution.converged.all()
        assert violation(given, solution).max() < 1e-9

    def test_semidefinite_but_for_rounding(self):
        """In float32 a product of low rank has negative eigenvalues."""
        _, _, G, h, A, b = problem()
        factor = torch.randn(BATCH, N, 6, generator=generator(3))
        q = -times(G.mT, torch.rand(BATCH, N, generator=generator(4), dtype=D))
        solution = quadratic_program(factor @ factor.mT, q.float(), *(t.float() for t in (G, h, A, b)))
        exact = quadratic_program(factor.to(D) @ factor.to(D).mT, q, G, h, A, b)
        assert solution.converged.all()
        torch.testing.assert_close(solution.objective.to(D), exact.objective, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("polish", [True, False])
    def test_an_optimum_that_is_not_unique_is_found_and_its_gradient_refused(self, polish):
        zero, one = torch.zeros(1, 1, dtype=D), torch.ones(1, 2, dtype=D)
        Q = torch.diag_embed(torch.tensor([[1.0, 0.0]], dtype=D))
        q = torch.zeros(1, 2, dtype=D, requires_grad=True)
        box = torch.cat([torch.eye(2, dtype=D), -torch.eye(2, dtype=D)])
        solution = quadratic_program(Q, q, box, torch.ones(4, dtype=D), solver=InteriorPoint(polish=polish))
        assert solution.converged.all()
        assert zero.abs() <= 1 and (solution.value.abs() <= one).all()
        if polish:
            with pytest.warns(SolverWarning, match="not unique"):
                solution.value.sum().backward()

    @pytest.mark.parametrize("digits", [4, 8])
    def test_condition(self, digits):
        Q, _, G, h, A, b = problem()
        basis = torch.linalg.qr(torch.randn(BATCH, N, N, generator=generator(3), dtype=D))[0]
        Q = basis * torch.logspace(-digits, 0, N, dtype=D) @ basis.mT
        Q = (Q + Q.mT) / 2
        q = times(Q, torch.randn(BATCH, N, generator=generator(6), dtype=D))
        solution, found = gradients((Q, q, G, h, A, b))
        assert solution.converged.all()
        assert violation((Q, q, G, h, A, b), solution).max() < 1e-11
        # The same in the units in which Q is nearly the identity: rows of Q x + ... = 0 divided by its eigenvalues.
        scale = basis * torch.logspace(digits / 2, 0, N, dtype=D)
        eye = scale.mT @ Q @ scale
        easy = quadratic_program((eye + eye.mT) / 2, times(scale.mT, q), G @ scale, h, A @ scale, b)
        torch.testing.assert_close(times(scale, easy.value), solution.value, rtol=1e-9, atol=1e-9)
        assert all(torch.isfinite(g).all() for g in found)

    def test_condition_in_float32(self):
        Q = torch.diag_embed(torch.logspace(-8, 0, N, dtype=D)).expand(BATCH, N, N)
        _, q, G, h, A, b = problem()
        q = times(Q, q)
        narrow = [t.float() for t in (Q, q, G, h, A, b)]
        wide = [t.to(D) for t in narrow]
        exact, solution = quadratic_program(*wide), quadratic_program(*narrow)
        assert solution.converged.all()
        assert torch.equal(solution.value, exact.value.float())

    def test_scales(self):
        """Rows and objectives in any units."""
        Q, q, G, h, A, b = problem()
        exact = quadratic_program(Q, q, G, h, A, b).value
        rows = torch.logspace(-6, 6, N, dtype=D)
        scaled = quadratic_program(1e8 * Q, 1e8 * q, rows[:, None] * G, rows * h, 1e-5 * A, 1e-5 * b)
        assert scaled.converged.all()
        torch.testing.assert_close(scaled.value, exact, rtol=0, atol=1e-9)


class TestNoOptimum:
    """One sample breaks; the others keep their solution and their gradients, to shared parameters too."""

    def check_the_others(self, given, solution, bad, status):
        others = [i for i in range(BATCH) if i != bad]
        assert solution.stats.status[bad] == status
        assert solution.converged[others].all()
        assert solution.value[bad].isnan().all()
        alone = quadratic_program(*[t[others] for t in given])
        torch.testing.assert_close(solution.value[others], alone.value, rtol=0, atol=1e-10)
        _, found = gradients(given, rows=others)
        for grad in found:
            assert torch.isfinite(grad).all()
            assert (grad[bad] == 0).all()

    def test_infeasible_inequalities(self):
        Q, q, G, h, A, b = problem()
        G[3, 1], h[3, 0], h[3, 1] = -G[3, 0], -1.0, -1.0
        solution = quadratic_program(Q, q, G, h, A, b)
        self.check_the_others((Q, q, G, h, A, b), solution, 3, Status.INFEASIBLE)
        self.check_farkas((G, h, A, b), solution, 3)

    def test_contradicting_equations(self):
        Q, q, G, h, A, b = problem()
        A, b = torch.cat([A, A], 1), torch.cat([b, b], 1)
        b[5, -1] += 1
        solution = quadratic_program(Q, q, G, h, A, b)
        self.check_the_others((Q, q, G, h, A, b), solution, 5, Status.INFEASIBLE)
        self.check_farkas((G, h, A, b), solution, 5)

    def check_farkas(self, constraints, solution, bad):
        G, h, A, b = (t[bad] for t in constraints)
        z, y = solution.certificate.inequality[bad], solution.certificate.equality[bad]
        assert (z >= 0).all()
        gain = float(h @ z + b @ y)
        assert gain < 0
        assert (G.mT @ z + A.mT @ y).abs().max() < 1e-9 * abs(gain)
        assert (solution.certificate.inequality[bad - 1] == 0).all()

    def test_unbounded(self):
        Q, q, G, h, A, b = problem()
        Q[7], G[7] = 0.0, G[7] * 0.0
        solution = quadratic_program(Q, q, G, h.abs(), A, b)
        self.check_the_others((Q, q, G, h.abs(), A, b), solution, 7, Status.UNBOUNDED)
        ray = solution.certificate.ray[7]
        assert q[7] @ ray < 0
        assert (A[7] @ ray).abs().max() < 1e-9

    @pytest.mark.parametrize("which", range(6))
    def test_nan(self, which):
        given = list(problem())
        given[which][2].view(-1)[0] = torch.nan
        solution = quadratic_program(*given)
        assert solution.stats.status[2] == Status.NON_FINITE
        others = [i for i in range(BATCH) if i != 2]
        exact = quadratic_program(*[t[others] for t in given])
        assert torch.equal(solution.converged, torch.arange(BATCH) != 2)
        torch.testing.assert_close(solution.value[others], exact.value, rtol=0, atol=1e-10)

    def test_a_broken_sample_does_not_reach_what_is_shared(self):
        Q, q, G, h, _, _ = problem()
        q[2] = torch.nan
        h = times(G[0], torch.zeros_like(q)) + 1
        shared = G[0].clone().requires_grad_()
        solution = quadratic_program(Q, q, shared, h)
        solution.value[solution.converged].sum().backward()
        assert torch.isfinite(shared.grad).all()

    def test_throw(self):
        Q, q, G, h, A, b = problem()
        b = b.clone()
        h[4] = -torch.inf
        with pytest.raises(SolverError, match="sample 4"):
            quadratic_program(Q, q, G, h, A, b, throw=True)
        Q, q, G, h, A, b = problem()
        G[3, 1], h[3, 0], h[3, 1] = -G[3, 0], -1.0, -1.0
        with pytest.warns(SolverWarning, match="has no feasible point"):
            quadratic_program(Q, q, G, h, A, b, throw="warn")

    def test_too_few_steps(self):
        solution = quadratic_program(*problem(), solver=InteriorPoint(polish=False), max_steps=2)
        assert (solution.stats.status == Status.MAX_STEPS).all()


class TestBadInput:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"Q": torch.eye(3)}, r"Q: expected shape \(n, n\) = \(4, 4\), shared, or .* got \(3, 3\)"),
            ({"G": torch.ones(2, 5)}, r"G: expected shape \(m, n\) = \(2, 4\)"),
            ({"h": torch.ones(3, 3)}, r"G: expected shape"),
            ({"b": torch.ones(2, 1)}, r"batch"),
            ({"q": torch.ones(())}, r"q: expected shape \(batch, n\) or \(n,\)"),
            ({"A": None}, "b was given without A"),
            ({"h": None}, "G was given without h"),
            ({"h": torch.ones(2, dtype=torch.int64)}, "h: expected a real floating-point dtype"),
            ({"Q": torch.eye(4) + torch.tensor([[0.0, 1, 0, 0]] * 4)}, "Q is not symmetric"),
            ({"Q": torch.diag(torch.tensor([1.0, 1, 1, -1]))}, "Q is indefinite: its smallest eigenvalue is -1"),
            ({"Q": torch.diag_embed(torch.tensor([[1.0] * 4] * 2 + [[1.0, 1, 1, -1]]))}, "indefinite in sample 2"),
            ({"rtol": 0.0}, "rtol must be a positive"),
            ({"atol": -1.0}, "atol must be"),
            ({"max_steps": 0}, "max_steps must be"),
        ],
    )
    def test_says_what_is_wrong(self, change, message):
        given = {
            "Q": torch.eye(4), "q": torch.ones(3, 4), "G": torch.ones(2, 4), "h": torch.ones(2), "A": torch.ones(1, 4),
            "b": torch.ones(3, 1),
        }  # fmt: skip
        with pytest.raises(ValueError, match=message):
            quadratic_program(**{**given, **change})

    def test_types(self):
        with pytest.raises(TypeError, match="solver"):
            quadratic_program(torch.eye(2), torch.ones(2), solver="interior point")
        with pytest.raises(TypeError, match="has no option 'polsh'. Did you mean 'polish'"):
            InteriorPoint(polsh=True)

    def test_an_earlier_solution_of_another_programme(self):
        earlier = quadratic_program(torch.eye(2), torch.ones(2))
        with pytest.raises(ValueError, match="start: expected the solution of a programme of the same shape"):
            quadratic_program(torch.eye(3), torch.ones(3), start=earlier)
