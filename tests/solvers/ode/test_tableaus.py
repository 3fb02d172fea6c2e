"""Every tableau against its order conditions, and the order that is observed."""

import math

import pytest
import torch

from restpoint.solvers.ode import (
    RK4,
    Bosh3,
    ConstantController,
    Dopri5,
    Dopri8,
    Euler,
    Heun,
    Midpoint,
    Ralston,
    Tableau,
    Tsit5,
    solve_ode,
)
from restpoint.solvers.ode.method import Rhs
from restpoint.solvers.ode.tableau import rooted_trees, tree_density, tree_order
from restpoint.solvers.tree import flatten

# solver: order, embedded order, order of the dense output, first same as last
CLAIMS = [
    (Euler(), 1, None, 1, False),
    (Midpoint(), 2, None, 2, False),
    (Ralston(), 2, None, 2, False),
    (Heun(), 2, 1, 2, False),
    (RK4(), 4, None, 3, False),
    (Bosh3(), 3, 2, 3, True),
    (Dopri5(), 5, 4, 4, True),
    (Tsit5(), 5, 4, 4, True),
    (Dopri8(), 8, 7, 6, False),
]
EACH = pytest.mark.parametrize("solver, order, embedded, dense, fsal", CLAIMS, ids=lambda x: repr(x))


def test_rooted_trees_are_counted():
    assert [len(rooted_trees(n)) for n in range(1, 10)] == [1, 1, 2, 4, 9, 20, 48, 115, 286]


def test_densities_of_trees():
    tall = ((((),),),)
    assert (tree_order(tall), tree_density(tall)) == (4, 24)
    bush = ((), (), ())
    assert (tree_order(bush), tree_density(bush)) == (4, 4)
    # Every labelled, increasing tree is counted once: the sum of order! / gamma / symmetry; here the number of trees.
    assert len(set(rooted_trees(7))) == 48


@EACH
def test_derived_properties(solver, order, embedded, dense, fsal):
    tableau = solver.tableau
    assert tableau.order == solver.order == order
    assert (tableau.error is None) == (embedded is None)
    if embedded is not None:
        assert tableau.embedded_order == embedded
        assert solver.error_order == embedded + 1
    assert tableau.interpolant_order == dense
    assert tableau.fsal == fsal
    assert tableau.explicit


@EACH
def test_order_conditions_hold_tightly(solver, order, embedded, dense, fsal):
    tableau = solver.tableau
    assert max(abs(x) for n in range(1, order + 1) for x in tableau.order_defects(n)) < 1e-13
    assert max(abs(x) for x in tableau.order_defects(order + 1)) > 1e-7
    assert max(abs(x) for n in range(1, dense + 1) for x in tableau.interpolant_defects(n)) < 1e-12


@EACH
def test_dense_output_meets_the_step(solver, order, embedded, dense, fsal):
    """Value and derivative at both ends."""
    tableau = solver.tableau
    width = len(tableau.rows)
    rows = torch.tensor(tableau.interpolant, dtype=torch.float64)
    powers = torch.arange(1, len(rows) + 1, dtype=torch.float64)
    b = torch.tensor(tableau.b + (0.0,) * (width - tableau.stages), dtype=torch.float64)
    unit = torch.eye(width, dtype=torch.float64)
    torch.testing.assert_close(rows.sum(0), b, rtol=0, atol=1e-12)
    torch.testing.assert_close(rows[0], unit[0], rtol=0, atol=1e-12)
    if width > 1:
        torch.testing.assert_close((powers[:, None] * rows).sum(0), unit[tableau.end], rtol=0, atol=1e-11)


def test_a_wrong_coefficient_is_noticed():
    """As the node with which torchdiffeq once shipped its Gauss-Legendre method."""
    right = Dopri5().tableau
    a = [list(row) for row in right.a]
    a[3][1] += 1e-3
    assert Tableau(tuple(tuple(row) for row in a), right.b, right.error).order == 1


def field(t, y):
    return torch.stack([y[:, 1] * torch.cos(t), -torch.sin(y[:, 0]) + 0.3 * t * y[:, 1]], 1)


Y0 = torch.tensor([[1.0, 0.5]], dtype=torch.float64)


@pytest.fixture(scope="module")
def reference():
    """The solution at 0.5 and 1."""
    t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    fixed = ConstantController(dt=1 / 64)
    return solve_ode(field, Y0, t, solver=Dopri8(), controller=fixed).value


def slope(errors):
    return math.log2(errors[0] / errors[1])


@EACH
def test_observed_order(solver, order, embedded, dense, fsal, reference):
    count = 2 if order == 8 else 8
    errors = []
    for steps in (count, 2 * count):
        end = solve_ode(field, Y0, (0.0, 1.0), solver=solver, controller=ConstantController(dt=1 / steps)).value[-1]
        errors.append(float((end - reference[-1]).abs().max()))
    assert slope(errors) > order - 0.35


@EACH
def test_observed_order_of_the_error_estimate(solver, order, embedded, dense, fsal):
    if embedded is None:
        pytest.skip("has none")
    matrix, spec = flatten(Y0)
    rhs = Rhs(field, (), spec, 1)
    errors = []
    h = 0.25 if order >= 5 else 1 / 16
    for length in (h, h / 2):
        with torch.no_grad():
            step = solver.step(rhs, 0.0, matrix, length, solver.init(rhs, 0.0, matrix))
        errors.append(float(step.error.abs().max()))
    assert abs(slope(errors) - solver.error_order) < 0.6


@EACH
def test_observed_order_of_the_dense_output(solver, order, embedded, dense, fsal):
    """Local, since the ends of the step are more accurate than what lies between."""
    h = 0.5 if order == 8 else 0.25
    errors = []
    for length in (h, h / 2):
        t = torch.tensor([0.0, 0.35 * length, length], dtype=torch.float64)
        inside = solve_ode(field, Y0, t, solver=solver, controller=ConstantController(dt=length)).value[1]
        exact = solve_ode(field, Y0, t[:2], solver=Dopri8(), controller=ConstantController(dt=length / 32)).value[1]
        errors.append(float((inside - exact).abs().max()))
    assert slope(errors) > dense + 1 - 0.6


@EACH
def test_recorded_and_fast_steps_agree(solver, order, embedded, dense, fsal):
    """The one with buffers and the one in operations that autograd records."""
    y = torch.randn(3, 2, dtype=torch.float64)
    matrix, spec = flatten(y)
    for t, h in ((0.3, -0.1), (torch.tensor([0.3, 0.2, 0.1]).double(), torch.tensor([0.1, 0.2, -0.1]).double())):
        rhs = Rhs(lambda t, y: torch.sin(y) * (t.unsqueeze(-1) if t.ndim else t), (), spec, 3)
        with torch.no_grad():
            fast = solver.step(rhs, t, matrix, h, solver.init(rhs, t, matrix))
            dense_fast = solver.dense(rhs, t, matrix, h, fast)
        recorded = solver.step(rhs, t, matrix, h, solver.init(rhs, t, matrix))
        dense_recorded = solver.dense(rhs, t, matrix, h, recorded)
        torch.testing.assert_close(fast.y, recorded.y, rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(dense_fast, dense_recorded, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(fast.carry, recorded.carry, rtol=1e-13, atol=1e-13)
        if fast.error is not None:
            torch.testing.assert_close(fast.error, recorded.error, rtol=1e-12, atol=1e-14)
