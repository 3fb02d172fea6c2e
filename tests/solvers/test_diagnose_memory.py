"""Peak memory: the measure itself, and what it says of the adjoints."""

import pytest
import torch

from restpoint.solvers import (
    Anderson,
    Broyden,
    CheckpointAdjoint,
    ImplicitAdjoint,
    JacobianFreeAdjoint,
    PhantomAdjoint,
    Picard,
    ReversibleAdjoint,
    UnrollAdjoint,
    fixed_point,
)
from restpoint.solvers.diagnose import peak_memory

MEGABYTE = 250_000  # float32 numbers


def test_what_is_alive_together_is_added_up():
    def run():
        a = torch.zeros(MEGABYTE)
        b = a + 1
        c = a + b
        del b
        return c + 1  # a, c and this: b is gone

    assert peak_memory(run) == 3_000_000


def test_temporaries_do_not_add_up():
    def run():
        a = torch.zeros(MEGABYTE)
        for _ in range(50):
            a = a + 1
        return a

    assert peak_memory(run) == 2_000_000


def test_views_and_what_was_there_before_are_free():
    before = torch.zeros(MEGABYTE)

    def run():
        view = before.view(500, 500).T[3:]
        return view.add_(1), torch.as_strided(before, (2, 2), (1, 1))

    assert peak_memory(run) == 0
    assert peak_memory(lambda: before.view(500, 500) + 1) == 1_000_000


@pytest.mark.parametrize("count", [1, 10, 40])
def test_what_autograd_keeps_is_counted(count):
    leaf = torch.zeros(MEGABYTE, requires_grad=True)

    def run():
        z = leaf
        for _ in range(count):
            z = torch.sin(z)  # keeps its input
        z.sum().backward()
        leaf.grad = None

    # The results, of which the last is needed no longer, and two gradients under way.
    assert count * 1_000_000 <= peak_memory(run) <= (count + 3) * 1_000_000


def test_the_result_is_the_same_every_time_and_starts_from_nothing():
    def run():
        torch.randn(1000).sort()

    assert peak_memory(run) == peak_memory(run) == peak_memory(lambda: (run(), run()))
    assert peak_memory(lambda: None) == 0


def gradient_memory(adjoint, solver, steps):
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(8, 8, 3, 3, generator=generator, dtype=torch.float64) * 0.05)
    x = torch.randn(2, 8, 8, 8, generator=generator, dtype=torch.float64)

    def f(z, x):
        return torch.tanh(torch.nn.functional.conv2d(z, weight, padding=1) + x)

    def run():
        solution = fixed_point(f, torch.zeros_like(x), (x,), solver=solver, adjoint=adjoint, rtol=0.0, max_steps=steps)
        torch.autograd.grad(solution.value.square().sum(), weight)

    return peak_memory(run)


@pytest.mark.parametrize(
    "adjoint, solver",
    [
        (ImplicitAdjoint(), Picard()),
        (ImplicitAdjoint(), Anderson()),
        (ImplicitAdjoint(order=2), Picard()),
        (ImplicitAdjoint(reuse="only"), Broyden(memory=5)),
        (PhantomAdjoint(), Picard()),
        (JacobianFreeAdjoint(), Anderson()),
        (ReversibleAdjoint(), Picard(0.1)),
    ],
    ids=lambda part: type(part).__name__,
)
def test_memory_is_flat_in_the_number_of_steps(adjoint, solver):
    few, many = (gradient_memory(adjoint, solver, steps) for steps in (10, 80))
    assert many <= 1.05 * few


def test_memory_grows_as_documented_where_states_are_kept():
    def growth(adjoint):
        return gradient_memory(adjoint, Picard(), 81) / gradient_memory(adjoint, Picard(), 9)

    assert growth(UnrollAdjoint()) > 5
    # The square root of nine times as many steps is threefold, their logarithm twofold.
    assert 1.5 < growth(CheckpointAdjoint()) < 3.5
    assert growth(CheckpointAdjoint(recursive=True)) < 2
