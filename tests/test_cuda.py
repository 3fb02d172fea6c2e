"""The same on a GPU, where there is one."""

from __future__ import annotations

import pytest
import torch

from restpoint.solvers import (
    GMRES,
    Anderson,
    Broyden,
    CheckpointAdjoint,
    ImplicitAdjoint,
    Newton,
    Picard,
    ReversibleAdjoint,
    UnrollAdjoint,
    fixed_point,
    linear_solve,
    solve_ode,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def _problem(device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    weight = (0.4 * torch.randn(8, 8, generator=rng, dtype=torch.float64)).to(device).requires_grad_()
    x = torch.randn(5, 8, generator=rng, dtype=torch.float64).to(device)
    return weight, x, torch.zeros_like(x)


@pytest.mark.parametrize("solver", [Picard(), Anderson(), Anderson(kind="I"), Broyden(), Newton()], ids=repr)
@pytest.mark.parametrize(
    "adjoint", [ImplicitAdjoint(), ImplicitAdjoint(GMRES(), order=2), UnrollAdjoint(), CheckpointAdjoint()], ids=repr
)
def test_rest_point_and_gradient_are_those_of_the_cpu(solver, adjoint):
    found = []
    for device in ("cpu", "cuda"):
        weight, x, z0 = _problem(device)
        solution = fixed_point(
            lambda z, x, w=weight: torch.tanh(z @ w.T / 2 + x), z0, (x,), solver=solver, adjoint=adjoint,
            rtol=1e-12, max_steps=200,
        )  # fmt: skip
        assert bool(solution.converged.all())
        (gradient,) = torch.autograd.grad(solution.value.pow(3).sum(), weight)
        found.append((solution.value.cpu(), gradient.cpu()))
    for here, there in zip(*found, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-8, atol=1e-9)


def test_memory_does_not_grow_with_the_steps():
    weight, x, z0 = _problem("cuda")

    def peak(steps: int) -> int:
        torch.cuda.reset_peak_memory_stats()
        solution = fixed_point(
            lambda z, x: torch.tanh(z @ weight.T / 2 + x), z0, (x,), solver=Picard(0.1), adjoint=ReversibleAdjoint(),
            rtol=0.0, atol=0.0, max_steps=steps,
        )  # fmt: skip
        solution.value.sum().backward()
        return torch.cuda.max_memory_allocated()

    peak(10)
    assert peak(300) <= 1.05 * peak(10)


def test_autocast_solves_in_float32():
    rng = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(16, 16).cuda()
    x = torch.randn(4, 16, generator=rng).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        solution = fixed_point(lambda z, x: torch.tanh(0.3 * layer(z) + x), torch.zeros_like(x), (x,), rtol=1e-2)
    assert solution.value.dtype == torch.float32
    solution.value.sum().backward()
    assert layer.weight.grad is not None and bool(torch.isfinite(layer.weight.grad).all())


def test_linear_systems_and_trajectories_stay_on_the_device():
    rng = torch.Generator().manual_seed(0)
    matrix = (torch.randn(3, 6, 6, generator=rng) + 6 * torch.eye(6)).cuda()
    b = torch.randn(3, 6, generator=rng).cuda()
    torch.testing.assert_close(linear_solve(matrix, b).value, torch.linalg.solve(matrix, b), rtol=1e-4, atol=1e-4)
    y0 = torch.ones(4, 2, device="cuda", requires_grad=True)
    solution = solve_ode(lambda t, y: -y, y0, torch.linspace(0.0, 1.0, 5, device="cuda"))
    torch.testing.assert_close(
        solution.value[-1], torch.exp(torch.tensor(-1.0)).cuda().expand(4, 2), rtol=1e-4, atol=1e-4
    )
    solution.value[-1].sum().backward()
    assert y0.grad is not None and y0.grad.device == y0.device


def _maps():
    from restpoint import solvers

    return {
        "sparsemax": solvers.sparsemax,
        "entmax15": solvers.entmax15,
        "entmax": lambda x: solvers.entmax(x, 1.3, 0),
        "project_l1_ball": solvers.project_l1_ball,
        "project_l2_ball": solvers.project_l2_ball,
        "project_isotonic": solvers.project_isotonic,
        "soft_sort": solvers.soft_sort,
        "soft_rank": solvers.soft_rank,
        "sinkhorn": lambda x: solvers.sinkhorn(x).value,
        "project_birkhoff": lambda x: solvers.project_birkhoff(x).value,
    }


@pytest.mark.parametrize("name", _maps())
def test_simplex_maps_and_projections_are_those_of_the_cpu(name):
    x = torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = []
    for device in ("cpu", "cuda"):
        leaf = x.to(device).requires_grad_()
        value = _maps()[name](leaf)
        (gradient,) = torch.autograd.grad(value.pow(3).sum(), leaf)
        assert value.device == leaf.device
        found.append((value.detach().cpu(), gradient.cpu()))
    for here, there in zip(*found, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-10, atol=1e-12)
