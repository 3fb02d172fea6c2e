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
    assert list(measured) == ["auroc", "auprc", "accuracy", "cross_entropy", "events"]
    assert measured["auroc"] > 0.8
    assert measured["auprc"] > measured["events"] == pytest.approx(0.3)
    few = evaluate_model(model, folder, data="physionet2012", task=task.kind, limit=1)
    assert "auroc" not in few


TS = """#a comment
@problemName Tones
@timeStamps false
@univariate false
@dimensions 2
@equalLength false
@classLabel true low high
@data
"""


def write(folder, train, test=None):
    for part, lines in (("TRAIN", train), ("TEST", train if test is None else test)):
        (folder / f"JapaneseVowels_{part}.ts").write_text(TS + "\n".join(lines))
    return folder


def test_ts_files_are_read_whatever_their_lengths(tmp_path):
    write(tmp_path, ["1,2,3:4,?,6:low", "", "7,8:9,NaN:high", "1:2,5:low"])
    source = load_data("japanese_vowels", tmp_path)
    assert (source.train, source.test) == ((0, 1, 2), (3, 4, 5))
    assert source.model_arguments == {"variables": 2, "statics": 0, "num_classes": 2, "span": 2.0}
    assert source.card_fields == {"labels": ("low", "high")}
    series = source.series.take([0, 1, 2])
    assert series.times.tolist() == [[0, 1, 2], [0, 1, 1], [0, 1, 1]]
    expected = [[[1, 1], [1, 0], [1, 1]], [[1, 1], [1, 0], [0, 0]], [[1, 1], [0, 1], [0, 0]]]
    assert series.observed.int().tolist() == expected
    assert series.outcome.tolist() == [0, 1, 0]
    first = series.values[..., 0][series.observed[..., 0]]
    raw = torch.tensor([1.0, 2, 3, 7, 8, 1])
    torch.testing.assert_close(first, (raw - raw.mean()) / raw.std(correction=0))
    training, held_out = source.batches(2, 2, 1, 0, "cpu")
    assert (training.chosen, held_out.chosen) == ([0, 2], [1])
    with pytest.raises(DataError, match=r"must lie in \[0, 3\)"):
        source.batches(2, 2, 3, 0, "cpu")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["1,2:3,4:loud"], "line 9: 'loud' is none of the classes low, high"),
        (["1,2:3,4:low", "1,two:3,4:low"], "line 10: could not convert string to float: 'two'"),
        (["1,2:3,4:low", "1,2:low"], "line 10: 1 variables; expected 2"),
        (["1,2:3,inf:low"], "line 9: a value is infinite"),
        ([], "holds no series"),
    ],
)
def test_broken_ts_files_are_refused_with_the_line(tmp_path, lines, message):
    with pytest.raises(DataError, match=message):
        load_data("japanese_vowels", write(tmp_path, lines))


def test_other_files_are_refused(tmp_path):
    with pytest.raises(DataError, match="--data-dir"):
        load_data("japanese_vowels")
    with pytest.raises(DataError, match="cannot be read"):
        load_data("japanese_vowels", tmp_path)
    write(tmp_path, ["1:2:low"])
    path = tmp_path / "JapaneseVowels_TRAIN.ts"
    for wrong, message in (
        (TS.replace("@data", ""), "no line @data"),
        (TS.replace("@timeStamps false", "@timeStamps true"), "has time stamps"),
        (TS.replace("@classLabel true low high", "@classLabel false"), "with at least two classes"),
    ):
        path.write_text(wrong + "1:2:low")
        with pytest.raises(DataError, match=message):
            load_data("japanese_vowels", tmp_path)
    path.write_text(TS.replace("low high", "high low") + "1:2:low")
    with pytest.raises(DataError, match="differ in their classes"):
        load_data("japanese_vowels", tmp_path)


def test_a_value_of_minus_one_is_unknown(stays):
    folder, content = stays
    content = dict(content)
    content["value"] = content["value"].copy()
    content["value"][0] = -1
    np.savez(folder / "physionet2012.npz", **content)
    source = load_data("physionet2012", folder)
    assert len(source.series.value) == len(content["value"]) - 1
    assert int(source.series.ptr[1]) == content["ptr"][1] - 1
    assert load_data("physionet2012_hourly", folder).series.resolution == 60


class Constant(nn.Module):
    """Logits that do not look, and a bound that does."""

    def __init__(self, shape):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(shape))
        self.seen = []

    def forward(self, times, values, observed, static):
        self.seen.append(values)
        return self.logits

    def explain(self, *series, kl_weight):
        return self(*series), torch.full((2,), -kl_weight)


def test_classes_bounds_and_jitter_enter_the_loss():
    times, values, static = torch.zeros(2, 3), torch.zeros(2, 3, 1), torch.zeros(2, 0)
    observed = torch.tensor([[[True], [True], [False]]] * 2)
    batch = times, values, observed, static, torch.tensor([0, 2])
    model = Constant((2, 4))
    outcome = SeriesClassification().losses(model, batch, 0)
    assert float(outcome.loss.detach()) == pytest.approx(np.log(4))
    task = SeriesClassification(evidence=0.5, annealing=10, jitter=2.0)
    for step, weight in ((0, 0.1), (4, 0.5), (99, 1.0)):
        loss = task.losses(model, batch, step).loss.detach()
        assert float(loss) == pytest.approx(np.log(4) + 0.5 * weight, rel=1e-5)
    assert (model.seen[-1][observed] != 0).all()
    assert (model.seen[-1][~observed] == 0).all()
    measured = task.evaluate(model, [batch])
    assert list(measured) == ["accuracy", "cross_entropy"]
    assert (model.seen[-1] == 0).all(), "no jitter when it is measured"
    assert measured["accuracy"] == 0.5
    with pytest.raises(TypeError, match="gives no bound"):
        SeriesClassification(evidence=1.0).losses(Mean(), batch, 0)
