"""Training a model of trajectories takes as much memory for many steps as for few, without being told how."""

import pytest
import torch

from restpoint.models.graph import GRAND, Graph
from restpoint.models.physics import HamiltonianNetwork
from restpoint.solvers import (
    RK4,
    CheckpointAdjoint,
    ConstantController,
    DirectAdjoint,
    Leapfrog,
    ReversibleAdjoint,
)
from restpoint.solvers.diagnose import peak_memory
from restpoint.zoo import create_model

TIMES = (0.0, 1.0)


def images(channels, side):
    return torch.randn(4, channels, side, side)


def series(batch=256):
    times = torch.arange(3.0).expand(batch, -1)
    return times, torch.randn(batch, 3, 3), torch.ones(batch, 3, 3, dtype=torch.bool)


def observed(degrees=2):
    return torch.randn(256, 5, 2 * degrees)


# How a model is made with a solver and its steps, and what a training step computes of it.
CASES = {
    "ode_net": (lambda **how: create_model("ode_net_tiny", **how), lambda model: model(images(1, 8))),
    "ode_convnext": (lambda **how: create_model("test_ode_convnext", **how), lambda model: model(images(3, 16))),
    "ffjord": (lambda **how: create_model("ffjord_small", **how), lambda model: model.log_prob(torch.randn(64, 2))),
    "image_flow": (
        lambda **how: create_model("test_image_flow", divergence="rademacher", **how),
        lambda model: model.log_prob(torch.randn(16, 1, 4, 4)),
    ),
    "neural_cde": (lambda **how: create_model("test_neural_cde", **how), lambda model: model(*series())),
    "latent_ode": (
        lambda solver, controller: create_model(
            "test_latent_ode", encoder_solver=solver, encoder_controller=controller
        ),
        lambda model: model(*series()),
    ),
    "ode_rnn": (lambda **how: create_model("test_ode_rnn", **how), lambda model: model(*series())),
    "grand": (
        lambda **how: GRAND(features=8, channels=16, num_classes=3, time=1.0, **how),
        lambda model: model(Graph.of(torch.tensor([[0, 1, 2], [1, 2, 3]]), torch.ones(4, 8), undirected=True)),
    ),
    "unstructured": (
        lambda **how: create_model("unstructured_ode_small", degrees=2, **how),
        lambda model: model(observed(), TIMES),
    ),
    "second_order": (
        lambda **how: create_model("sonode_small", degrees=2, **how),
        lambda model: model(observed(), TIMES),
    ),
    "hamiltonian": (
        lambda solver, controller: create_model(
            "hamiltonian_small", degrees=2, solver=Leapfrog(), controller=controller
        ),
        lambda model: model(observed(), TIMES),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_training_takes_no_more_memory_for_more_steps(name):
    make, use = CASES[name]

    def peak(steps):
        torch.manual_seed(0)
        model = make(solver=RK4(), controller=ConstantController(dt=1 / steps))
        return peak_memory(lambda: use(model).square().sum().backward())

    # Of four times as many steps; the square root would be 2.
    assert peak(8) < 1.2 * peak(2)


def test_symplectic_steps_are_undone_by_default_and_give_the_gradient_of_recorded_ones():
    seen = torch.randn(4, 1, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = []
    for adjoint in (None, DirectAdjoint()):
        torch.manual_seed(0)
        model = HamiltonianNetwork(degrees=2, hidden=(16,), adjoint=adjoint).double()
        model(seen, (0.0, 0.35, 2.0)).square().sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-10)
    assert isinstance(HamiltonianNetwork().adjoint, ReversibleAdjoint)
    assert HamiltonianNetwork(solver=RK4()).adjoint == CheckpointAdjoint(recursive=True)
