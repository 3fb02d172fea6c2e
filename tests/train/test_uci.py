"""Tables: their fixed split, their units, and the normal density that flows are compared with."""

import math

import numpy as np
import pytest
import torch

from restpoint.models.flow import FFJORD
from restpoint.solvers.ode import RK4, ConstantController
from restpoint.train.data import DataError, load_data
from restpoint.train.picture import draw_picture
from restpoint.train.tasks import DensityEstimation


@pytest.fixture
def folder(tmp_path):
    generator = np.random.default_rng(0)
    x = generator.normal(size=(400, 4)).astype(np.float32) * [1, 10, 100, 1] + 5
    y = (x[:, 0] + generator.normal(size=400)).astype(np.float32)
    np.savez(tmp_path / "uci-regression.npz", **{"power-plant/x": x.astype(np.float32), "power-plant/y": y})
    return tmp_path


def test_a_table_is_split_once_and_standardised_by_what_trains(folder):
    source = load_data("uci_power_plant", folder)
    assert (source.train.shape, source.test.shape) == ((360, 5), (40, 5))
    torch.testing.assert_close(source.train.mean(0), torch.zeros(5).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close(source.train.std(0), torch.ones(5).double())
    assert source.test.equal(load_data("uci_power_plant", folder).test)
    together = torch.cat([source.train, source.test])
    assert len(torch.unique(together, dim=0)) == 400
    assert source.model_arguments == {"dim": 5}
    assert "first tenth (40 rows)" in source.split
    (folder / "uci-regression").mkdir()
    (folder / "uci-regression.npz").rename(folder / "uci-regression" / "uci-regression.npz")
    assert load_data("uci_power_plant", folder).test.equal(source.test)


def test_the_reference_is_the_normal_density_of_the_training_rows(folder):
    source = load_data("uci_power_plant", folder)
    rows, log_p = next(iter(source.test_batches(40)))
    covariance = source.train.T.cov()
    # The standardised columns have mean zero.
    squares = (source.test @ covariance.inverse() * source.test).sum(1)
    expected = -0.5 * (squares + torch.logdet(2 * math.pi * covariance))
    torch.testing.assert_close(log_p, expected.float())
    assert rows.dtype == torch.float32
    training, held_out = source.batches(100, 30, 60, 0, "cpu")
    assert (len(training), len(held_out)) == (3, 2)
    assert held_out.table.equal(source.train[-60:])
    assert next(training.epoch(1, start=1))[0].equal(list(training.epoch(1))[1][0])


def test_a_flow_of_a_table_is_measured_beside_the_normal_density(folder):
    source = load_data("uci_power_plant", folder)
    flow = FFJORD(dim=5, hidden=(8,), solver=RK4(), controller=ConstantController(dt=0.25))
    task = DensityEstimation(kinetic=0.01, jacobian=0.01)
    found = task.evaluate(flow, source.test_batches(20))
    rows, log_p = next(iter(source.test_batches(40)))
    with torch.no_grad():
        log_q = flow.log_prob(rows).double()
    assert found["log_likelihood"] == pytest.approx(float(log_q.mean()), rel=1e-5)
    assert found["gaussian_log_likelihood"] == pytest.approx(float(log_p.double().mean()), rel=1e-6)
    assert found["gain"] == pytest.approx(found["log_likelihood"] - found["gaussian_log_likelihood"])
    assert found["gain_error"] == pytest.approx(float((log_q - log_p).std()) / 40**0.5, rel=1e-4)
    assert not {"true_nll", "divergence"} & found.keys()
    assert len(draw_picture(task, flow, source).axes) == 8


def test_missing_and_damaged_tables_say_so(folder, tmp_path):
    with pytest.raises(DataError, match="give the folder"):
        load_data("uci_power_plant")
    with pytest.raises(DataError, match="missing; it holds the arrays kin8nm/x"):
        load_data("uci_kin8nm", tmp_path / "elsewhere")
    with pytest.raises(DataError, match="does not hold the arrays kin8nm/x"):
        load_data("uci_kin8nm", folder)
    np.savez(folder / "uci-regression.npz", **{"power-plant/x": np.ones((20, 3)), "power-plant/y": np.ones(20)})
    with pytest.raises(DataError, match="20 finite|5 finite numbers"):
        load_data("uci_power_plant", folder)
