"""Densities in the plane are what they say, and the task that learns them measures what it says."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.distributions import Independent, Normal

from restpoint.models.flow import FFJORD
from restpoint.solvers.ode import RK4, ConstantController
from restpoint.train import evaluate_model
from restpoint.train.config import Config, DataConfig
from restpoint.train.data import PointBatches, load_data
from restpoint.train.split import split_batches
from restpoint.train.tasks import DensityEstimation

NAMES = ["two_moons", "eight_gaussians", "checkerboard", "pinwheel"]


@pytest.mark.parametrize("name", NAMES)
def test_a_density_integrates_to_one_and_its_samples_have_its_entropy(name):
    density = load_data(name).density
    # Midpoints of cells, so that a density that jumps at whole numbers is integrated exactly.
    line = (torch.arange(400, dtype=torch.float64) + 0.5) * (2 * density.extent / 400) - density.extent
    grid = torch.cartesian_prod(line, line)
    total = sum(density.log_prob(part).exp().sum() for part in grid.split(40_000)) * (line[1] - line[0]) ** 2
    assert float(total) == pytest.approx(1, abs=5e-3 if name == "checkerboard" else 1e-6)
    log_p = density.log_prob(density.sample(4000, torch.Generator().manual_seed(0)))
    assert float(-log_p.mean()) == pytest.approx(density.entropy, abs=4 * float(log_p.std()) / 4000**0.5 + 1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_samples_lie_where_the_density_says(name):
    """Counts of samples by quadrant and ring against the density's integrals over them."""
    density = load_data(name).density
    x = density.sample(20_000, torch.Generator().manual_seed(1))
    line = (torch.arange(300, dtype=torch.float64) + 0.5) * (2 * density.extent / 300) - density.extent
    grid = torch.cartesian_prod(line, line)
    weight = density.log_prob(grid).exp()
    weight /= weight.sum()

    def cells(x):
        return 6 * ((x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()) + x.norm(dim=1).clamp(max=5.9).long()

    expected = torch.zeros(24, dtype=torch.float64).index_add_(0, cells(grid), weight)
    counted = torch.bincount(cells(x), minlength=24) / len(x)
    assert (counted - expected).abs().max() < 0.015


def test_batches_are_functions_of_seed_epoch_and_place():
    density = load_data("pinwheel").density
    batches = PointBatches(density, 10, 4, seed=3)
    assert [len(points) for points, _ in batches] == [4, 4, 2]
    last = list(batches.epoch(5))[2][0]
    assert next(batches.epoch(5, start=2))[0].equal(last)
    assert not last.equal(list(batches.epoch(6))[2][0])
    still = PointBatches(density, 10, 4, seed=3, fresh=False)
    assert next(still.epoch(5))[0].equal(next(still.epoch(6))[0])
    points, log_p = next(iter(batches))
    torch.testing.assert_close(log_p, density.log_prob(points.double()).float(), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="at least one point"):
        PointBatches(density, 0, 4)


def test_training_validation_and_test_points_differ():
    source = load_data("two_moons")

    def first(**data):
        training, held_out = split_batches(Config(data=DataConfig(name="two_moons", batch_size=8, **data)), source)
        return next(iter(training))[0], next(iter(held_out))[0]

    training, test = first(eval_batch_size=8)
    again, validation = first(eval_batch_size=8, validation=16)
    assert training.equal(again)
    assert not torch.equal(training, test)
    assert not torch.equal(validation, test)
    assert next(iter(source.test_batches(8)))[0].equal(test)


class Known(nn.Module):
    """A normal density, which is no flow."""

    def __init__(self):
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(2))

    def log_prob(self, x):
        return Independent(Normal(self.mean, torch.full((2,), 2.0)), 1).log_prob(x)


def test_any_density_can_be_trained_and_measured():
    model, source = Known(), load_data("eight_gaussians")
    points, truth = next(iter(source.test_batches(500)))
    outcome = DensityEstimation().losses(model, (points, truth), 0)
    outcome.loss.backward()
    assert float(outcome.loss.detach()) == outcome.metrics["nll"]
    torch.testing.assert_close(model.mean.grad, -points.mean(0) / 4)
    measured = evaluate_model(model, data="eight_gaussians", task="density", limit=500)
    assert measured["nll"] == pytest.approx(outcome.metrics["nll"], rel=1e-6)
    assert measured["true_nll"] == pytest.approx(-float(truth.mean()), rel=1e-6)
    assert measured["divergence"] == pytest.approx(measured["nll"] - measured["true_nll"])
    assert measured["divergence"] > 0
    assert "evaluations" not in measured


def test_a_flow_is_matched_first_and_regularised_then():
    flow = FFJORD(hidden=(8,), solver=RK4(), controller=ConstantController(dt=0.5))
    batch = next(iter(load_data("pinwheel").test_batches(64)))
    task = DensityEstimation(matching=2, kinetic=0.5, jacobian=0.25)
    assert set(task.losses(flow, batch, 1).metrics) == {"matching"}
    outcome = task.losses(flow, batch, 2)
    metrics = outcome.metrics
    expected = metrics["nll"] + 0.5 * metrics["kinetic"] + 0.25 * metrics["jacobian"]
    assert float(outcome.loss.detach()) == pytest.approx(expected, rel=1e-5)
    assert metrics["nll"] == pytest.approx(float(-flow.log_prob(batch[0]).mean().detach()), rel=1e-5)
    assert len(outcome.solutions) == 1
    plain = DensityEstimation().losses(copy.deepcopy(flow), batch, 0)
    assert float(plain.loss.detach()) == pytest.approx(metrics["nll"], rel=1e-5)


def test_the_checkerboards_entropy_is_known():
    assert load_data("checkerboard").density.entropy == math.log(32)
