"""Texts that are continued."""

import gzip
import math

import pytest
import torch
from torch import nn

from restpoint.models.deq import DEQ
from restpoint.train import Config, DataConfig, evaluate_model
from restpoint.train.data import DataError, TextBatches, load_data
from restpoint.train.split import split_batches
from restpoint.train.tasks import LanguageModelling

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
