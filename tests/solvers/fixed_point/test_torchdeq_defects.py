"""What torchdeq 0.1.0 gets wrong, a test each. Those of its layer are tested with the layer."""

import copy
import pickle

import pytest
import torch

from restpoint.solvers import (
    Anderson,
    Broyden,
    ImplicitAdjoint,
    Newton,
    Picard,
    Status,
    UnrollAdjoint,
    fixed_point,
)
from tests.solvers.problems import CASES, name

D = torch.float64
LINEAR, ROTATION = (next(case for case in CASES if case.name == wanted) for wanted in ("linear", "rotation"))
G = torch.Generator().manual_seed(6)
W = torch.randn(8, 8, generator=G, dtype=D)
W = W * (0.6 / torch.linalg.matrix_norm(W, 2))
X = torch.randn(5, 8, generator=G, dtype=D)


def f(z, x):
    return torch.tanh(z @ W.to(z.dtype) + x)


def solve(case, **options):
    return fixed_point(lambda z, x: case.f(z, x, case.parameter), case.z0, (case.x,), **options)


def test_double_backward_is_silently_wrong():
    """There with a relative error of 1.5; here exact, or refused."""
    w = W[:3, :3].clone().requires_grad_()
    x = X[:2, :3]

    def gradient(adjoint, solver=None):
        value = fixed_point(
            lambda z, x: torch.tanh(z @ w + x), torch.zeros_like(x), (x,), adjoint=adjoint, solver=solver, rtol=1e-13,
            max_steps=200,
        ).value  # fmt: skip
        (first,) = torch.autograd.grad(value.pow(3).sum(), w, create_graph=True)
        return torch.autograd.grad(first.pow(2).sum(), w)[0]

    expected = gradient(UnrollAdjoint(), Picard())
    torch.testing.assert_close(gradient(ImplicitAdjoint(order=2)), expected, rtol=1e-9, atol=1e-9)
    with pytest.raises(RuntimeError, match="order=2"):
        gradient(ImplicitAdjoint())


def test_torch_func_and_vmap_raise():
    def loss(x):
        return fixed_point(f, torch.zeros_like(x), (x,), rtol=1e-12, max_steps=100).value.square().sum()

    x = X.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(x), x)
    torch.testing.assert_close(torch.func.grad(loss)(X), expected, rtol=1e-9, atol=1e-10)
    each = torch.func.vmap(torch.func.grad(loss))(X.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(each, expected, rtol=1e-9, atol=1e-10)


def test_the_adjoint_fails_under_autocast():
    """It runs outside of autocast there, on what was recorded inside."""
    layer = torch.nn.Linear(8, 8)
    with torch.no_grad():
        layer.weight.copy_(W)
    x = X.float()
    grads = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            value = fixed_point(lambda z, x: torch.tanh(layer(z) + x), torch.zeros_like(x), (x,), rtol=1e-2).value
            loss = value.float().square().sum()
        layer.zero_grad()
        loss.backward()
        grads.append(layer.weight.grad.clone())
    torch.testing.assert_close(grads[1], grads[0], rtol=0.1, atol=0.1)


@pytest.mark.parametrize("solver", [Anderson(), Anderson(kind="I"), Anderson(regularization=1e-8)], ids=name)
def test_anderson_dies_in_bfloat16(solver):
    """linalg.solve knows no half precision; the small system is solved in a wide one here."""
    x = X.bfloat16()
    solution = fixed_point(f, torch.zeros_like(x), (x,), solver=solver, rtol=2e-2)
    assert solution.value.dtype == torch.bfloat16
    assert solution.converged.all()
    reference = fixed_point(f, torch.zeros_like(X), (x.double(),), rtol=1e-10).value
    assert (solution.value.double() - reference).norm() < 0.03 * reference.norm()


@pytest.mark.parametrize("solver", [Picard(), Anderson(), Broyden(), Newton()], ids=name)
def test_a_nan_row_destroys_the_best_iterate_of_every_row(solver):
    """`mask * a + ~mask * b` is NaN wherever either is."""
    x = X.clone()
    x[2] = torch.nan
    solution = fixed_point(f, torch.zeros_like(x), (x,), solver=solver, max_steps=3, rtol=1e-14)
    others = [0, 1, 3, 4]
    alone = fixed_point(f, torch.zeros_like(x[others]), (x[others],), solver=solver, max_steps=3, rtol=1e-14)
    assert torch.isfinite(solution.value).all()
    torch.testing.assert_close(solution.value[others], alone.value, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(solution.stats.residual[others], alone.stats.residual, rtol=1e-6, atol=1e-13)


@pytest.mark.parametrize("memory", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("case", [LINEAR, ROTATION], ids=name)
def test_broyden_diverges_once_its_memory_is_full(case, memory):
    """It overwrites factors that later updates were computed with."""
    solution = solve(case, solver=Broyden(memory=memory), rtol=1e-10, max_steps=400)
    assert (solution.stats.steps > memory + 1).all(), "the memory has been full"
    assert solution.converged.all()
    torch.testing.assert_close(solution.value, case.reference(), rtol=1e-8, atol=1e-8)


def test_broyden_with_a_full_memory_still_accelerates():
    picard, broyden = (solve(ROTATION, solver=s, rtol=1e-10, max_steps=400) for s in (Picard(), Broyden(memory=4)))
    assert (broyden.stats.steps < 0.5 * picard.stats.steps).all()


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-6, 1e-9])
def test_anderson_fades_as_the_residual_falls(scale):
    """Its regularisation is absolute there; a state a million times smaller is plain iteration."""
    unscaled = solve(LINEAR, solver=Anderson(), rtol=1e-8, max_steps=300)
    solution = fixed_point(
        lambda z, x: scale * LINEAR.f(z / scale, x, LINEAR.parameter), LINEAR.z0, (LINEAR.x,), rtol=1e-8, max_steps=300
    )
    assert solution.converged.all()
    assert (solution.stats.steps - unscaled.stats.steps).abs().max() <= 2
    picard = solve(LINEAR, solver=Picard(), rtol=1e-8, max_steps=300)
    assert (solution.stats.steps < 0.3 * picard.stats.steps).all()


@pytest.mark.parametrize("solver", [Picard(), Anderson(), Anderson(kind="I"), Broyden()], ids=name)
@pytest.mark.parametrize("steps", [1, 2])
def test_few_steps_return_the_initial_value_untouched(solver, steps):
    reference = LINEAR.reference()
    value = solve(LINEAR, solver=solver, max_steps=steps, rtol=1e-12).value
    assert (value - reference).norm() < reference.norm()
    assert (value != 0).any(dim=1).all()


def test_memory_1_raises():
    one, picard = (solve(LINEAR, solver=s, rtol=1e-8, max_steps=300) for s in (Anderson(memory=1), Picard()))
    torch.testing.assert_close(one.value, picard.value, rtol=1e-12, atol=1e-12)
    assert solve(LINEAR, solver=Broyden(memory=1), rtol=1e-8, max_steps=400).converged.all()


def test_one_hard_row_makes_all_rows_pay():
    rate = torch.tensor([[0.1], [0.2], [0.3], [0.99]], dtype=D)
    rows = []

    def slow(z, x, rate):
        rows.append(len(z))
        return rate * z + x

    x = torch.ones(4, 1, dtype=D)
    solution = fixed_point(slow, torch.zeros_like(x), (x, rate), solver=Picard(), rtol=1e-6, max_steps=2000)
    evaluations = solution.stats.evaluations
    assert evaluations[3] > 20 * evaluations[:3].max()
    assert sum(rows) < 1.2 * evaluations.sum()


@pytest.mark.parametrize("solver", [Broyden(), Newton()], ids=name)
def test_one_step_size_of_the_line_search_for_the_whole_batch(solver):
    """A row that has to halve its steps leaves those of the others alone."""

    def minus_cubic(z, slope, x):
        return x - slope * (z - x) ** 3

    x = torch.tensor([[0.5], [-3.0], [1.0]], dtype=D)
    slope = torch.tensor([[0.1], [1.0], [0.2]], dtype=D)
    options = {"solver": solver, "rtol": 1e-10, "max_steps": 200, "trajectory": True}
    together = fixed_point(minus_cubic, torch.zeros_like(x), (slope, x), **options)
    for row in (0, 2):
        alone = fixed_point(minus_cubic, torch.zeros(1, 1, dtype=D), (slope[row, None], x[row, None]), **options)
        path = together.trajectory[: len(alone.trajectory), row, None]
        torch.testing.assert_close(path, alone.trajectory, rtol=1e-12, atol=1e-12)
    assert together.stats.steps[1] > together.stats.steps[0]
    assert together.converged.all()


def test_eval_drops_the_gradient():
    layer = torch.nn.Linear(8, 8).double()
    with torch.no_grad():
        layer.weight.copy_(W)
    grads = []
    for training in (True, False):
        layer.train(training)
        layer.zero_grad()
        fixed_point(lambda z, x: torch.tanh(layer(z) + x), torch.zeros_like(X), (X,)).value.sum().backward()
        grads.append(layer.weight.grad.clone())
    assert grads[0].abs().sum() > 0
    assert torch.equal(*grads)


def test_a_solve_used_twice_recurses_without_end():
    w = W.clone().requires_grad_()
    g = lambda z, x: torch.tanh(z @ w + x)  # noqa: E731
    first = fixed_point(g, torch.zeros_like(X), (X,))
    second = fixed_point(g, torch.zeros_like(X), (first.value,))
    (first.value.sum() + second.value.sum()).backward()
    assert torch.isfinite(w.grad).all()


@pytest.mark.parametrize("thing", [Anderson(memory=3), Broyden(), Newton(), ImplicitAdjoint(order=2)], ids=name)
def test_copies_and_pickles_break(thing):
    assert copy.deepcopy(thing) == thing
    assert pickle.loads(pickle.dumps(thing)) == thing  # noqa: S301


def test_unknown_options_are_ignored():
    with pytest.raises(TypeError, match="f_sovler"):
        fixed_point(f, torch.zeros_like(X), (X,), f_sovler=Anderson())
    with pytest.raises(TypeError, match="Anderson has no option 'f_stop_mode'"):
        Anderson(f_stop_mode="rel")
    with pytest.raises(TypeError, match="Did you mean 'regularization'?"):
        Anderson(regularisation=1e-4)


def test_statistics_are_of_the_batch():
    """Here each sample has its own."""
    solution = solve(LINEAR, rtol=1e-8)
    for statistic in (solution.stats.steps, solution.stats.evaluations, solution.stats.residual, solution.stats.status):
        assert statistic.shape == (4,)
    assert (solution.stats.status == Status.CONVERGED).all()
