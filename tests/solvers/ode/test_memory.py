"""What a gradient keeps in memory, against the number of steps; counted exactly, so that nothing here is noise."""

import pytest
import torch

from restpoint.solvers.diagnose import peak_memory
from restpoint.solvers.ode import (
    BacksolveAdjoint,
    CheckpointAdjoint,
    ConstantController,
    DirectAdjoint,
    Midpoint,
    Reversible,
    ReversibleAdjoint,
    Tsit5,
    adjoint_checkpoint,
    solve_ode,
    windows,
)

F64 = torch.float64


def peak(steps, adjoint, solver=None, columns=24, per_sample=False):
    weight = torch.randn(columns, columns, dtype=F64).requires_grad_()
    y0 = torch.randn(32, columns, dtype=F64)
    control = ConstantController(dt=1 / steps, per_sample=per_sample)

    def run():
        solution = solve_ode(
            lambda t, y: torch.tanh(y @ weight) / columns, y0, (0.0, 1.0), solver=solver or Midpoint(), adjoint=adjoint,
            controller=control,
        )  # fmt: skip
        return torch.autograd.grad(solution.value[-1].sum(), weight)

    return peak_memory(run)


@pytest.mark.parametrize(
    "solver, adjoint", [(Tsit5(), BacksolveAdjoint()), (Reversible(Midpoint()), ReversibleAdjoint())]
)
def test_flat(solver, adjoint):
    few, many = (peak(steps, adjoint, solver) for steps in (5, 50))
    assert many <= 1.02 * few


@pytest.mark.parametrize("per_sample", [False, True])
def test_square_root(per_sample, monkeypatch):
    monkeypatch.setattr(adjoint_checkpoint, "_TAPED", 0)
    few, many = (peak(steps, CheckpointAdjoint(), per_sample=per_sample) for steps in (9, 81))
    # Nine times as many steps; twice the root where the number of kept states was just halved.
    assert many <= 6 * few
    assert many <= 0.5 * peak(81, DirectAdjoint(), per_sample=per_sample)


def test_logarithm():
    few, many = (peak(steps, CheckpointAdjoint(recursive=True)) for steps in (8, 64))
    assert many <= 2 * few


def test_linear():
    """Which shows that the others' memory is seen at all."""
    few, many = (peak(steps, DirectAdjoint()) for steps in (5, 50))
    assert many > 7 * few


def test_recording_ends_where_its_budget_does(monkeypatch):
    """Two solves beyond it differ as the square root does, and not by what was recorded before."""
    monkeypatch.setattr(adjoint_checkpoint, "_TAPED", 2**16)
    few, many = (peak(steps, CheckpointAdjoint()) for steps in (36, 144))
    assert many <= 2.5 * few


def test_small_states(monkeypatch):
    """All of them are kept, and recorded in windows."""
    monkeypatch.setattr(windows, "_WINDOW", 2**12)
    few, many = (peak(steps, CheckpointAdjoint(), columns=2) for steps in (16, 96))
    assert many - few <= 1.5 * 80 * 32 * 2 * 8
