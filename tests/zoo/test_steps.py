"""Solves that are told how long to be."""

import pytest
import torch

from restpoint.models.graph import GRAND, Graph
from restpoint.zoo import create_model
from restpoint.zoo.results import _growth
from restpoint.zoo.steps import forced_steps, seen_spans


@pytest.mark.parametrize("name", ["conv_deq_tiny", "ode_net_tiny", "mon_conv_small"])
def test_every_kind_of_solve_takes_as_many_steps_as_it_is_told_and_is_itself_again(name):
    torch.manual_seed(0)
    model, images = create_model(name).eval(), torch.randn(2, 1, 12, 12)
    with torch.no_grad():
        before = model.solve(images)
        for steps in (4, 9):
            with forced_steps(model, steps) as layers:
                assert layers == 1
                assert model.solve(images).stats.steps.tolist() == [steps, steps]
        after = model.solve(images)
    assert torch.equal(before.value, after.value)
    assert before.stats.steps.equal(after.stats.steps)


def test_diffusion_says_how_long_it_is():
    graph = Graph.of(torch.tensor([[0, 1, 2], [1, 2, 3]]), torch.rand(4, 8), undirected=True)
    model = GRAND(features=8, channels=16, num_classes=3, time=4.0).eval()
    with torch.no_grad(), forced_steps(model, 5) as layers:
        assert layers == 1
        assert model.solve(graph).stats.steps.tolist() == [5]


def test_who_is_told_how_long_to_go_on_takes_as_many_steps_as_well():
    model, seen, times = create_model("test_unstructured_ode").eval(), torch.randn(2, 1, 2), (0.0, 1.5, 4.0)
    with torch.no_grad():
        spans = seen_spans(model, lambda: model(seen, times))
        assert spans == {model: 4.0}
        assert "solve" not in vars(model)
        with forced_steps(model, 6) as layers:
            assert layers == 0
        with forced_steps(model, 6, spans) as layers:
            assert layers == 1
            assert model.solve(seen, times).stats.steps.tolist() == [6, 6]


@pytest.mark.parametrize("name", ["test_unstructured_ode", "test_sonode", "test_hamiltonian"])
def test_training_a_model_of_trajectories_keeps_nothing_of_their_steps(name):
    torch.manual_seed(0)
    growth = _growth(create_model(name), torch.randn(256, 5, 2), lambda model, seen: model(seen, (0.0, 1.6)))
    assert growth == pytest.approx(1.0, abs=0.1)


def test_what_has_no_solve_has_no_growth():
    batch = (torch.randn(2, 3), torch.zeros(2))
    assert _growth(torch.nn.Linear(3, 2), batch, lambda model, batch: model(batch[0])) is None
