"""Autocast, half precision, and what a type can resolve."""

import pytest
import torch

from restpoint.solvers import (
    Anderson,
    Broyden,
    CheckpointAdjoint,
    ImplicitAdjoint,
    JacobianFreeAdjoint,
    Newton,
    PhantomAdjoint,
    Picard,
    ReversibleAdjoint,
    UnrollAdjoint,
    fixed_point,
)
from restpoint.solvers.linear import GMRES, LU
from tests.solvers.problems import name

G = torch.Generator().manual_seed(8)
W = torch.randn(40, 40, generator=G)
W = W * (0.7 / torch.linalg.matrix_norm(W, 2))
X = torch.randn(6, 40, generator=G)
SOLVERS = [Picard(), Picard(0.7), Anderson(), Anderson(kind="I"), Broyden(), Newton()]
ADJOINTS = [
    ImplicitAdjoint(LU()),
    ImplicitAdjoint(GMRES()),
    ImplicitAdjoint(order=2),
    UnrollAdjoint(),
    CheckpointAdjoint(),
    CheckpointAdjoint(recursive=True),
    PhantomAdjoint(),
    JacobianFreeAdjoint(),
    ReversibleAdjoint(),
]


TAPED = (UnrollAdjoint, CheckpointAdjoint, ReversibleAdjoint)


def run(autocast, solver=None, adjoint=None, dtype=torch.float32, rtol=2e-2):
    # The gradient of an iterate far from the rest point is another one: as many steps whatever the type.
    options = {"rtol": 0.0, "max_steps": 10} if isinstance(adjoint, TAPED) else {"rtol": rtol, "max_steps": 60}
    layer = torch.nn.Linear(40, 40).to(dtype)
    with torch.no_grad():
        layer.weight.copy_(W)
        layer.bias.zero_()
    x = X.to(dtype).clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        solution = fixed_point(
            lambda z, x: torch.tanh(layer(z) + x), torch.zeros_like(x), (x,), solver=solver, adjoint=adjoint, **options
        )
        loss = solution.value.float().square().sum()
    # As in every training loop, outside of autocast.
    loss.backward()
    return solution, layer.weight.grad.float(), x.grad.float()


def near(got, expected, tolerance):
    """In the norm: single entries of a half-precision gradient carry little."""
    return (got - expected).norm() <= tolerance * expected.norm()


class TestAutocast:
    @pytest.mark.parametrize("solver", SOLVERS, ids=name)
    def test_every_method(self, solver):
        full, low = run(False, solver, rtol=1e-5), run(True, solver)
        assert low[0].value.dtype == torch.float32
        assert low[0].converged.all()
        assert near(low[0].value, full[0].value, 0.03)
        assert near(low[1], full[1], 0.05)
        assert near(low[2], full[2], 0.05)

    @pytest.mark.parametrize("adjoint", ADJOINTS, ids=name)
    def test_every_adjoint(self, adjoint):
        solver = Picard(0.5) if isinstance(adjoint, ReversibleAdjoint) else None
        full, low = run(False, solver, adjoint, rtol=1e-5), run(True, solver, adjoint)
        assert near(low[1], full[1], 0.05)
        assert near(low[2], full[2], 0.05)
        assert low[1].abs().sum() > 0

    def test_the_backward_solve_is_in_float32(self):
        solution, _, _ = run(True, adjoint=ImplicitAdjoint(GMRES()))
        assert solution.adjoint_stats.residual.dtype == torch.float32
        # As good as products with weights and vectors of eight bits allow, and nobody is warned of that.
        assert (solution.adjoint_stats.residual < 5e-3).all()

    def test_weights_cached_by_autocast_keep_their_gradient(self):
        """The solve without a graph comes first and fills autocast's cache; the recorded evaluation must not use it."""
        layer = torch.nn.Linear(40, 40)
        with torch.no_grad():
            layer.weight.mul_(0.3)
        with torch.autocast("cpu", torch.bfloat16):
            layer(X)
            value = fixed_point(lambda z, x: torch.tanh(layer(z) + x), torch.zeros_like(X), (X,), rtol=1e-2).value
            after = layer(value).sum()
        after.backward()
        assert layer.weight.grad.abs().sum() > 0

    def test_second_derivatives(self):
        layer = torch.nn.Linear(5, 5)
        with torch.no_grad():
            layer.weight.mul_(0.5)
        products = []
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                value = fixed_point(
                    lambda z, x: torch.tanh(layer(z) + x), torch.zeros(3, 5), (X[:3, :5],), rtol=1e-2,
                    adjoint=ImplicitAdjoint(order=2),
                ).value  # fmt: skip
                loss = value.float().pow(3).sum()
            (first,) = torch.autograd.grad(loss, layer.weight, create_graph=True)
            products.append(torch.autograd.grad(first.square().sum(), layer.weight)[0])
        assert near(products[1], products[0], 0.1)

    def test_a_function_that_leaves_autocast_by_itself(self):
        layer = torch.nn.Linear(40, 40)
        with torch.no_grad():
            layer.weight.copy_(W)

        def f(z, x):
            with torch.autocast("cpu", enabled=False):
                return torch.tanh(layer(z.float()) + x)

        with torch.autocast("cpu", torch.bfloat16):
            value = fixed_point(f, torch.zeros_like(X), (X,), rtol=1e-6).value
        value.sum().backward()
        assert torch.isfinite(layer.weight.grad).all()


class TestHalfPrecision:
    @pytest.mark.parametrize("solver", SOLVERS, ids=name)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_states(self, solver, dtype):
        full, low = run(False, solver, rtol=1e-5), run(False, solver, dtype=dtype)
        assert low[0].value.dtype == dtype
        assert low[0].stats.residual.dtype == torch.float32
        assert low[0].converged.all()
        assert near(low[0].value.float(), full[0].value, 0.03)
        assert near(low[1], full[1], 0.05)
        assert near(low[2], full[2], 0.05)

    @pytest.mark.parametrize("adjoint", ADJOINTS, ids=name)
    def test_adjoints(self, adjoint):
        solver = Picard(0.5) if isinstance(adjoint, ReversibleAdjoint) else None
        full, low = run(False, solver, adjoint, rtol=1e-5), run(False, solver, adjoint, torch.bfloat16, rtol=5e-2)
        assert near(low[1], full[1], 0.1)
        assert near(low[2], full[2], 0.1)

    def test_torch_func(self):
        w, x = (0.5 * W[:6, :6]).bfloat16(), X[:3, :6].bfloat16()

        def loss(w, x):
            return fixed_point(lambda z, x: torch.tanh(z @ w + x), torch.zeros_like(x), (x,), rtol=2e-2).value.sum()

        got = torch.func.grad(loss)(w, x)
        expected = torch.func.grad(loss)(w.float(), x.float())
        assert got.dtype == torch.bfloat16
        assert near(got.float(), expected, 0.05)

    def test_accelerated_methods_reach_what_plain_iteration_reaches(self):
        """Coefficients that are rounded to eight bits would not."""
        x = X.bfloat16()
        w = W.bfloat16()
        errors = []
        reference = fixed_point(
            lambda z, x: torch.tanh(z @ w.double() + x), torch.zeros_like(X).double(), (x.double(),), rtol=1e-12
        ).value
        for solver in (Picard(), Anderson(), Anderson(kind="I"), Broyden()):
            value = fixed_point(
                lambda z, x: torch.tanh(z @ w + x), torch.zeros_like(x), (x,), solver=solver, rtol=4e-3, max_steps=40
            ).value
            errors.append(float((value.double() - reference).norm() / reference.norm()))
        assert max(errors) < 3 * errors[0]


class TestResolution:
    @pytest.mark.parametrize("solver", SOLVERS, ids=name)
    def test_a_tolerance_below_the_resolution_of_the_type_ends(self, solver):
        """And with a value as good as the type allows."""
        solution = fixed_point(
            lambda z, x: torch.tanh(z @ W + x), torch.zeros_like(X), (X,), solver=solver, rtol=1e-12, max_steps=500
        )
        assert (solution.stats.residual < 5e-7).all()
        assert (solution.stats.evaluations < 5000).all()

    @pytest.mark.parametrize("solver", SOLVERS, ids=name)
    def test_tiny_states(self, solver):
        """Squares of 1e-12 are there in float32, and no regularisation drowns them."""
        scale = 1e-12
        solution = fixed_point(
            lambda z, x: scale * torch.tanh(z / scale @ W + x), torch.zeros_like(X), (X,), solver=solver, rtol=1e-5,
            max_steps=100,
        )  # fmt: skip
        reference = fixed_point(lambda z, x: torch.tanh(z @ W + x), torch.zeros_like(X), (X,), rtol=1e-6, max_steps=100)
        assert solution.converged.all()
        assert near(solution.value / scale, reference.value, 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("solver", [Picard(), Picard(0.5), Anderson(memory=1), Broyden(line_search=False)])
def test_what_diverges_never_counts_as_converged(solver, dtype):
    x = torch.linspace(1, 3, 16, dtype=dtype)[:, None].expand(16, 4)
    # Between the overflow of squares and that of the numbers themselves, a norm can be infinite or its limit.
    for factor in (1.5, 3.0, 10.0):
        solution = fixed_point(
            lambda z, x, k=factor: k * z + x, torch.zeros_like(x), (x,), solver=solver, max_steps=200
        )
        if isinstance(solver, Broyden) and dtype == torch.float32:
            assert solution.converged.all()
            torch.testing.assert_close(solution.value, x / (1 - factor), rtol=1e-3, atol=0)
        elif not isinstance(solver, Broyden):
            assert not solution.converged.any()


@pytest.mark.parametrize("size", [1e-25, 1e-20, 1e20])
@pytest.mark.parametrize("solver", [Picard(), Anderson(), Broyden(), Newton()])
def test_states_whose_squares_no_float32_holds(solver, size):
    x = torch.rand(5, 8, generator=torch.Generator().manual_seed(0)) * size
    solution = fixed_point(lambda z, x: 0.5 * z + x, torch.zeros_like(x), (x,), solver=solver, rtol=1e-4)
    assert solution.converged.all()
    torch.testing.assert_close(solution.value, 2 * x, rtol=3e-4, atol=0)
