"""Series with missing values: their data sets, their batches, and the task."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from restpoint.train import evaluate_model
from restpoint.train.data import DataError, Series, load_data
from restpoint.train.tasks import SeriesClassification


@pytest.fixture
def stays(tmp_path):
    """Sixty stays of three variables; who dies had a high second variable."""
    rng = np.random.default_rng(0)
    ptr, minute, variable, value = [0], [], [], []
    dead = np.arange(60) % 3 == 0
    for i in range(60):
        count = 0 if i == 5 else int(rng.integers(3, 9))
        minute += sorted(rng.integers(0, 2880, count))
        which = rng.integers(0, 3, count)
        variable += list(which)
        value += list(rng.normal(size=count) + 40 + 6 * (which == 1) * dead[i])
        ptr.append(len(minute))
    content = {
        "ptr": np.array(ptr), "minute": np.array(minute, np.uint16), "variable": np.array(variable, np.uint8),
        "value": np.array(value, np.float32), "variable_names": np.array(["HR", "Temp", "pH"]),
        "set": np.repeat([0, 1, 2], 20).astype(np.uint8),
        "static": np.stack([rng.normal(50, 9, 60), np.where(np.arange(60) % 4 == 0, -1, 1.0)], 1).astype(np.float32),
        "outcome": np.stack([np.zeros(60), dead], 1).astype(np.int32),
        "outcome_names": np.array(["SOFA", "In-hospital_death"]),
    }  # fmt: skip
    np.savez(tmp_path / "physionet2012.npz", **content)
    return tmp_path, content


def test_series_hold_every_observation_in_its_place(stays):
    folder, content = stays
    source = load_data("physionet2012", folder)
    assert (len(source.train), len(source.test)) == (40, 20)
    assert source.model_arguments == {"variables": 3, "statics": 2, "span": 48.0}
    rows = [4, 5, 41]
    series = dataclasses.replace(source.series, resolution=1).take(rows)
    assert len(series) == 3
    assert not series.observed[1].any(), "a stay without observations"
    for row, times, values, observed in zip(rows, series.times, series.values, series.observed, strict=True):
        part = slice(content["ptr"][row], content["ptr"][row + 1])
        seen = {(m, v) for m, v in zip(content["minute"][part].tolist(), content["variable"][part].tolist())}
        found = {(round(float(times[i]) * 60), int(v)) for i, v in observed.nonzero().tolist()}
        assert found == seen
        assert (times.diff() >= 0).all()
        assert (values[~observed] == 0).all()
    known = [
        source.series.value[
            (source.series.variable == v) & (torch.arange(len(source.series.value)) < source.series.ptr[40])
        ]
        for v in range(3)
    ]
    for part in known:
        assert float(part.mean()) == pytest.approx(0, abs=1e-5)
        assert float(part.std(correction=0)) == pytest.approx(1, abs=1e-5)
    assert source.series.static[0, 1] == 0, "unknown"


def test_observations_of_the_same_time_are_one_point_and_the_last_counts(stays):
    folder, content = stays
    content = dict(content)
    content["minute"][:3], content["variable"][:3] = [0, 4, 5], [1, 2, 1]
    np.savez(folder / "physionet2012.npz", **content)
    source = load_data("physionet2012", folder)
    series = source.series.take([0])
    assert series.times[0, 0] == 0
    assert series.observed[0, 0].tolist() == [False, True, True]
    assert series.values[0, 0, 1] == source.series.value[2]
    batch = next(source.batches(8, 8, 0, 0, "cpu")[0].epoch(1, rank=1, world=2))
    assert Series(*batch).outcome.shape == (4,)


def test_damaged_series_are_refused(stays):
    folder, content = stays
    with pytest.raises(DataError, match="--data-dir"):
        load_data("physionet2012")
    with pytest.raises(DataError, match="missing, damaged"):
        load_data("physionet2012", folder / "nowhere")
    np.savez(folder / "physionet2012.npz", **{**content, "ptr": content["ptr"] + 1})
    with pytest.raises(DataError, match="do not fit each other"):
        load_data("physionet2012", folder)
    whole = (folder / "physionet2012.npz").read_bytes()
    (folder / "physionet2012.npz").write_bytes(whole[:300])
    with pytest.raises(DataError, match="missing, damaged"):
        load_data("physionet2012", folder)


class Mean(nn.Module):
    """A logit that is linear in each variable's mean."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 1)

    def forward(self, times, values, observed, static):
        return self.linear(values.sum(1) / observed.sum(1).clamp_min(1))[:, 0]


def test_an_event_is_foretold_and_the_areas_are_measured(stays):
    folder, _ = stays
    model, task = Mean(), SeriesClassification(positive_weight=2.0)
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    source = load_data("physionet2012", folder)
    training, _ = source.batches(20, 20, 0, 0, "cpu")
    for epoch in range(30):
        for batch in training.epoch(epoch):
            optimizer.zero_grad()
            task.losses(model, batch, 0).loss.backward()
            optimizer.step()
    measured = evaluate_model(model, folder, data="physionet2012", task=task.kind)
    assert set(measured) == {"cross_entropy", "accuracy", "events", "auroc", "auprc"}
    assert measured["auroc"] > 0.8
    assert measured["auprc"] > measured["events"] == pytest.approx(0.3)
    few = evaluate_model(model, folder, data="physionet2012", task=task.kind, limit=1)
    assert "auroc" not in few
