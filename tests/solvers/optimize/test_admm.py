"""ADMM: the same optimum as the interior point, its own tolerance, warm starts."""

import pytest
import torch
from torch.autograd import gradcheck

from restpoint.solvers import ADMM, Status, quadratic_program
from tests.solvers.optimize.quadratic_problems import D, linear, quadratic, violation


@pytest.mark.parametrize(("n", "m", "p"), [(10, 20, 2), (20, 80, 0), (8, 0, 3)])
def test_finds_the_optimum_exactly(n, m, p):
    problem = quadratic(8, n, m, p)
    solution = quadratic_program(*problem, solver=ADMM())
    assert solution.converged.all()
    assert violation(problem, solution).max() < 1e-11


def test_linear_programmes():
    c, G, h, A, b = linear(4, 6, 12, 1)
    problem = (torch.zeros(4, 6, 6, dtype=D), c, G, h, A, b)
    solution = quadratic_program(*problem, solver=ADMM())
    assert violation(problem, solution).max() < 1e-10


def test_derivatives_at_the_fixed_point():
    problem = [t.requires_grad_() for t in quadratic(2, 4, 5, 1)]
    assert gradcheck(lambda *p: quadratic_program(*p, solver=ADMM()).value, problem, fast_mode=True)
    exact = quadratic_program(*problem)
    loose = quadratic_program(*problem, solver=ADMM(polish=False), rtol=1e-9)
    assert loose.converged.all() and not loose.active.any()
    weight = torch.randn(2, 4, dtype=D)
    pairs = [torch.autograd.grad((s.value * weight).sum(), problem) for s in (loose, exact)]
    for ours, theirs in zip(*pairs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_starts_where_it_ended():
    Q, q, *rest = quadratic(6, 10, 30, 2)
    first = quadratic_program(Q, q, *rest, solver=ADMM())
    again = quadratic_program(Q, q + 1e-6, *rest, solver=ADMM(), start=first)
    assert again.converged.all()
    assert again.stats.steps.max() < first.stats.steps.min()


def test_says_what_has_no_optimum():
    Q, q, G, h, A, b = quadratic(3, 5, 6, 1)
    G[1, 1], h[1, 0], h[1, 1] = -G[1, 0], -1.0, -1.0
    solution = quadratic_program(Q, q, G, h, A, b, solver=ADMM(), max_steps=500)
    assert solution.stats.status.tolist() == [Status.CONVERGED, Status.INFEASIBLE, Status.CONVERGED]
    with pytest.raises(ValueError, match="penalty must be positive"):
        ADMM(penalty=0.0)
