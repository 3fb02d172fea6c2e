"""What a gradient must survive: who uses the solution, how often, and in which mode."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from restpoint.solvers import (
    GMRES,
    LU,
    AdjointWarning,
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
    root,
)
from tests.solvers.problems import name

D = torch.float64
EXACT = [
    ImplicitAdjoint(),
    ImplicitAdjoint(GMRES()),
    ImplicitAdjoint(order=2),
    UnrollAdjoint(),
    CheckpointAdjoint(),
    CheckpointAdjoint(recursive=True),
    ReversibleAdjoint(),
]
ALL = [*EXACT, PhantomAdjoint(), JacobianFreeAdjoint()]
G = torch.Generator().manual_seed(4)
W = torch.randn(4, 4, generator=G, dtype=D)
W = W * (0.5 / torch.linalg.matrix_norm(W, 2))
X = torch.randn(3, 4, generator=G, dtype=D)


def solve(f, x, adjoint=None, z0=None, **options):
    solver = Picard(0.5) if isinstance(adjoint, ReversibleAdjoint) else None
    # More steps of the reversible iteration cannot be reconstructed to the resolution of the type, and it warns.
    options = {"rtol": 1e-5 if isinstance(adjoint, ReversibleAdjoint) else 1e-12, "max_steps": 200} | options
    return fixed_point(f, torch.zeros_like(X) if z0 is None else z0, x, solver=solver, adjoint=adjoint, **options)


def rest(x, w, steps=200):
    z = torch.zeros_like(x)
    for _ in range(steps):
        z = torch.tanh(z @ w + x)
    return z


def close(got, expected, adjoint=None):
    tolerance = 1e-3 if isinstance(adjoint, ReversibleAdjoint) else 1e-6
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("adjoint", EXACT, ids=name)
class TestWhatGetsAGradient:
    def test_arguments_closures_and_parameters_at_once(self, adjoint):
        x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
        layer = torch.nn.Linear(4, 4, bias=False).double()
        scale = torch.tensor(0.3, dtype=D, requires_grad=True)

        def f(z, x):
            return torch.tanh(z @ w + scale * layer(z) + x)

        got = torch.autograd.grad(solve(f, (x,), adjoint).value.pow(3).sum(), (x, w, scale, layer.weight))
        z = torch.zeros_like(X)
        for _ in range(300):
            z = f(z, x)
        close(got, torch.autograd.grad(z.pow(3).sum(), (x, w, scale, layer.weight)), adjoint)

    def test_frozen_parameters_do_not_and_the_others_do(self, adjoint):
        layer = torch.nn.Linear(4, 4).double()
        with torch.no_grad():
            layer.weight.copy_(W)
        layer.weight.requires_grad_(False)
        solve(lambda z, x: torch.tanh(layer(z) + x), (X,), adjoint).value.sum().backward()
        assert layer.weight.grad is None
        assert layer.bias.grad.abs().sum() > 0

    def test_an_argument_that_is_not_used(self, adjoint):
        x, idle = X.clone().requires_grad_(), X.clone().requires_grad_()
        value = solve(lambda z, x, idle: torch.tanh(z @ W + x), (x, idle), adjoint).value
        got = torch.autograd.grad(value.sum(), (x, idle), allow_unused=True)
        assert got[1] is None or (got[1] == 0).all()
        close(got[0], torch.autograd.grad(rest(x, W).sum(), x)[0], adjoint)

    def test_one_output_of_two_in_the_loss(self, adjoint):
        """The other's gradient is None inside autograd."""
        x = X.clone().requires_grad_()

        def f(state, x):
            a, b = state
            return torch.tanh(b @ W + x), 0.5 * a

        value = solve(f, (x,), adjoint, z0=(torch.zeros_like(X), torch.zeros_like(X))).value[1]
        close(torch.autograd.grad(value.sum(), x)[0], torch.autograd.grad(0.5 * rest(x, 0.5 * W).sum(), x)[0], adjoint)

    def test_an_input_that_is_no_leaf(self, adjoint):
        x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
        value = solve(lambda z, y: torch.tanh(z @ w.sin() + y), (x.sin(),), adjoint).value
        got = torch.autograd.grad(value.sum(), (x, w))
        close(got, torch.autograd.grad(rest(x.sin(), w.sin()).sum(), (x, w)), adjoint)

    def test_nothing_where_nothing_requires_it(self, adjoint):
        value = solve(lambda z, x: torch.tanh(z @ W + x), (X,), adjoint).value
        assert not value.requires_grad

    def test_nothing_under_no_grad(self, adjoint):
        w = W.clone().requires_grad_()
        with torch.no_grad():
            value = solve(lambda z, x: torch.tanh(z @ w + x), (X,), adjoint).value
        assert not value.requires_grad
        with torch.inference_mode():
            value = solve(lambda z, x: torch.tanh(z @ w + x), (X,), adjoint).value
        assert not value.requires_grad


class TestInitialValue:
    @pytest.mark.parametrize("adjoint", [ImplicitAdjoint(), PhantomAdjoint(), JacobianFreeAdjoint()], ids=name)
    def test_has_no_part_in_a_rest_point(self, adjoint):
        """Its derivative is zero there; it may be a leaf, no leaf, or share memory with an argument."""
        x = X.clone().requires_grad_()
        for z0 in (X.clone().requires_grad_(), X.clone().requires_grad_() * 2, x, x * 1):
            value = solve(lambda z, x: torch.tanh(z @ W + x), (x,), adjoint, z0=z0).value
            got = torch.autograd.grad(value.sum(), (x, z0) if z0 is not x else (x,), allow_unused=True)
            if isinstance(adjoint, ImplicitAdjoint):
                close(got[0], torch.autograd.grad(rest(x, W).sum(), x)[0])
            assert z0 is x or got[1] is None

    @pytest.mark.parametrize("adjoint", [UnrollAdjoint(), CheckpointAdjoint(), ReversibleAdjoint()], ids=name)
    def test_has_its_part_in_an_unrolled_iterate(self, adjoint):
        base = X.clone().requires_grad_()
        for z0 in (base, base * 1):
            value = solve(lambda z, x: torch.tanh(z @ W + x), (X,), adjoint, z0=z0, rtol=0.0, max_steps=2).value
            (got,) = torch.autograd.grad(value.sum(), base)
            assert got.abs().min() > 0


@pytest.mark.parametrize("adjoint", EXACT, ids=name)
class TestHowOftenAndWhen:
    def loss(self, x, w, adjoint):
        return solve(lambda z, x: torch.tanh(z @ w + x), (x,), adjoint).value.pow(3).sum()

    def test_backward_twice_through_a_retained_graph(self, adjoint):
        x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
        loss = self.loss(x, w, adjoint)
        first = torch.autograd.grad(loss, (x, w), retain_graph=True)
        second = torch.autograd.grad(loss, (x, w))
        torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-14)

    def test_twice_in_one_graph(self, adjoint):
        """The same function, once upon the other's result."""
        x, w = X.clone().requires_grad_(), W.clone().requires_grad_()

        def f(z, x):
            return torch.tanh(z @ w + x)

        first = solve(f, (x,), adjoint).value
        second = solve(f, (first + x,), adjoint).value
        got = torch.autograd.grad((first * second).sum(), (x, w))
        a = rest(x, w)
        close(got, torch.autograd.grad((a * rest(a + x, w)).sum(), (x, w)), adjoint)

    def test_each_output_of_its_own(self, adjoint):
        """Backward through parts of the value, one after the other, accumulates to the whole."""
        x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
        value = solve(lambda z, x: torch.tanh(z @ w + x), (x,), adjoint).value
        for row in range(3):
            value[row].sum().backward(retain_graph=True)
        close(w.grad, torch.autograd.grad(rest(x, w).sum(), w)[0], adjoint)

    def test_inside_a_checkpoint_of_the_caller(self, adjoint):
        x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
        for reentrant in (False, True):
            loss = checkpoint(lambda x, w: self.loss(x, w, adjoint), x, w, use_reentrant=reentrant)
            loss.backward()
            expected = torch.autograd.grad(rest(x, w).pow(3).sum(), (x, w))
            close((x.grad, w.grad), expected, adjoint)
            x.grad = w.grad = None

    def test_a_module_inside_that_checkpoints_itself(self, adjoint):
        x, w = X.clone().requires_grad_(), W.clone().requires_grad_()

        def f(z, x):
            return checkpoint(lambda z, x: torch.tanh(z @ w + x), z, x, use_reentrant=False)

        got = torch.autograd.grad(solve(f, (x,), adjoint).value.pow(3).sum(), (x, w))
        close(got, torch.autograd.grad(rest(x, w).pow(3).sum(), (x, w)), adjoint)

    def test_an_argument_changed_in_place_is_noticed(self, adjoint):
        w = W.clone().requires_grad_()
        x = X.clone()
        value = solve(lambda z, x: (z * x) @ w * 0.1 + 1, (x,), adjoint).value
        x.add_(1)
        with pytest.raises(RuntimeError, match="in.?place"):
            value.sum().backward()

    def test_also_where_the_number_of_steps_is_fixed(self, adjoint):
        """Nothing but the values differs in what is recomputed."""
        w = W.clone().requires_grad_()
        x = X.clone()
        value = solve(lambda z, x: (z * x) @ w * 0.1 + 1, (x,), adjoint, rtol=0.0, max_steps=6).value
        x.add_(1)
        with pytest.raises(RuntimeError, match="in.?place"):
            value.sum().backward()

    def test_a_value_changed_in_place_is_no_harm(self, adjoint):
        x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
        value = solve(lambda z, x: torch.tanh(z @ w + x), (x,), adjoint).value
        value.mul_(2)
        got = torch.autograd.grad(value.sum(), (x, w))
        close(got, torch.autograd.grad(2 * rest(x, w).sum(), (x, w)), adjoint)

    def test_parameters_updated_between_forward_passes(self, adjoint):
        """An optimiser's step in place; the next solve sees the new values and the old graph is gone."""
        w = W.clone().requires_grad_()
        for _ in range(2):
            loss = self.loss(X, w, adjoint)
            (got,) = torch.autograd.grad(loss, w)
            close(got, torch.autograd.grad(rest(X, w).pow(3).sum(), w)[0], adjoint)
            with torch.no_grad():
                w.sub_(0.1 * got)

    def test_anomaly_detection_finds_nothing(self, adjoint):
        x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
        with torch.autograd.set_detect_anomaly(True, check_nan=True):
            self.loss(x, w, adjoint).backward()
        assert torch.isfinite(w.grad).all()

    def test_hooks_on_parameters_fire_once(self, adjoint):
        """Distributed training counts on it."""
        layer = torch.nn.Linear(4, 4).double()
        with torch.no_grad():
            layer.weight.copy_(W)
        fired = []
        layer.weight.register_post_accumulate_grad_hook(lambda p: fired.append(p.grad.clone()))
        solve(lambda z, x: torch.tanh(layer(z) + x), (X,), adjoint).value.sum().backward()
        assert len(fired) == 1
        assert torch.equal(fired[0], layer.weight.grad)

    def test_nothing_is_kept_alive_by_the_solution(self, adjoint):
        """No cycles: the graph goes when the value does, without the collector."""
        gc.collect()
        gc.disable()
        try:
            w = W.clone().requires_grad_()
            solution = solve(lambda z, x: torch.tanh(z @ w + x), (X,), adjoint)
            solution.value.sum().backward()
            watch = weakref.ref(w)
            del w, solution
            assert watch() is None
        finally:
            gc.enable()

    def test_copies_and_pickles(self, adjoint):
        assert copy.deepcopy(adjoint) == adjoint
        assert pickle.loads(pickle.dumps(adjoint)) == adjoint  # noqa: S301
        assert hash(adjoint) == hash(copy.deepcopy(adjoint))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_a_reentrant_checkpoint_inside_is_refused_by_torch_and_not_dropped_by_us():
    """It hides the parameters that it uses from the graph: they must not be left without a gradient in silence."""
    w = W.clone().requires_grad_()

    def f(z, x):
        return checkpoint(lambda z, x: torch.tanh(z @ w + x), z, x, use_reentrant=True)

    value = solve(f, (X,), ImplicitAdjoint()).value
    with pytest.raises(RuntimeError, match="checkpoint"):
        value.sum().backward()


class TestReuse:
    """SHINE: the forward solve's inverse in the backward solve."""

    def run(self, adjoint, solver=None, max_steps=200, rtol=1e-10):
        g = torch.Generator().manual_seed(0)
        w = torch.randn(60, 60, generator=g, dtype=D)
        w = (w * (0.95 / torch.linalg.eigvals(w).abs().max())).requires_grad_()
        x = torch.randn(4, 60, generator=g, dtype=D)
        solution = fixed_point(
            lambda z, x: torch.tanh(z @ w + x), torch.zeros_like(x), (x,), solver=solver or Broyden(memory=60),
            adjoint=adjoint, rtol=rtol, max_steps=max_steps,
        )  # fmt: skip
        (grad,) = torch.autograd.grad(solution.value.sum(), w)
        return grad, solution

    def test_start_and_precondition_are_exact(self):
        plain, solution = self.run(ImplicitAdjoint(GMRES()))
        cold = solution.adjoint_stats.evaluations.sum()
        for reuse, share in (("start", 1.0), ("precondition", 0.7)):
            grad, solution = self.run(ImplicitAdjoint(GMRES(), reuse=reuse))
            torch.testing.assert_close(grad, plain, rtol=1e-7, atol=1e-8)
            assert solution.adjoint_stats.converged.all()
            assert solution.adjoint_stats.evaluations.sum() <= share * cold

    def test_only_is_free_and_nearer_than_no_inverse_at_all(self):
        plain, _ = self.run(ImplicitAdjoint())
        free, solution = self.run(ImplicitAdjoint(reuse="only"))
        crude, _ = self.run(JacobianFreeAdjoint())
        assert (solution.adjoint_stats.evaluations == 0).all()
        assert (free - plain).norm() < 0.9 * (crude - plain).norm()

    @pytest.mark.parametrize("reuse", ["start", "precondition"])
    def test_with_broken_rows_and_few_steps(self, reuse):
        x = X.clone()
        x[1] = torch.nan
        w = W.clone().requires_grad_()
        solution = fixed_point(
            lambda z, x: torch.tanh(z @ w + x), torch.zeros_like(X), (x,), solver=Broyden(), rtol=1e-10,
            adjoint=ImplicitAdjoint(GMRES(), reuse=reuse),
        )  # fmt: skip
        (got,) = torch.autograd.grad(solution.value.sum(), w)
        close(got, torch.autograd.grad(rest(X[[0, 2]], w).sum(), w)[0])

    def test_second_order(self):
        w = W[:2, :2].clone().requires_grad_()
        x = X[:2, :2]

        def value(w):
            return fixed_point(
                lambda z, x: torch.tanh(z @ w + x), torch.zeros_like(x), (x,), solver=Broyden(), rtol=1e-14,
                adjoint=ImplicitAdjoint(GMRES(), order=2, reuse="start"),
            ).value  # fmt: skip

        assert torch.autograd.gradgradcheck(value, (w,), fast_mode=True)


class TestSeveralGradientsAtOnce:
    """is_grads_batched=True, as torch.autograd.functional's vectorize=True asks for."""

    @staticmethod
    def jacobian(adjoint):
        return torch.autograd.functional.jacobian(
            lambda w: solve(lambda z, x: torch.tanh(z @ w + x), (X,), adjoint).value, W, vectorize=True
        )

    @pytest.mark.parametrize("adjoint", [ImplicitAdjoint(), ImplicitAdjoint(order=2), ReversibleAdjoint()], ids=name)
    def test_is_refused_where_each_is_looked_at(self, adjoint):
        with pytest.raises(RuntimeError, match=r"is_grads_batched=True.*torch.func.jacrev"):
            self.jacobian(adjoint)

    @pytest.mark.parametrize("adjoint", [UnrollAdjoint(), CheckpointAdjoint()], ids=name)
    def test_works_elsewhere(self, adjoint):
        close(self.jacobian(adjoint), torch.func.jacrev(lambda w: rest(X, w))(W))


@pytest.mark.parametrize("adjoint", [UnrollAdjoint(), CheckpointAdjoint(), ReversibleAdjoint()], ids=name)
def test_a_recorded_solve_that_begins_at_its_end_says_that_its_gradient_is_zero(adjoint):
    w = W.clone().requires_grad_()
    z0 = rest(X, W).detach()
    with pytest.warns(AdjointWarning, match="3 of 3 samples had converged at the initial value.*ImplicitAdjoint"):
        fixed_point(lambda z, x: torch.tanh(z @ w + x), z0, (X,), adjoint=adjoint, rtol=1e-3)
    with torch.no_grad():
        fixed_point(lambda z, x: torch.tanh(z @ w + x), z0, (X,), adjoint=adjoint, rtol=1e-3)


class TestTrajectory:
    def test_of_an_unrolled_solve_can_be_supervised(self):
        """Every intermediate state has its own gradient."""
        w = W.clone().requires_grad_()
        solution = solve(
            lambda z, x: torch.tanh(z @ w + x), (X,), UnrollAdjoint(), trajectory=True, rtol=0.0, max_steps=4
        )
        got = torch.autograd.grad(solution.trajectory.square().sum(), w)[0]
        assert solution.trajectory.shape == (5, 3, 4)
        assert got.abs().sum() > 0

    def test_of_an_implicit_solve_is_constant(self):
        w = W.clone().requires_grad_()
        solution = solve(lambda z, x: torch.tanh(z @ w + x), (X,), ImplicitAdjoint(), trajectory=True)
        assert not solution.trajectory.requires_grad
        assert solution.value.requires_grad


@pytest.mark.parametrize("solver", [Picard(), Anderson(), Anderson(kind="I"), Broyden(), Newton()], ids=name)
def test_a_warm_start_of_an_unrolled_solution(solver):
    """The second solve hangs on nothing of the first: its graph may be gone."""
    w = W.clone().requires_grad_()
    f = lambda z, x: torch.tanh(z @ w + x)  # noqa: E731
    for adjoint in (UnrollAdjoint(), CheckpointAdjoint()):
        first = fixed_point(f, torch.zeros_like(X), (X,), solver=solver, adjoint=adjoint, max_steps=1)
        first.value.sum().backward()
        values = []
        for _ in range(2):
            second = fixed_point(f, first, (X,), solver=solver, adjoint=adjoint, max_steps=30, rtol=1e-10)
            (grad,) = torch.autograd.grad(second.value.sum(), w)
            expected = torch.autograd.grad(rest(X, w).sum(), w)[0]
            torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-4)
            values.append(second.value)
        assert torch.equal(*values), "the first warm start changed what the second one found"


def test_steps_on_the_way_out_do_not_count():
    """A gradient that is zero costs no solve."""
    x = X.clone().requires_grad_()
    solution = root(lambda z, x: z - 0.5 * torch.sin(z) - x, X, (x,), adjoint=ImplicitAdjoint(LU()))
    (0 * solution.value).sum().backward()
    assert (x.grad == 0).all()
    assert (solution.adjoint_stats.steps == 0).all()
