"""Brackets that have partners, and a reader that is asked for their colours."""

import pytest
import torch

from restpoint.models.attention.bracket_reader import BracketReader
from restpoint.train.data import BracketBatches, load_data
from restpoint.train.data.brackets import draw_brackets
from restpoint.train.tasks import SequenceLabelling
from restpoint.zoo import list_models


def test_strings_are_balanced_and_partners_match():
    strings, partners = draw_brackets(50, 6, torch.Generator().manual_seed(0))
    assert (strings > 0).sum(1).tolist() == [6] * 50
    for string, partner in zip(strings.tolist(), partners.tolist(), strict=True):
        stack = []
        for place, bracket in enumerate(string):
            if bracket:
                assert partner[place] == -1
                stack.append(place)
            else:
                assert partner[place] == stack.pop()
    assert len(strings.unique(dim=0)) == 50


def test_batches_are_functions_of_seed_and_epoch():
    batches = BracketBatches((2, 3), 5, 2, seed=1)
    epoch = list(batches.epoch(3))
    assert [s.shape for s, _ in epoch] == [(2, 4), (2, 4), (1, 4), (2, 6), (2, 6), (1, 6)]
    assert [batches.rows(place) for place in range(len(batches))] == [len(s) for s, _ in epoch]
    again = list(batches.epoch(3, start=4))
    assert all(a[0].equal(b[0]) and a[1].equal(b[1]) for a, b in zip(epoch[4:], again, strict=True))
    parts = [next(iter(batches.epoch(3, rank=r, world=2)))[0] for r in range(2)]
    assert torch.cat(parts).equal(epoch[0][0])
    assert not next(iter(batches.epoch(4)))[0].equal(epoch[0][0])
    for strings, wanted in epoch:
        assert ((strings == 0) == (wanted >= 0)).all()
    with pytest.raises(ValueError, match="at least one string"):
        BracketBatches((2,), 0, 2)
    # What is measured on does not depend on the batch size, and less of it is the first part of it.
    source = load_data("brackets")
    found = [[s for s, _ in source.test_batches(size, limit)] for size, limit in ((3, 10), (10, 10), (4, 4))]
    assert torch.cat(found[0][:4]).equal(found[1][0])
    assert found[2][0].equal(found[1][0][:4])
    assert {s.shape[1] for s, _ in source.test_batches(10, 10)} == {10, 20}
    assert {s.shape[1] for s, _ in source.batches(10, 10, 0, 0, "cpu")[0].epoch(0)} == {10}


def test_scores_count_labels_by_length():
    class Fixed(torch.nn.Module):
        def forward(self, sequences):
            return torch.nn.functional.one_hot(torch.ones_like(sequences), 3).float()

    batches = [
        (torch.zeros(1, 2).long(), torch.tensor([[1, -1]])),
        (torch.zeros(1, 3).long(), torch.tensor([[1, 2, 0]])),
    ]
    found = SequenceLabelling().evaluate(Fixed(), batches)
    assert (found["accuracy"], found["accuracy_2"], found["accuracy_3"]) == (0.5, 1, pytest.approx(1 / 3))


@pytest.mark.parametrize("attention", ["softmax", "sparsemax", "tree", "projective-tree"])
def test_a_reader_of_brackets_learns(attention):
    torch.manual_seed(0)
    model = BracketReader(num_colours=8, dim=8, attention=attention)
    task = SequenceLabelling()
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    losses = []
    for step, batch in enumerate(BracketBatches((2,), 640, 16).epoch(0)):
        loss = task.losses(model, batch, step).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    strings = next(iter(BracketBatches((3,), 2, 2)))[0]
    logits, weights = model.attend(strings)
    assert (logits.shape, weights.shape) == ((2, 6, 8), (2, 6, 6))
    assert model(strings).equal(logits)


def test_bad_input():
    with pytest.raises(ValueError, match="Did you mean 'softmax'"):
        BracketReader(attention="softmx")
    assert "bracket_reader" in list_models(task="sequence-labelling", pretrained=False)
