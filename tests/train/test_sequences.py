"""Texts that are continued, and series with missing values that foretell an event."""

import gzip
import math

import numpy as np
import pytest
import torch
from torch import nn

from restpoint.models.deq import DEQ
from restpoint.train import Config, DataConfig, evaluate_model
from restpoint.train.data import DataError, Series, TextBatches, load_data
from restpoint.train.split import split_batches
from restpoint.train.tasks import LanguageModelling, SeriesClassification

TEXT = "the cat sat on the mat. " * 100


@pytest.fixture
def folder(tmp_path):
    with gzip.open(tmp_path / "story.txt.gz", "wt", encoding="utf-8") as file:
        file.write(TEXT)
    return tmp_path


def test_texts_are_split_encoded_and_cut(folder):
    source = load_data("text_file", folder)
    assert source.decode(torch.cat([source.train, source.test])) == TEXT
    assert len(source.test) == len(TEXT) // 10
    assert source.encode("mat.").tolist() == [source.characters.index(c) for c in "mat."]
    with pytest.raises(DataError, match="the character 'q'"):
        source.encode("quite")
    config = Config(data=DataConfig(name="text_file", batch_size=4, length=16, eval_batch_size=3))
    training, held_out = split_batches(config, source)
    assert (len(training), training.rows(0)) == (2159 // 16 // 4, 4)
    tokens, following = next(iter(training))
    assert tokens.shape == following.shape == (4, 16)
    assert tokens[:, 1:].equal(following[:, :-1])
    pieces = torch.cat([tokens.flatten() for tokens, _ in held_out])
    assert pieces.equal(source.test[: len(pieces)].long())
    config.data.validation = 100
    validation = next(iter(split_batches(config, source)[1]))[0]
    assert validation[0].equal(source.train[-100:-84].long())


def test_pieces_are_functions_of_seed_epoch_and_place(folder):
    batches = TextBatches(load_data("text_file", folder).train, 8, 6, shuffle=True, seed=4)
    whole, later = list(batches.epoch(2)), list(batches.epoch(2, start=3))
    assert whole[3][0].equal(later[0][0])
    assert not whole[0][0].equal(next(batches.epoch(3))[0])
    parts = torch.cat([next(batches.epoch(2, rank=rank, world=3))[0] for rank in range(3)])
    assert parts.equal(whole[0][0])
    with pytest.raises(DataError, match="do not fill one batch"):
        TextBatches(torch.zeros(20, dtype=torch.int64), 8, 6, shuffle=True)


def test_texts_that_are_missing_or_no_text_are_refused(tmp_path):
    with pytest.raises(DataError, match="--data-dir"):
        load_data("tinyshakespeare")
    with pytest.raises(DataError, match="holds none"):
        load_data("tinyshakespeare", tmp_path)
    with pytest.raises(DataError, match="is missing"):
        load_data("text_file", tmp_path / "nowhere")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(DataError, match="cannot be read"):
        load_data("text_file", tmp_path)
    (tmp_path / "b.txt").write_text("b")
    with pytest.raises(DataError, match="holds 2 of them"):
        load_data("text_file", tmp_path)


class Bigram(nn.Module):
    """An equilibrium model of sorts: the rest point of a contraction around what the last character says."""

    def __init__(self, characters):
        super().__init__()
        self.table = nn.Embedding(characters, characters)
        self.deq = DEQ(lambda z, x: 0.1 * torch.tanh(z) + x)

    def problem(self, tokens):
        return self.deq.problem(self.table(tokens))

    def solve_problem(self, problem):
        return self.deq.solve_problem(problem)

    def forward_head(self, state):
        return state


def test_a_language_model_learns_a_text_and_is_measured(folder):
    source = load_data("text_file", folder)
    model, task = Bigram(len(source.characters)), LanguageModelling()
    optimizer = torch.optim.Adam(model.parameters(), 0.3)
    before = evaluate_model(model, folder, data="text_file", task=task.kind)
    for step, batch in enumerate(source.batches(8, 8, 0, 0, "cpu")[0].epoch(0)):
        batch = batch[0][:, :32], batch[1][:, :32]
        for _ in range(40):
            outcome = task.losses(model, batch, step)
            optimizer.zero_grad()
            outcome.loss.backward()
            optimizer.step()
        break
    measured = evaluate_model(model, folder, data="text_file", task=task.kind)
    assert len(outcome.solutions) == 1
    # In this text the next character follows from the last one but after a space, an "a", a "t" and a few more.
    assert measured["bits"] < 1.5 < before["bits"]
    assert measured["bits"] == pytest.approx(-measured["log_likelihood"] / math.log(2))
    assert measured["perplexity"] == pytest.approx(2 ** measured["bits"])
    assert measured["converged"] == 1


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
    assert source.model_arguments == {"variables": 3, "statics": 2}
    rows = [4, 5, 41]
    series = source.stays.take(rows, resolution=1)
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
        source.stays.value[
            (source.stays.variable == v) & (torch.arange(len(source.stays.value)) < source.stays.ptr[40])
        ]
        for v in range(3)
    ]
    for part in known:
        assert float(part.mean()) == pytest.approx(0, abs=1e-5)
        assert float(part.std(correction=0)) == pytest.approx(1, abs=1e-5)
    assert source.stays.static[0, 1] == 0, "unknown"


def test_observations_of_the_same_time_are_one_point_and_the_last_counts(stays):
    folder, content = stays
    content = dict(content)
    content["minute"][:3], content["variable"][:3] = [0, 4, 5], [1, 2, 1]
    np.savez(folder / "physionet2012.npz", **content)
    source = load_data("physionet2012", folder)
    series = source.stays.take([0], resolution=6)
    assert series.times[0, 0] == 0
    assert series.observed[0, 0].tolist() == [False, True, True]
    assert series.values[0, 0, 1] == source.stays.value[2]
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
