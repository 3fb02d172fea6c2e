"""Forward mode in forward mode, of any order and mixed with reverse mode: never a tangent that is dropped."""

import pytest
import torch
from torch.func import grad, jacfwd, jacrev, vmap

from restpoint.solvers import (
    LinearChain,
    entmax,
    entmax15,
    fixed_point,
    linear_solve,
    minimize,
    project_isotonic,
    project_l1_ball,
    quadratic_program,
    sinkhorn,
    soft_sort,
    sparsemax,
)  # fmt: skip

# Forward mode loads what torch warns about by itself.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")

D = torch.float64
POINT = torch.tensor([0.3, -0.5, 0.7], dtype=D)
WEIGHT = torch.tensor([1.0, -0.4, 0.6], dtype=D)
MATRIX = torch.tensor([[3.0, 0.4, -0.2], [0.1, 2.5, 0.3], [-0.3, 0.2, 4.0]], dtype=D)


def solve(x):
    return linear_solve(MATRIX + x.diag(), x.sin()[None]).value[0]


def programme(x):
    Q, bound = MATRIX @ MATRIX.T + (x * x).diag(), x.cos() / 20
    return quadratic_program(Q, x.sin(), torch.eye(3, dtype=D), bound).value[0]


def stationary(x):
    energy = (x.sin()[None],)
    return minimize(lambda y, a: (y**4 / 4 + y * y - a * y).sum(1), torch.zeros(1, 3, dtype=D), energy).value[0]


def at_rest(x):
    start, args = torch.zeros(1, 3, dtype=D), (x.sin()[None],)
    return fixed_point(lambda z, a: 0.5 * z.tanh() + a, start, args, rtol=1e-12).value[0]


def plan(x):
    return sinkhorn(torch.outer(x.sin(), x) + x, temperature=0.5, rtol=1e-12).value @ WEIGHT


def chain(x):
    return LinearChain(torch.outer(x.sin(), x).expand(1, 2, 3, 3) * x).log_partition * x


def curved(projection):
    return lambda x: projection(2 * x.sin() + x**3)


FUNCTIONS = {
    "linear_solve": solve,
    "quadratic_program": programme,
    "minimize": stationary,
    "fixed_point": at_rest,
    "sinkhorn": plan,
    "LinearChain": chain,
    "sparsemax": curved(sparsemax),
    "entmax15": curved(entmax15),
    "entmax": lambda x: entmax(2 * x.sin() + x**3, 1.2 + x.sum().sigmoid() / 2),
    "soft_sort": curved(soft_sort),
    "project_isotonic": curved(project_isotonic),
    "project_l1_ball": curved(project_l1_ball),
}


def check(derivative, reference):
    torch.testing.assert_close(derivative, reference, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_second_order(name):
    def f(x):
        return (FUNCTIONS[name](x) * WEIGHT).sum()

    reference = jacrev(jacrev(f))(POINT)
    for derivative in (jacfwd(jacfwd(f)), jacfwd(jacrev(f)), jacrev(jacfwd(f))):
        check(derivative(POINT), reference)


@pytest.mark.parametrize("name", ["linear_solve", "quadratic_program", "entmax15", "entmax", "LinearChain"])
def test_third_order(name):
    def f(x):
        return (FUNCTIONS[name](x) * WEIGHT).sum()

    reference = jacrev(jacrev(grad(f)))(POINT)
    for derivative in (jacfwd(jacfwd(grad(f))), jacfwd(jacfwd(jacfwd(f))), jacrev(jacfwd(jacfwd(f)))):
        check(derivative(POINT), reference)


@pytest.mark.parametrize("name", ["linear_solve", "quadratic_program", "entmax15", "LinearChain"])
def test_over_and_under_a_batch(name):
    def f(x):
        return (FUNCTIONS[name](x) * WEIGHT).sum()

    points = torch.stack([POINT, POINT / 2])
    reference = torch.stack([jacrev(jacrev(f))(x) for x in points])
    check(vmap(jacfwd(jacfwd(f)))(points), reference)
    whole = jacfwd(jacfwd(lambda x: vmap(f)(x).sum()))(points)
    check(torch.stack([whole[i, :, i] for i in range(2)]), reference)
