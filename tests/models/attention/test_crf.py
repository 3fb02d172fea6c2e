"""The CRF head against enumeration, and in training."""

import itertools

import pytest
import torch
from torch import nn

from restpoint.models.attention import CRF

LENGTHS = torch.tensor([4, 1, 3])


@pytest.fixture
def crf():
    crf = CRF(3, dtype=torch.float64)
    for parameter in crf.parameters():
        nn.init.normal_(parameter)
    return crf


def score(crf, emissions, tags):
    moves = sum(crf.transitions[a, b] for a, b in itertools.pairwise(tags))
    return crf.start[tags[0]] + crf.end[tags[-1]] + sum(e[t] for e, t in zip(emissions, tags, strict=True)) + moves


def test_against_enumeration(crf):
    emissions = torch.randn(3, 4, 3, dtype=torch.float64)
    tags = torch.randint(3, (3, 4))
    log_likelihood = crf(emissions, tags, LENGTHS)
    decoded, marginals = crf.decode(emissions, LENGTHS), crf.marginals(emissions, LENGTHS)
    for b, n in enumerate(LENGTHS.tolist()):
        paths = list(itertools.product(range(3), repeat=n))
        scores = torch.stack([score(crf, emissions[b, :n], path) for path in paths])
        right = score(crf, emissions[b, :n], tuple(tags[b, :n].tolist()))
        torch.testing.assert_close(log_likelihood[b], right - scores.logsumexp(0), rtol=0, atol=1e-12)
        assert decoded[b].tolist() == list(paths[int(scores.argmax())]) + [-1] * (4 - n)
        one_hot = nn.functional.one_hot(torch.tensor(paths), 3).double()
        expected = (scores.softmax(0)[:, None, None] * one_hot).sum(0)
        torch.testing.assert_close(marginals[b, :n], expected, rtol=0, atol=1e-12)
        assert (marginals[b, n:] == 0).all()


def test_padding_is_never_looked_at(crf):
    emissions = torch.randn(3, 4, 3, dtype=torch.float64, requires_grad=True)
    tags = torch.randint(3, (3, 4))
    inside = torch.arange(4) < LENGTHS.unsqueeze(1)
    value = crf(emissions, tags, LENGTHS)
    (slope,) = torch.autograd.grad(value.sum(), emissions)
    assert (slope[~inside] == 0).all()
    changed = emissions.detach().masked_fill(~inside.unsqueeze(2), 1e9)
    torch.testing.assert_close(crf(changed, tags.masked_fill(~inside, -1), LENGTHS), value, rtol=0, atol=1e-12)


def test_derivatives(crf):
    emissions = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    tags = torch.tensor([[0, 2, 1], [1, 1, 0]])
    parameters = dict(crf.named_parameters())

    def value(emissions, *values):
        arguments = (emissions, tags, torch.tensor([3, 2]))
        return torch.func.functional_call(crf, dict(zip(parameters, values, strict=True)), arguments)

    points = (emissions, *(p.detach().requires_grad_() for p in parameters.values()))
    assert torch.autograd.gradcheck(value, points)
    assert torch.autograd.gradgradcheck(value, points)
    expected = torch.autograd.grad(value(*points).sum(), points)
    found = torch.func.grad(lambda *p: value(*p).sum(), argnums=tuple(range(4)))(*points)
    torch.testing.assert_close(found, expected)


def test_it_learns_what_follows_what():
    # The emissions say nothing: only transitions can know that tags alternate.
    crf, tags = CRF(2), torch.tensor([[0, 1, 0, 1, 0, 1], [1, 0, 1, 0, 0, 0]])
    lengths, emissions = torch.tensor([6, 4]), torch.zeros(2, 6, 2)
    optimizer = torch.optim.Adam(crf.parameters(), 0.2)
    losses = []
    for _ in range(40):
        loss = -crf(emissions, tags, lengths).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 < losses[0]
    emissions[0, 0, 0] = emissions[1, 0, 1] = 5.0
    assert crf.decode(emissions, lengths).tolist() == [[0, 1, 0, 1, 0, 1], [1, 0, 1, 0, -1, -1]]


def test_bad_input(crf):
    emissions, tags = torch.randn(2, 4, 3, dtype=torch.float64), torch.zeros(2, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="at least 1; got 0"):
        CRF(0)
    with pytest.raises(ValueError, match=r"\(batch, length, 3\), got \(2, 4, 5\)"):
        crf.decode(torch.randn(2, 4, 5, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"tags of shape \(2, 4\), integers; got \(2, 3\)"):
        crf(emissions, tags[:, :3])
    with pytest.raises(ValueError, match=r"tag at \(1, 2\) is 3; expected 0 to 2"):
        crf(emissions, tags.index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(3)))
    with pytest.raises(ValueError, match="sample 1 has length 0"):
        crf(emissions, tags, torch.tensor([4, 0]))
    with pytest.raises(ValueError, match="NaN|nan"):
        crf.decode(emissions * torch.nan)


def test_only_allowed_tags_have_a_probability():
    """Every sequence that breaks a rule has none, and the others share all of it."""
    torch.manual_seed(0)
    allowed = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 1, 1], [1, 0, 1]], dtype=torch.bool)
    crf = CRF(3, dtype=torch.float64, allowed=allowed)
    emissions = torch.randn(1, 3, 3, dtype=torch.float64)
    total = torch.zeros((), dtype=torch.float64)
    for path in itertools.product(range(3), repeat=3):
        likelihood = crf(emissions, torch.tensor([path])).detach()[0]
        legal = allowed[3, path[0]] and all(allowed[a, b] for a, b in itertools.pairwise(path))
        assert bool(likelihood.isfinite()) == bool(legal)
        total = total + likelihood.exp()
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-14)
    crf.distribution(emissions).log_partition.sum().backward()
    assert all(p.grad.isfinite().all() for p in crf.parameters())
    # Rules are what a model is built with: no weights of a checkpoint.
    assert crf.state_dict().keys() == CRF(3).state_dict().keys()
    with pytest.raises(ValueError, match=r"expected allowed of shape \(3, 3\) or \(4, 3\), boolean; got \(2, 3\)"):
        CRF(3, allowed=allowed[:2])


def test_rules_that_leave_no_sequence():
    """A likelihood of what cannot be would be minus infinity less itself."""
    crf = CRF(3, allowed=torch.zeros(3, 3, dtype=torch.bool))
    emissions, tags = torch.randn(2, 4, 3), torch.zeros(2, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="leave no sequence to sample 1"):
        crf(emissions, tags, torch.tensor([1, 4]))
    assert crf(emissions, tags, torch.tensor([1, 1])).isfinite().all()
