"""quadratic_program: its optimum, its derivatives, its duals."""

import numpy as np
import pytest
import scipy.optimize
import torch
from torch.autograd import gradcheck, gradgradcheck

from restpoint.solvers import CentralPath, InteriorPoint, Status, quadratic_program
from tests.solvers.optimize.quadratic_problems import D, linear, quadratic, times, violation

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")


def everything(*problem, **options):
    s = quadratic_program(*problem, **options)
    return s.value, s.duals.inequality, s.duals.equality, s.objective, s.slack


def requiring(*problem):
    return [t.detach().clone().requires_grad_() for t in problem]


SHARED = [
    (),
    ("Q", "G", "A"),
    ("Q",),
    ("G",),
    ("q", "h", "b"),
    ("Q", "q", "G", "h", "A"),
]


def share(problem, names):
    """The first sample's tensors for all samples; the others are adapted to stay feasible."""
    Q, q, G, h, A, b = problem
    x = torch.zeros_like(q)
    G = G[:1].expand_as(G) if "G" in names else G
    A = A[:1].expand_as(A) if "A" in names else A
    h, b = times(G, x) + 0.3 + 0.1 * h.abs(), times(A, x) + (0 if "A" not in names or "b" not in names else 0.1)
    parts = dict(zip("QqGhAb", (Q, q, G, h, A, b), strict=True))
    return [t[0] if name in names else t for name, t in parts.items()]


class TestOptimum:
    @pytest.mark.parametrize(
        ("n", "m", "p"), [(10, 10, 2), (20, 60, 4), (30, 10, 0), (7, 0, 3), (5, 0, 0), (40, 40, 8)]
    )
    def test_satisfies_the_optimality_conditions(self, n, m, p):
        problem = quadratic(100, n, m, p)
        solution = quadratic_program(*problem)
        assert solution.converged.all()
        assert violation(problem, solution).max() < 1e-11
        assert solution.stats.residual.max() < 1e-12

    @pytest.mark.parametrize("solver", [InteriorPoint(), InteriorPoint(polish=False)])
    def test_agrees_with_scipy(self, solver):
        problem = quadratic(5, 6, 8, 2, seed=1)
        ours = quadratic_program(*problem, solver=solver)
        for i, (Q, q, G, h, A, b) in enumerate(zip(*[t.numpy() for t in problem], strict=True)):
            theirs = scipy.optimize.minimize(
                lambda x, Q=Q, q=q: x @ Q @ x / 2 + q @ x,
                np.zeros(6),
                jac=lambda x, Q=Q, q=q: Q @ x + q,
                method="SLSQP",
                constraints=[
                    {"type": "ineq", "fun": lambda x, G=G, h=h: h - G @ x, "jac": lambda x, G=G: -G},
                    {"type": "eq", "fun": lambda x, A=A, b=b: A @ x - b, "jac": lambda x, A=A: A},
                ],
                options={"ftol": 1e-15, "maxiter": 500},
            )
            np.testing.assert_allclose(ours.value[i], theirs.x, atol=1e-6)
            assert abs(float(ours.objective[i]) - theirs.fun) < 1e-9

    def test_without_the_active_set_it_is_as_exact_as_the_tolerance(self):
        problem = quadratic(20, 10, 12, 2)
        exact = quadratic_program(*problem)
        barrier = quadratic_program(*problem, solver=InteriorPoint(polish=False), rtol=1e-8)
        assert barrier.converged.all()
        assert not barrier.active.any()
        torch.testing.assert_close(barrier.value, exact.value, rtol=0, atol=1e-5)

    def test_samples_have_nothing_to_do_with_each_other(self):
        problem = quadratic(6, 8, 20, 2)
        alone = torch.cat([quadratic_program(*[t[i : i + 1] for t in problem]).value for i in range(6)])
        torch.testing.assert_close(quadratic_program(*problem).value, alone, rtol=0, atol=1e-13)

    def test_a_batch_of_one_where_all_is_shared(self):
        problem = [t[0] for t in quadratic(1, 4, 5, 1)]
        assert quadratic_program(*problem).value.shape == (1, 4)

    def test_pieces_of_a_large_batch_are_put_together(self):
        problem = quadratic(150, 50, 50, 0)
        solution = quadratic_program(*problem[:4])
        assert violation(problem, solution).max() < 1e-11

    def test_an_infinite_bound_is_none(self):
        Q, q, G, h, A, b = quadratic(4, 6, 8, 1)
        h[:, 3] = torch.inf
        rows = [0, 1, 2, 4, 5, 6, 7]
        with_infinity = quadratic_program(Q, q, G, h, A, b)
        torch.testing.assert_close(with_infinity.value, quadratic_program(Q, q, G[:, rows], h[:, rows], A, b).value)
        assert (with_infinity.slack[:, 3] == torch.inf).all()

    def test_a_warm_start_needs_no_step_where_the_active_set_stays(self):
        problem = quadratic(10, 15, 40, 2)
        first = quadratic_program(*problem, solver=InteriorPoint())
        Q, q, *rest = problem
        second = quadratic_program(Q, q + 1e-9, *rest, start=first)
        assert (second.stats.steps == 1).all()
        torch.testing.assert_close(second.value, quadratic_program(Q, q + 1e-9, *rest).value, rtol=0, atol=1e-13)


class TestDerivatives:
    @pytest.mark.parametrize("names", SHARED, ids="".join)
    def test_of_first_and_second_order_in_all_six(self, names):
        problem = requiring(*share(quadratic(3, 5, 4, 2), names))
        assert quadratic_program(*problem).converged.all()
        assert gradcheck(everything, problem, fast_mode=True)
        assert gradgradcheck(everything, problem, fast_mode=True)

    def test_in_full(self):
        problem = requiring(*quadratic(1, 3, 3, 1))
        assert gradcheck(lambda *a: quadratic_program(*a).value, problem, check_forward_ad=True)

    @pytest.mark.parametrize("kinds", ["GhAb", "Gh", "Ab", ""])
    def test_with_some_kinds_of_constraints(self, kinds):
        problem = dict(zip("QqGhAb", requiring(*quadratic(2, 4, 3, 2)), strict=True))
        kept = [name for name in "QqGhAb" if name in "Qq" + kinds]

        def solve(*given):
            return quadratic_program(**dict(zip(kept, given, strict=True))).value

        assert gradcheck(solve, [problem[k] for k in kept], fast_mode=True)

    def test_gradients_of_shared_parameters_are_sums(self):
        problem = share(quadratic(6, 5, 4, 2), ("Q", "G", "A"))
        shared = requiring(*problem)
        quadratic_program(*shared).value.square().sum().backward()
        copies = requiring(
            *[t.expand(6, *t.shape) if t.ndim == 2 and i in (0, 2, 4) else t for i, t in enumerate(problem)]
        )
        quadratic_program(*copies).value.square().sum().backward()
        for i in (0, 2, 4):
            torch.testing.assert_close(shared[i].grad, copies[i].grad.sum(0), rtol=1e-12, atol=1e-12)

    def test_third_order(self):
        problem = [t[0] for t in quadratic(1, 4, 3, 1)]

        def value(q):
            return quadratic_program(problem[0], q, *problem[2:]).value.pow(3).sum()

        def along(s):
            return value(problem[1] + s * direction)

        direction = torch.ones(4, dtype=D)
        third = torch.func.jacfwd(torch.func.jacfwd(torch.func.grad(along)))(torch.zeros((), dtype=D))
        (slope,) = torch.func.jvp(
            lambda q: quadratic_program(problem[0], q, *problem[2:]).value[0], (problem[1],), (direction,)
        )[1:]
        torch.testing.assert_close(third, 6 * slope.pow(3).sum())

    def test_the_multipliers_are_the_derivatives_of_the_objective(self):
        problem = requiring(*quadratic(4, 8, 10, 2))
        solution = quadratic_program(*problem)
        on_h, on_b = torch.autograd.grad(solution.objective.sum(), (problem[3], problem[5]))
        torch.testing.assert_close(on_h, -solution.duals.inequality.detach(), rtol=0, atol=1e-12)
        torch.testing.assert_close(on_b, -solution.duals.equality.detach(), rtol=0, atol=1e-12)

    @pytest.mark.parametrize("in_dims", [(0,) * 6, (None, 0, None, 0, None, 0), (0, None, None, None, None, None)])
    def test_under_vmap(self, in_dims):
        batched = share(quadratic(4, 5, 4, 2), "".join(n for n, d in zip("QqGhAb", in_dims, strict=True) if d is None))

        def one(*problem):
            return quadratic_program(*problem).value[0]

        together = torch.func.vmap(one, in_dims)(*batched)
        apart = [one(*[t if d is None else t[i] for t, d in zip(batched, in_dims, strict=True)]) for i in range(4)]
        torch.testing.assert_close(together, torch.stack(apart), rtol=0, atol=1e-12)
        jacobians = torch.func.vmap(torch.func.jacrev(one, argnums=1), in_dims)(*batched)
        forward = torch.func.vmap(torch.func.jacfwd(one, argnums=1), in_dims)(*batched)
        torch.testing.assert_close(jacobians, forward, rtol=0, atol=1e-11)

    def test_under_vmap_over_batches(self):
        problem = quadratic(6, 5, 4, 2)
        pairs = [t.reshape(2, 3, *t.shape[1:]) for t in problem]
        value = torch.func.vmap(lambda *p: quadratic_program(*p).value)(*pairs)
        torch.testing.assert_close(value.flatten(0, 1), quadratic_program(*problem).value, rtol=0, atol=1e-13)

    def test_of_a_weakly_active_constraint_is_one_of_the_one_sided_ones(self):
        """min 1/2 (x - a)^2 with x <= 1, at a = 1: dx/da is 1 from the left and 0 from the right."""
        a = torch.ones(1, 1, dtype=D, requires_grad=True)
        one = torch.ones(1, 1, 1, dtype=D)
        solution = quadratic_program(one, -a, one, torch.ones(1, 1, dtype=D))
        (slope,) = torch.autograd.grad(solution.value.sum(), a)
        assert -1e-9 <= slope <= 1 + 1e-9
        torch.testing.assert_close(solution.value, torch.ones(1, 1, dtype=D), rtol=0, atol=1e-9)


class TestCentralPath:
    def test_derivatives(self):
        problem = requiring(*quadratic(2, 3, 4, 1))
        smooth = CentralPath(0.1)
        assert gradcheck(lambda *p: everything(*p, adjoint=smooth), problem, fast_mode=True)
        assert gradgradcheck(lambda *p: everything(*p, adjoint=smooth)[:2], problem, fast_mode=True)

    def test_is_where_slack_times_multiplier_is_the_barrier(self):
        solution = quadratic_program(*quadratic(3, 5, 8, 1), adjoint=CentralPath(0.3))
        torch.testing.assert_close(solution.slack * solution.duals.inequality, torch.full((3, 8), 0.3, dtype=D))

    def test_tends_to_the_optimum(self):
        problem = quadratic(3, 5, 8, 1)
        exact = quadratic_program(*problem).value
        errors = [
            (quadratic_program(*problem, adjoint=CentralPath(mu)).value - exact).abs().max() for mu in (1e-2, 1e-5)
        ]
        assert errors[1] < 1e-2 * errors[0]
        with pytest.raises(ValueError, match="barrier must be positive"):
            CentralPath(0.0)


class TestPrecision:
    @pytest.mark.parametrize(("dtype", "digits"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
    def test_low_precision_is_rounded_at_the_end(self, dtype, digits):
        problem = requiring(*[t.to(dtype) for t in quadratic(4, 6, 6, 2)])
        solution = quadratic_program(*problem)
        wide = requiring(*[t.to(D) for t in problem])
        exact = quadratic_program(*wide)
        assert solution.value.dtype == dtype
        torch.testing.assert_close(solution.value.to(D), exact.value, rtol=digits, atol=digits)
        solution.value.float().sum().backward()
        exact.value.sum().backward()
        for ours, theirs in zip(problem, wide, strict=True):
            assert ours.grad.dtype == dtype
            torch.testing.assert_close(ours.grad.to(D), theirs.grad, rtol=100 * digits, atol=100 * digits)

    def test_autocast_changes_nothing(self):
        problem = [t.float() for t in quadratic(4, 6, 6, 2)]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = quadratic_program(*problem).value
        assert torch.equal(inside, quadratic_program(*problem).value)


@pytest.mark.parametrize("n", [10, 30])
def test_a_thousand_random_programmes(n):
    """Solution to 1e-9 and gradient to 1e-8, on every one of them; the reference is the full system, densely."""
    problem = requiring(*quadratic(1000, n, n, n // 5, seed=7))
    solution = quadratic_program(*problem)
    assert (solution.stats.status == Status.CONVERGED).all()
    assert violation(problem, solution).max() < 1e-11
    weight = torch.randn(1000, n, dtype=D)
    ours = torch.autograd.grad((solution.value * weight).sum(), problem)
    Q, q, G, h, A, b = problem
    active = solution.active.to(D)
    rows = torch.cat([G * active[..., None], A], 1)
    matrix = torch.zeros(1000, n + rows.shape[1], n + rows.shape[1], dtype=D)
    corner = torch.cat([1 - active, torch.zeros_like(b)], 1)
    matrix = torch.cat([torch.cat([Q, rows.mT], 2), torch.cat([rows, torch.diag_embed(corner)], 2)], 1)
    exact = torch.linalg.solve(matrix, torch.cat([-q, h * active, b], 1))[:, :n]
    assert (exact - solution.value).abs().max() < 1e-9
    for mine, theirs in zip(ours, torch.autograd.grad((exact * weight).sum(), problem), strict=True):
        theirs = (
            (theirs + theirs.mT) / 2 if theirs.shape == Q.shape and theirs.shape[1] == n and mine is ours[0] else theirs
        )
        assert ((mine - theirs).abs() / (1 + theirs.abs())).max() < 1e-8


def test_a_linear_objective_is_no_reason_to_fail():
    c, G, h, A, b = linear(5, 6, 12, 2)
    solution = quadratic_program(torch.zeros(6, 6, dtype=D), c, G, h, A, b)
    assert violation((torch.zeros(5, 6, 6, dtype=D), c, G, h, A, b), solution).max() < 1e-11


@pytest.mark.parametrize("shared", [False, True])
def test_derivatives_of_the_objective(shared):
    """Its first derivatives are those of the Lagrangian; the second ones feel how x and its multipliers move."""
    factor, q, G, h, A, b = quadratic(3, 4, 3, 1, seed=4)
    factor, G, A = (t[0] if shared else t for t in (factor, G, A))
    given = [t.clone().requires_grad_() for t in (factor, q, G, h, A, b)]

    def objective(factor, q, G, h, A, b):
        return quadratic_program(factor @ factor.mT + torch.eye(4, dtype=D), q, G, h, A, b).objective

    assert gradcheck(objective, given, fast_mode=True, check_forward_ad=True)
    assert gradgradcheck(objective, given, fast_mode=True, check_fwd_over_rev=True)
