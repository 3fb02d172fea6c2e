"""States that are tuples, lists and dicts, and arguments of any structure."""

import pytest
import torch

from restpoint.solvers import Anderson, Broyden, ImplicitAdjoint, Newton, Picard, StateError, UnrollAdjoint, fixed_point
from tests.solvers.problems import name

D = torch.float64
SOLVERS = [Picard(), Anderson(), Anderson(kind="I"), Broyden(), Newton()]


def pieces(structure):
    """The same problem with its six numbers a sample kept as a tensor, tuple, list, dict or nested."""
    g = torch.Generator().manual_seed(3)
    w = 0.3 * torch.randn(6, 6, generator=g, dtype=D)
    x = torch.randn(5, 6, generator=g, dtype=D)

    def pack(t):
        a, b, c = t[:, :1].reshape(-1), t[:, 1:3], t[:, 3:].reshape(-1, 3, 1)
        return {
            "tensor": lambda: t,
            "tuple": lambda: (a, b, c),
            "list": lambda: [a, b, c],
            "dict": lambda: {"a": a, "b": b, "c": c},
            "nested": lambda: {"p": (a, [b]), "q": {"c": c}},
        }[structure]()

    def unpack(state):
        leaves = torch.utils._pytree.tree_leaves(state)
        return torch.cat([leaf.reshape(len(leaf), -1) for leaf in leaves], dim=1)

    def f(state, x, w):
        return pack(torch.tanh(unpack(state) @ w + x))

    return f, pack, unpack, x, w


STRUCTURES = ["tensor", "tuple", "list", "dict", "nested"]


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("solver", SOLVERS, ids=name)
def test_the_structure_changes_nothing(structure, solver):
    """Nor does it change the gradient; one leaf has no dimension but the batch."""
    results = []
    for kind in ("tensor", structure):
        f, pack, unpack, x, w = pieces(kind)
        w.requires_grad_()
        solution = fixed_point(lambda z, x: f(z, x, w), pack(torch.zeros_like(x)), (x,), solver=solver, rtol=1e-10)  # noqa: B023
        value = unpack(solution.value)
        (grad,) = torch.autograd.grad(value.square().sum(), w)
        results.append((value, grad, solution.stats.evaluations))
    (value, grad, evaluations), (value2, grad2, evaluations2) = results
    torch.testing.assert_close(value, value2, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(grad, grad2, rtol=1e-10, atol=1e-10)
    assert torch.equal(evaluations, evaluations2)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_trajectory_has_the_structure(structure):
    f, pack, unpack, x, w = pieces(structure)
    solution = fixed_point(lambda z, x: f(z, x, w), pack(torch.zeros_like(x)), (x,), trajectory=True, rtol=1e-8)
    length = int(solution.stats.steps.max()) + 1
    ends = torch.utils._pytree.tree_map(lambda t: t[-1], solution.trajectory)
    torch.testing.assert_close(unpack(ends), unpack(solution.value), rtol=0, atol=0)
    for leaf in torch.utils._pytree.tree_leaves(solution.trajectory):
        assert leaf.shape[:2] == (length, 5)


def test_a_warm_start_keeps_the_structure():
    f, pack, _, x, w = pieces("nested")
    first = fixed_point(lambda z, x: f(z, x, w), pack(torch.zeros_like(x)), (x,), solver=Broyden())
    second = fixed_point(lambda z, x: f(z, x, w), first, (x,), solver=Broyden())
    assert (second.stats.evaluations == 1).all()
    assert set(second.value) == {"p", "q"}


def test_leaves_may_have_different_types():
    """They are solved in the wider one and returned in their own."""
    z0 = {"low": torch.zeros(3, 2), "high": torch.zeros(3, 2, dtype=D)}
    x = torch.ones(3, 2, dtype=D).requires_grad_()

    def f(z, x):
        return {"low": (0.5 * z["high"] + x).float(), "high": 0.5 * z["low"].double()}

    value = fixed_point(f, z0, (x,), rtol=1e-6).value
    assert value["low"].dtype == torch.float32
    assert value["high"].dtype == D
    torch.testing.assert_close(value["low"], torch.full((3, 2), 4 / 3), rtol=1e-5, atol=1e-5)
    (grad,) = torch.autograd.grad(value["high"].sum(), x)
    torch.testing.assert_close(grad, torch.full((3, 2), 2 / 3, dtype=D), rtol=1e-6, atol=1e-6)


def test_arguments_may_be_nested_and_hold_what_is_no_tensor():
    x = torch.rand(4, 2, dtype=D).requires_grad_()
    scale = torch.rand(4, 1, dtype=D).requires_grad_()
    rows = []

    def f(z, inputs, mode, nothing):
        rows.append(len(z))
        assert (mode, nothing) == ("half", None)
        assert inputs["deep"][0]["k"] == 3
        return 0.5 * inputs["deep"][1] * z + inputs["x"]

    args = ({"x": x, "deep": [{"k": 3}, scale]}, "half", None)
    solution = fixed_point(f, torch.zeros(4, 2, dtype=D), args, rtol=1e-11, max_steps=100, solver=Picard())
    torch.testing.assert_close(solution.value, x / (1 - 0.5 * scale))
    got = torch.autograd.grad(solution.value.sum(), (x, scale))
    expected = torch.autograd.grad((x / (1 - 0.5 * scale)).sum(), (x, scale))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    assert min(rows) < 4, "the finished samples were not taken out"


def test_arguments_may_be_shared_as_long_as_one_shape_cannot_be_mistaken_for_a_batch():
    """A weight that is as long as the batch looks like an argument with a row for each sample; it is not."""
    g = torch.Generator().manual_seed(0)
    n = 4
    w = 0.3 * torch.randn(n, n, generator=g, dtype=D)
    x = torch.randn(n, n, generator=g, dtype=D) * torch.tensor([[0.01], [3.0], [1.0], [30.0]], dtype=D)
    f = lambda z, x, w: torch.tanh(z @ w + x)  # noqa: E731
    w.requires_grad_()
    inside = fixed_point(f, torch.zeros_like(x), (x, w), rtol=1e-11, solver=Picard(), max_steps=200)
    outside = fixed_point(lambda z: f(z, x, w), torch.zeros_like(x), rtol=1e-11, solver=Picard(), max_steps=200)
    torch.testing.assert_close(inside.value, outside.value, rtol=0, atol=0)
    grads = [torch.autograd.grad(s.value.square().sum(), w)[0] for s in (inside, outside)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)


def test_a_weight_as_long_as_the_batch_survives_a_broken_row():
    n = 4
    w = (0.2 * torch.eye(n, dtype=D) + 0.05).requires_grad_()
    x = torch.ones(n, n, dtype=D)
    x[2] = torch.nan
    solution = fixed_point(lambda z, x, w: torch.tanh(z @ w + x), torch.zeros(n, n, dtype=D), (x, w), rtol=1e-10)
    fine = [0, 1, 3]
    good = fixed_point(lambda z, x: torch.tanh(z @ w + x), torch.zeros(3, n, dtype=D), (x[fine],), rtol=1e-10)
    torch.testing.assert_close(solution.value[fine], good.value, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("adjoint", [ImplicitAdjoint(), UnrollAdjoint()], ids=name)
def test_batches_of_one(adjoint):
    x = torch.rand(1, 3, dtype=D).requires_grad_()
    value = fixed_point(
        lambda z, x: 0.5 * torch.sin(z) + x, torch.zeros(1, 3, dtype=D), (x,), rtol=1e-12, adjoint=adjoint
    ).value
    (grad,) = torch.autograd.grad(value.sum(), x)
    torch.testing.assert_close(grad, 1 / (1 - 0.5 * value.cos()), rtol=1e-9, atol=1e-9)


class TestComplex:
    def test_is_refused_by_name(self):
        with pytest.raises(StateError, match=r"z0: expected a floating-point dtype, got torch.complex64"):
            fixed_point(lambda z: z, torch.zeros(2, 3, dtype=torch.complex64))

    def test_also_inside_a_structure(self):
        with pytest.raises(StateError, match=r"z0\['b'\].*complex128"):
            fixed_point(lambda z: z, {"a": torch.zeros(2), "b": torch.zeros(2, dtype=torch.complex128)})


@pytest.mark.parametrize("order", [1, 2])
def test_a_function_that_returns_its_argument_as_it_is_has_a_gradient(order):
    p = torch.randn(3, 4, requires_grad=True, generator=torch.Generator().manual_seed(0))
    adjoint = ImplicitAdjoint(order=order)
    for f, args in ((lambda z, x: x, (p,)), (lambda z: p, ())):
        value = fixed_point(f, torch.zeros(3, 4), args, adjoint=adjoint).value
        (gradient,) = torch.autograd.grad(value.sum(), p)
        assert torch.equal(gradient, torch.ones(3, 4))
