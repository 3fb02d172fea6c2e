"""A parser whose likelihoods are those of all trees, and whose padding changes nothing."""

import itertools
import math

import pytest
import torch

from restpoint.models.parsing import BiaffineParser
from restpoint.models.tagging import encode_words
from restpoint.zoo import create_model, list_models

SENTENCES = [["Dogs", "bark", "."], ["The", "dog", "of", "Anne", "barked"], ["Run"]]
TREES = torch.tensor(
    [
        [[2, 0], [0, 1], [2, 2], [-1, -1], [-1, -1]],
        [[2, 3], [5, 0], [4, 3], [2, 0], [0, 1]],
        [[0, 1], [-1, -1], [-1, -1], [-1, -1], [-1, -1]],
    ]
)
SMALL = {
    "num_relations": 4, "arc_dim": 8, "relation_dim": 4, "vocabulary": 8, "word_dim": 8, "byte_dim": 8, "filters": 8,
    "hidden": 8, "layers": 1, "dropout": 0.1, "word_dropout": 0.0,
}  # fmt: skip


def random_parser():
    torch.manual_seed(0)
    model = BiaffineParser(**SMALL).double().eval()
    for parameter in (model.arcs, model.relations):
        torch.nn.init.normal_(parameter)
    return model


def test_likelihoods_add_up_over_all_trees_and_relations():
    model = random_parser()
    words = encode_words([["Dogs", "bark", "."]])
    found = []
    for heads in itertools.product(range(4), repeat=3):
        if heads.count(0) != 1 or any(h == m for m, h in enumerate(heads, 1)):
            continue
        for relations in itertools.product(range(4), repeat=3):
            tree = torch.tensor([list(zip(heads, relations, strict=True))])
            try:
                found.append((float(model.log_likelihood(words, tree).detach().exp()), tree))
            except ValueError as error:
                assert "is not a structure" in str(error)  # noqa: PT017
                break
    assert len(found) == 9 * 4**3
    assert math.isclose(sum(p for p, _ in found), 1, abs_tol=1e-12)
    # The best tree first, and of its relations the best.
    totals = {}
    for p, tree in found:
        heads = tuple(tree[0, :, 0].tolist())
        totals[heads] = totals.get(heads, 0.0) + p
    best = max(totals, key=totals.__getitem__)
    decoded = model.decode(words)
    assert tuple(decoded[0, :, 0].tolist()) == best
    among = max((p, tree) for p, tree in found if tuple(tree[0, :, 0].tolist()) == best)[1]
    assert decoded.equal(among)


def test_padding_and_neighbours_change_nothing():
    model = random_parser()
    words = encode_words(SENTENCES)
    model.fit(words[1].repeat(2, 1))
    likelihood, decoded = model.log_likelihood(words, TREES), model.decode(words)
    for b, sentence in enumerate(SENTENCES):
        alone = encode_words([sentence])
        n = len(sentence)
        own = model.log_likelihood(alone, TREES[b : b + 1, :n])
        torch.testing.assert_close(likelihood[b : b + 1], own, rtol=0, atol=1e-12)
        assert decoded[b, :n].equal(model.decode(alone)[0])
        assert (decoded[b, n:] == -1).all()


def test_it_learns_and_parses():
    torch.manual_seed(0)
    model = BiaffineParser(**SMALL)
    words = encode_words(SENTENCES)
    model.fit(words.flatten(0, 1).repeat(2, 1))
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(120):
        loss = -model.log_likelihood(words, TREES).mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
    model.eval()
    assert model.decode(words).equal(TREES)
    first, second = model.parse(["Dogs bark.", SENTENCES[1]])
    assert first.words == ["Dogs", "bark", "."]
    assert (first.heads, first.relations) == ([2, 0, 2], [0, 1, 2])
    assert second.heads == TREES[1, :, 0].tolist()
    assert all(0.5 < p <= 1 for p in first.probabilities)
    # Of each word the marginals of its arcs are shares.
    shares = model.distribution(words).marginals[1, :, 1:].sum(0)
    torch.testing.assert_close(shares, torch.ones(5))


def test_bad_input():
    model = BiaffineParser(**SMALL)
    words = encode_words(SENTENCES)
    with pytest.raises(ValueError, match=r"bytes of shape \(batch, length, width\)"):
        model(words[0])
    with pytest.raises(ValueError, match="sentence 3 has no words"):
        model(torch.cat([words, torch.zeros_like(words[:1])]))
    wrong = TREES.clone()
    wrong[1, 0, 1] = 4
    with pytest.raises(ValueError, match=r"relation at \(1, 0\) is 4; expected 0 to 3"):
        model.log_likelihood(words, wrong)
    wrong = TREES.clone()
    wrong[0, 1, 0] = 1
    with pytest.raises(ValueError, match="sample 0 is not a structure"):
        model.log_likelihood(words, wrong)
    with pytest.raises(TypeError, match="'hiden'"):
        create_model("biaffine_small", hiden=3)


def test_the_zoo_knows_it():
    assert list_models(task="parsing", pretrained=False) == ["biaffine_small"]
    model = create_model("biaffine_small")
    assert 4 * sum(p.numel() for p in model.parameters()) + 8 * 8192 < 10e6
