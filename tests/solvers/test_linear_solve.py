"""linear_solve: structures, derivatives, and what it refuses."""

import pytest
import torch

from restpoint.solvers.linear import CG, GMRES, LU, Auto, BiCGSTAB, LinearOperator, linear_solve
from restpoint.solvers.solution import AdjointWarning, SolverError, StagnationWarning, Status

# torch compiles its own rules of forward-mode differentiation with it, on first use.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")

# Tight enough for finite differences.
SOLVERS = [Auto(), GMRES(rtol=1e-13), BiCGSTAB(rtol=1e-13)]


def system(batch=3, n=4):
    matrix = 3 * torch.eye(n).double() + 0.5 * torch.randn(batch, n, n).double()
    return matrix, torch.randn(batch, n).double()


def value(solver):
    return lambda matrix, b: linear_solve(matrix, b, solver=solver).value


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_derivatives_of_any_order(solver):
    matrix, b = system(2, 3)
    inputs = (matrix.requires_grad_(), b.requires_grad_())
    assert torch.autograd.gradcheck(value(solver), inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(value(solver), inputs)


def test_derivatives_of_a_shared_matrix():
    matrix, b = system()
    shared = matrix[0].clone().requires_grad_()
    assert torch.autograd.gradcheck(value(LU()), (shared, b))


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_functional_transforms(solver):
    matrix, b = system(2, 3)
    solve = value(solver)
    reference = torch.linalg.solve

    def loss(f):
        return lambda m, b: f(m, b).sin().sum()

    for transform in (
        lambda f: torch.func.grad(loss(f), (0, 1)),
        lambda f: torch.func.jacrev(f, (0, 1)),
        lambda f: torch.func.jacfwd(f, (0, 1)),
        lambda f: torch.func.hessian(loss(f), (0, 1)),
        lambda f: torch.func.jacrev(torch.func.grad(loss(f), (0, 1)), (0, 1)),
    ):
        torch.testing.assert_close(transform(solve)(matrix, b), transform(reference)(matrix, b), rtol=1e-9, atol=1e-9)
    many = torch.stack([b, 2 * b, b * 0])
    for f in (loss(solve), loss(reference)):
        each = torch.func.vmap(torch.func.grad(f), (None, 0))(matrix, many)
        expected = torch.stack([torch.func.grad(loss(reference))(matrix, one) for one in many])
        torch.testing.assert_close(each, expected)


def test_a_derivative_that_fails_warns():
    """The forward solve finds the solution, its start; the backward solve has two steps and does not."""
    matrix, b = system(3, 20)
    x = torch.linalg.solve(matrix, b)
    solution = linear_solve(matrix, b.requires_grad_(), solver=GMRES(max_steps=2), x0=x)
    assert solution.converged.all()
    with pytest.warns(AdjointWarning, match="3 of the solves behind a derivative did not converge"):
        solution.value.sin().sum().backward()


def test_states_of_any_structure():
    scale = torch.tensor([2.0, 3.0]).double()
    b = {"a": torch.randn(2, 3, 4).double(), "b": (torch.randn(2).double(), torch.randn(2, 5).double())}

    def apply(v):
        mean = v["a"].mean((1, 2)) + v["b"][0]
        return {
            "a": v["a"] * scale.view(2, 1, 1) + 0.1 * v["b"][0].view(2, 1, 1),
            "b": (v["b"][0] + 0.1 * mean, v["b"][1]),
        }

    for solver in (Auto(), GMRES()):
        solution = linear_solve(apply, b, solver=solver)
        assert solution.converged.all()
        torch.testing.assert_close(apply(solution.value), b)
    warm = linear_solve(apply, b, solver=GMRES(), x0=solution.value)
    assert (warm.stats.steps == 0).all()


def test_operators():
    matrix, b = system()
    operator = LinearOperator.from_matrix(matrix)
    torch.testing.assert_close(linear_solve(operator, b).value, torch.linalg.solve(matrix, b))
    torch.testing.assert_close(linear_solve(operator.T, b, solver=GMRES()).value, torch.linalg.solve(matrix.mT, b))
    backward_only = LinearOperator(None, operator.rmatvec, batch=3, size=4, dtype=b.dtype, device="cpu")
    torch.testing.assert_close(linear_solve(backward_only, b).value, torch.linalg.solve(matrix, b))


@pytest.mark.parametrize("solver", [LU(), GMRES()], ids=repr)
def test_a_function_refuses_what_it_would_not_differentiate(solver):
    matrix, b = system()
    weight = matrix.clone().requires_grad_()

    def apply(m):
        return lambda v: (m @ v.unsqueeze(2)).squeeze(2)

    message = "requires a derivative, and with a function or a LinearOperator the result is not differentiable"
    plain = linear_solve(apply(matrix), b, solver=solver).value
    with pytest.raises(ValueError, match="b " + message):
        linear_solve(apply(matrix), b.clone().requires_grad_(), solver=solver)
    with pytest.raises(ValueError, match="the operator " + message):
        linear_solve(apply(weight), b, solver=solver)
    with pytest.raises(ValueError, match="the operator's matrix " + message):
        linear_solve(LinearOperator.from_matrix(weight), b, solver=solver)
    with pytest.raises(ValueError, match=message):
        torch.func.grad(lambda b: linear_solve(apply(matrix), b, solver=solver).value.sum())(b)
    with pytest.raises(ValueError, match=message):
        torch.func.grad(lambda m: linear_solve(apply(m), b, solver=solver).value.sum())(matrix)
    with pytest.raises(ValueError, match=message):
        torch.func.jvp(lambda b: linear_solve(apply(matrix), b, solver=solver).value, (b,), (b,))
    with pytest.raises(ValueError, match=message):
        torch.func.jvp(lambda m: linear_solve(apply(m), b, solver=solver).value, (matrix,), (matrix,))
    with pytest.raises(ValueError, match=message):
        torch.func.vmap(torch.func.grad(lambda b: linear_solve(apply(matrix), b, solver=solver).value.sum()))(
            torch.stack([b, b])
        )
    with pytest.raises(ValueError, match=message):
        torch.func.grad(
            lambda b: torch.func.vmap(lambda c: linear_solve(apply(matrix), c, solver=solver).value)(b).sum()
        )(torch.stack([b, b]))
    with torch.no_grad():
        assert torch.equal(linear_solve(apply(weight), b.clone().requires_grad_(), solver=solver).value, plain)
    mapped = torch.func.vmap(linear_solve_value(apply(matrix), solver))(torch.stack([b, b]))[1]
    torch.testing.assert_close(mapped, plain, rtol=1e-12, atol=1e-14)


def linear_solve_value(function, solver):
    return lambda b: linear_solve(function, b, solver=solver).value


def test_throw():
    matrix, b = system()
    matrix[1] = 0
    solution = linear_solve(matrix, b)
    assert solution.stats.status.tolist() == [0, Status.STAGNATED, 0]
    with pytest.raises(SolverError, match="linear_solve: 1 of 3 samples did not converge. The worst, sample 1"):
        linear_solve(matrix, b, throw=True)
    with pytest.warns(StagnationWarning, match="sample 1"):
        linear_solve(matrix, b, throw="warn")


def test_bad_arguments():
    matrix, b = system()
    for operator, solver in ((matrix, CG), (matrix, "gmres"), (3.0, CG())):
        with pytest.raises(TypeError):
            linear_solve(operator, b, solver=solver)
    with pytest.raises(ValueError, match=r"shape \(batch, n\) with a matrix operator; got shape \(4,\)"):
        linear_solve(matrix, b[0])
    with pytest.raises(ValueError, match="with a matrix operator; got tuple"):
        linear_solve(matrix, (b,))
    with pytest.raises(ValueError, match=r"operator\(v\): expected shape"):
        linear_solve(lambda v: v[:, :2], b)
    with pytest.raises(ValueError, match="the batch is empty"):
        linear_solve(lambda v: v, b[:0])
    with pytest.raises(ValueError, match="integer|floating-point"):
        linear_solve(lambda v: v, b.long())
