"""torch.func and forward-mode differentiation, against the same transforms of plain unrolled loops."""

import pytest
import torch
import torch.autograd.forward_ad as fwd
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

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
    SolverError,
    Status,
    UnrollAdjoint,
    fixed_point,
    root,
)
from restpoint.solvers.solution import MaxStepsWarning
from tests.solvers.problems import name

D = torch.float64
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")

G = torch.Generator().manual_seed(5)
W = 0.3 * torch.randn(3, 3, generator=G, dtype=D)
X = torch.randn(2, 3, generator=G, dtype=D)
V = torch.randn(3, 3, generator=G, dtype=D)


def f(z, x, w):
    return torch.tanh(z @ w + x)


def unrolled(w, x):
    z = torch.zeros_like(x)
    for _ in range(80):
        z = f(z, x, w)
    return z.pow(3).sum()


def solved(w, x, solver=None, adjoint=None):
    solution = fixed_point(
        lambda z, x: f(z, x, w), torch.zeros_like(x), (x,), solver=solver, adjoint=adjoint, rtol=1e-13, max_steps=200
    )
    return solution.value.pow(3).sum()


TRANSFORMS = {
    "grad": lambda h: grad(h)(W, X),
    "grad of both": lambda h: grad(h, argnums=(0, 1))(W, X),
    "vjp": lambda h: vjp(h, W, X)[1](torch.ones((), dtype=D)),
    "jvp": lambda h: jvp(h, (W, X), (V, X)),
    "jacrev": lambda h: jacrev(h)(W, X),
    "jacfwd": lambda h: jacfwd(h)(W, X),
    "hessian": lambda h: hessian(h)(W, X),
    "jacrev of jacrev": lambda h: jacrev(jacrev(h))(W, X),
    "jacfwd of jacfwd": lambda h: jacfwd(jacfwd(h))(W, X),
    "jacrev of jacfwd": lambda h: jacrev(jacfwd(h))(W, X),
    "vmap": lambda h: vmap(h, (None, 0))(W, torch.stack([X, 2 * X, -X])),
    "vmap over the parameter": lambda h: vmap(h, (0, None))(torch.stack([W, 0.5 * W]), X),
    "vmap of grad": lambda h: vmap(grad(h), (None, 0))(W, torch.stack([X, 2 * X, -X])),
    "grad of vmap": lambda h: grad(lambda w: vmap(h, (None, 0))(w, torch.stack([X, 2 * X])).sum())(W),
    "hessian-vector product": lambda h: jvp(grad(h), (W, X), (V, X)),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(
    ("solver", "adjoint"),
    [
        (None, None),
        (Broyden(), None),
        (Newton(), None),
        (Picard(), UnrollAdjoint()),
        (None, UnrollAdjoint()),
        (Anderson(kind="I"), None),
        (None, PhantomAdjoint(80, 1.0)),
    ],
    ids=name,
)
def test_equals_unrolled(transform, solver, adjoint):
    """Order 2 is taken by itself where a transform asks for it."""
    got = TRANSFORMS[transform](lambda w, x: solved(w, x, solver, adjoint))
    expected = TRANSFORMS[transform](unrolled)
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-7)
    if adjoint is None:
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("transform", ["grad", "jvp", "hessian", "vmap of grad"])
@pytest.mark.parametrize("solver", [Newton(), Broyden()], ids=name)
def test_root(transform, solver):
    def residual(z, x, w):
        return z + 0.3 * torch.sin(z @ w) - x

    def by_root(w, x):
        solution = root(lambda z, x: residual(z, x, w), x, (x,), solver=solver, rtol=1e-13)
        return solution.value.pow(3).sum()

    def by_hand(w, x):
        z = x
        for _ in range(80):
            z = z - residual(z, x, w)
        return z.pow(3).sum()

    got, expected = TRANSFORMS[transform](by_root), TRANSFORMS[transform](by_hand)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_third_derivatives_are_exact():
    """With the two steps that second derivatives need they would be silently wrong."""
    third = lambda h: jacrev(jacfwd(jacrev(h)))(W[:2, :2], X[:1, :2])  # noqa: E731
    torch.testing.assert_close(third(solved), third(unrolled), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("outer", [1, 2])
def test_autograd_outside_of_a_transform(outer):
    """Gradient penalties are built this way: torch.func inside, backward outside, perhaps twice."""

    def nested(h):
        w = W.clone().requires_grad_()
        inner = grad(lambda x: h(w, x))(X).pow(2).sum()
        for _ in range(outer):
            (g,) = torch.autograd.grad(inner, w, create_graph=True)
            inner = g.pow(2).sum()
        return g

    torch.testing.assert_close(nested(solved), nested(unrolled), rtol=1e-9, atol=1e-9)


def test_module_parameters_by_functional_call():
    module = torch.nn.Linear(3, 3).double()
    with torch.no_grad():
        module.weight.mul_(0.4)

    def loss(parameters, solve):
        g = lambda z, x: torch.tanh(functional_call(module, parameters, z) + x)  # noqa: E731
        if solve:
            return fixed_point(g, torch.zeros_like(X), (X,), rtol=1e-13, max_steps=200).value.pow(2).sum()
        z = torch.zeros_like(X)
        for _ in range(80):
            z = g(z, X)
        return z.pow(2).sum()

    parameters = {k: v.detach() for k, v in module.named_parameters()}
    got, expected = (grad(loss)(parameters, solve) for solve in (True, False))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_per_sample_gradients():
    """One gradient a sample, of a parameter that they share."""
    xs = torch.stack([X[:1], 2 * X[1:], -X[:1]])
    got = vmap(grad(solved), (None, 0))(W, xs)
    expected = torch.stack([grad(unrolled)(W, x) for x in xs])
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


class TestWhatTheyCannotDo:
    @pytest.mark.parametrize("adjoint", [CheckpointAdjoint(), ReversibleAdjoint()], ids=name)
    def test_replaying_adjoints_say_so(self, adjoint):
        with pytest.raises(RuntimeError, match=r"torch.func.*ImplicitAdjoint\(\)"):
            grad(lambda w: solved(w, X, None, adjoint))(W)

    def test_a_state_too_large_to_assemble(self):
        x = torch.zeros(1, 4000)
        with pytest.raises(ValueError, match=r"assembled, which is limited to 2048 numbers; this state has 4000"):
            grad(lambda x: fixed_point(lambda z, x: 0.5 * z + x, torch.zeros_like(x), (x,)).value.sum())(x)

    def test_vmap_of_a_large_state_finds_it_and_refuses_only_its_derivative(self):
        xs, w = torch.randn(2, 1, 4000), torch.full((4000,), 0.5, requires_grad=True)

        def one(x):
            return fixed_point(lambda z, x: torch.tanh(w * z + x), torch.zeros_like(x), (x,)).value

        expected = torch.cat([one(x) for x in xs]).detach()
        with torch.no_grad():
            torch.testing.assert_close(vmap(one)(xs).squeeze(1), expected)
        with torch.inference_mode():
            torch.testing.assert_close(vmap(one)(xs).squeeze(1), expected)
        values = vmap(one)(xs)
        torch.testing.assert_close(values.detach().squeeze(1), expected)
        with pytest.raises(ValueError, match=r"this state has 4000.*UnrollAdjoint\(\)"):
            values.sum().backward()

    def test_a_singular_jacobian_is_an_error_here_too(self):
        with pytest.raises(SolverError, match="singular"):
            grad(lambda t: root(lambda x, t: x**2 + t**2 - 1, torch.zeros(1, 1, dtype=D), (t,)).value.sum())(
                torch.ones(1, 1, dtype=D)
            )


class TestBrokenRows:
    x = torch.stack([X[0], X[1] * torch.nan, -X[1]])
    fine = [0, 2]

    def loss(self, w, adjoint):
        solution = fixed_point(
            lambda z, x: f(z, x, w), torch.zeros_like(self.x), (self.x,), rtol=1e-13, max_steps=200, adjoint=adjoint
        )
        return solution.value[self.fine].pow(3).sum()

    @pytest.mark.parametrize(
        "adjoint", [None, UnrollAdjoint(), PhantomAdjoint(80, 1.0), JacobianFreeAdjoint()], ids=name
    )
    def test_leave_the_others_alone(self, adjoint):
        got = grad(lambda w: self.loss(w, adjoint))(W)
        if isinstance(adjoint, JacobianFreeAdjoint):
            assert torch.isfinite(got).all()
        else:
            torch.testing.assert_close(got, grad(unrolled)(W, self.x[self.fine]), rtol=1e-8, atol=1e-8)

    def test_have_a_status_and_a_value_under_vmap(self):
        def one(x):
            solution = fixed_point(lambda z, x: f(z, x, W), torch.zeros_like(x), (x,), rtol=1e-10)
            return solution.value, solution.stats.status, solution.stats.steps

        value, status, steps = vmap(one)(self.x.unsqueeze(1))
        assert status.flatten().tolist() == [Status.CONVERGED, Status.NON_FINITE, Status.CONVERGED]
        assert torch.isfinite(value).all()
        assert steps.shape == (3, 1)


class TestThrow:
    """Also under vmap, where no single example can be asked."""

    @staticmethod
    def one(x, throw, max_steps):
        return fixed_point(
            lambda z, x: f(z, x, W), torch.zeros_like(x), (x,), throw=throw, max_steps=max_steps, rtol=1e-8
        ).value

    @pytest.mark.parametrize(
        "wrap", [lambda h: vmap(h), lambda h: vmap(grad(lambda x: h(x).sum()))], ids=["vmap", "grad"]
    )
    def test_raises_and_warns(self, wrap):
        xs = torch.stack([X, 0 * X, 2 * X])
        wrap(lambda x: self.one(x, True, 100))(xs)
        with pytest.raises(SolverError, match="of 6 samples did not converge"):
            wrap(lambda x: self.one(x, True, 2))(xs)
        with pytest.warns(MaxStepsWarning, match="of 6 samples did not converge"):
            wrap(lambda x: self.one(x, "warn", 2))(xs)


class TestForwardLevel:
    """torch.autograd.forward_ad, without torch.func."""

    @pytest.mark.parametrize("recording", [True, False], ids=["grad", "no_grad"])
    @pytest.mark.parametrize("solver", [Picard(), Anderson(), Anderson(kind="I"), Broyden(), Newton()], ids=name)
    @pytest.mark.parametrize(
        "adjoint",
        [ImplicitAdjoint(), ImplicitAdjoint(order=2), UnrollAdjoint(), CheckpointAdjoint(), PhantomAdjoint(80, 1.0)],
        ids=name,
    )
    def test_tangents(self, recording, solver, adjoint):
        _, expected = jvp(unrolled, (W, X), (V, X))
        with torch.set_grad_enabled(recording), fwd.dual_level():
            out = solved(fwd.make_dual(W, V), fwd.make_dual(X, X), solver, adjoint)
            tangent = fwd.unpack_dual(out).tangent
        torch.testing.assert_close(tangent.detach(), expected, rtol=1e-7, atol=1e-7)

    @pytest.mark.parametrize("solver", [Picard(), Anderson(), Broyden(), Newton()], ids=name)
    @pytest.mark.parametrize("recording", [True, False], ids=["grad", "no_grad"])
    def test_tangents_of_the_initial_value_of_an_unrolled_solve(self, solver, recording):
        z0 = 0.1 * X

        def iterate(z0):
            return fixed_point(
                lambda z, x: f(z, x, W), z0, (X,), solver=solver, adjoint=UnrollAdjoint(), rtol=0.0, max_steps=3
            ).value

        _, expected = jvp(iterate, (z0,), (X,))
        with torch.set_grad_enabled(recording), fwd.dual_level():
            tangent = fwd.unpack_dual(iterate(fwd.make_dual(z0, X))).tangent
        torch.testing.assert_close(tangent, expected, rtol=1e-9, atol=1e-10)

    def test_forward_over_reverse(self):
        w = W.clone().requires_grad_()
        with fwd.dual_level():
            (g,) = torch.autograd.grad(solved(fwd.make_dual(w, V), X), w, create_graph=True)
            product = fwd.unpack_dual(g).tangent
        expected = jvp(grad(unrolled), (W, X), (V, torch.zeros_like(X)))[1]
        torch.testing.assert_close(product.detach(), expected, rtol=1e-10, atol=1e-10)
