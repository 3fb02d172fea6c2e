"""Words as bytes, vocabularies without words, and a tagger whose padding changes nothing."""

import pytest
import torch

from restpoint.models.tagging import BiLSTMCRF, Vocabulary, encode_words, tokenize
from restpoint.models.tagging.words import WIDTH, fingerprints
from restpoint.zoo import create_model, list_models

SENTENCES = [["Dogs", "bark", "."], ["The", "dog", "of", "Anne", "barked"], ["Run"]]
SMALL = {
    "num_tags": 4, "vocabulary": 8, "word_dim": 8, "byte_dim": 8, "filters": 8, "hidden": 8, "dropout": 0.2,
}  # fmt: skip


@pytest.mark.parametrize(
    "text, words",
    [
        ("Dogs don't bark, I'm told.", ["Dogs", "do", "n't", "bark", ",", "I", "'m", "told", "."]),
        ("It's a well-known U.S. site: www.a.org/b!!", ["It", "'s", "a", "well", "-", "known", "U.S.", "site", ":"]),
        ("$3,000.50 at 12:30 (5%)...", ["$", "3,000.50", "at", "12:30", "(", "5", "%", ")", "..."]),
        ("Mr. Smith\u2019s caf\u00e9", ["Mr.", "Smith", "\u2019s", "caf\u00e9"]),
    ],
)
def test_tokenize(text, words):
    assert tokenize(text)[: len(words)] == words


def test_words_as_bytes():
    encoded = encode_words([["caf\u00e9", "a"], ["x" * 20 + "y" * 20]])
    assert encoded.shape == (2, 2, WIDTH)
    assert bytes(encoded[0, 0, :5].tolist()).decode() == "caf\u00e9"
    assert not encoded[0, 0, 5:].any()
    assert not encoded[1, 1].any()
    assert bytes(encoded[1, 0].tolist()) == b"x" * (WIDTH // 2) + b"y" * (WIDTH // 2)
    for bad, message in [([], "got none"), ([["a"], []], "sentence 1 has no words"), ([["a", ""]], "word 1 of")]:
        with pytest.raises(ValueError, match=message):
            encode_words(bad)


def test_fingerprints_tell_words_apart_but_not_case_and_digits():
    alphabet = "abcdefghijklmnopqrstuvwxyz"
    words = [a + b + c for a in alphabet for b in alphabet for c in alphabet] + [a * 9 + b for a, b in ("ab", "ba")]
    assert len(fingerprints(encode_words([words])[0]).unique()) == len(words)
    one, two, other = fingerprints(encode_words([["Route66", "ROUTE12", "Route6"]])[0])
    assert one == two != other


def test_a_vocabulary_knows_frequent_words():
    vocabulary = Vocabulary(3, 5)
    assert not vocabulary.fitted
    words = encode_words([["a"] * 4 + ["B", "b", "b"] + ["c"] * 2 + ["d"] * 2 + ["e"] * 5 + ["once"]])[0]
    vocabulary.fit(words)
    indices = vocabulary.indices(encode_words([["A", "b", "e", "c", "once", "never"]])[0])
    assert sorted(indices[:3].tolist()) == [1, 2, 3]
    assert (indices[3:] == 0).all()
    few = Vocabulary(100, 5)
    few.fit(words)
    assert (few.indices(words) > 0).sum() == len(words) - 1
    few.train().dropout = 1.0
    assert few(words).unique(dim=0).shape[0] == 1


def test_padding_and_neighbours_change_nothing():
    model = BiLSTMCRF(**SMALL).double().eval()
    words = encode_words(SENTENCES)
    model.fit(words[1].repeat(2, 1))
    scores = model(words)
    likelihood = model.log_likelihood(words, torch.ones(3, 5, dtype=torch.int64))
    for b, sentence in enumerate(SENTENCES):
        alone = encode_words([sentence])
        torch.testing.assert_close(scores[b : b + 1, : len(sentence)], model(alone), rtol=0, atol=1e-12)
        tags = torch.ones(1, len(sentence), dtype=torch.int64)
        torch.testing.assert_close(likelihood[b : b + 1], model.log_likelihood(alone, tags), rtol=0, atol=1e-12)


def test_it_learns_and_tags():
    model = BiLSTMCRF(**SMALL)
    words = encode_words(SENTENCES)
    tags = torch.tensor([[0, 1, 2, -1, -1], [3, 0, 3, 0, 1], [1, -1, -1, -1, -1]])
    model.fit(words.flatten(0, 1).repeat(2, 1))
    assert model.vocabulary.fitted
    fitted = model.vocabulary.known.clone()
    model.fit(words[0].repeat(5, 1))
    assert model.vocabulary.known.equal(fitted)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(60):
        loss = -model.log_likelihood(words, tags).mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
    model.eval()
    assert model.decode(words).equal(tags)
    (found, first, sure), (_, second, _) = model.tag(["Dogs bark.", SENTENCES[1]])
    assert found == ["Dogs", "bark", "."]
    assert (first, second) == ([0, 1, 2], tags[1].tolist())
    assert all(0.5 < p <= 1 for p in sure)
    again = BiLSTMCRF(**SMALL)
    again.load_state_dict(model.state_dict())
    assert again.eval().decode(words).equal(tags)


def test_names_that_a_little_less_certainty_finds():
    torch.manual_seed(0)
    options = {**SMALL, "num_tags": 5, "bio": True, "layers": 1}
    model, eager = BiLSTMCRF(**options).double().eval(), BiLSTMCRF(**options, outside_cost=30.0).double().eval()
    eager.load_state_dict(model.state_dict())
    words = encode_words(SENTENCES)
    tags = torch.tensor([[0, 1, 2, -1, -1], [3, 0, 3, 0, 1], [1, -1, -1, -1, -1]])
    torch.testing.assert_close(model.log_likelihood(words, tags), eager.log_likelihood(words, tags), rtol=0, atol=0)
    inside = words[..., 0] != 0
    assert (eager.decode(words)[inside] != 0).all()
    assert (eager.decode(words)[~inside] == -1).all()
    # What a small cost changes are the sequences that it makes best: of all there are, by brute force.
    eager.outside_cost = 0.4
    scores = model(words[2:, :1])[0, 0] + model.crf.start + model.crf.end
    scores = scores.masked_fill(model.crf.forbidden_start, -torch.inf) - torch.tensor([0.4, 0, 0, 0, 0])
    assert eager.decode(words[2:, :1]).tolist() == [[int(scores.argmax())]]
    (_, found, sure), *_ = eager.tag([SENTENCES[0]])
    assert found == eager.decode(words[:1, :3])[0].tolist()
    shares = model.distribution(words[:1, :3]).marginals.states[0].detach()
    assert sure == pytest.approx([float(shares[i, t]) for i, t in enumerate(found)])
    with pytest.raises(ValueError, match="outside_cost 0.5 needs bio=True"):
        BiLSTMCRF(**SMALL, outside_cost=0.5)


def test_an_encoder_to_start_from():
    torch.manual_seed(0)
    words = encode_words(SENTENCES)
    teacher, pupil = BiLSTMCRF(**SMALL).eval(), BiLSTMCRF(**{**SMALL, "num_tags": 7}).eval()
    teacher.fit(words[1].repeat(2, 1))
    head = pupil.emissions.weight.detach().clone()
    pupil.start_from(teacher)
    assert torch.equal(pupil.encode(words), teacher.encode(words))
    assert pupil.vocabulary.fitted
    assert torch.equal(pupil.emissions.weight, head)
    wider = BiLSTMCRF(**{**SMALL, "hidden": 9})
    with pytest.raises(ValueError, match=r"lstms.0.bias_hh_l0 is \(32,\) in the other encoder, and \(36,\) in this"):
        wider.start_from(teacher)
    with pytest.raises(ValueError, match="lstms.1.bias_hh_l0 is None in the other encoder"):
        BiLSTMCRF(**SMALL).start_from(BiLSTMCRF(**SMALL, layers=1))


def test_bad_input():
    model = BiLSTMCRF(**SMALL)
    words = encode_words(SENTENCES)
    with pytest.raises(ValueError, match=r"bytes of shape \(batch, length, width\)"):
        model(words[0])
    with pytest.raises(ValueError, match="sentence 3 has no words"):
        model(torch.cat([words, torch.zeros_like(words[:1])]))
    with pytest.raises(TypeError, match="'hiden'"):
        create_model("bilstm_crf_small", hiden=3)


def test_the_zoo_knows_it():
    assert "bilstm_crf_small" in list_models(task="tagging", pretrained=False)
    model = create_model("bilstm_crf_small")
    assert 4 * sum(p.numel() for p in model.parameters()) + 8 * 8192 < 10e6
