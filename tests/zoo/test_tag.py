"""Raw sentences through a tagger."""

import json

import pytest
import torch

from restpoint.zoo import ZooError, create_model, save_pretrained
from restpoint.zoo.cli import main
from restpoint.zoo.tag import predict_sentences

TAGS = ("A", "B", "C")


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    model = create_model("bilstm_crf_small", num_tags=3, vocabulary=4, hidden=4, filters=4)
    save_pretrained(model, tmp_path / "tagger", labels=TAGS)
    return f"local-dir:{tmp_path / 'tagger'}"


def test_words_with_tags(folder, capsys):
    assert main(["predict", folder, "Dogs don't bark.", "Go!", "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert first["words"] == ["Dogs", "do", "n't", "bark", "."]
    assert len(first["tags"]) == len(first["probabilities"]) == 5
    assert set(first["tags"] + second["tags"]) <= set(TAGS)
    assert second["sentence"] == "Go!"
    assert main(["predict", folder, "Go!"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["word", "tag", "probability"]
    assert lines[1].split()[:2] == ["Go", second["tags"][0]]


def test_bad_input(folder, capsys):
    assert main(["predict", folder, "Go!", " "]) != 0
    assert "sentence 1 has no words" in capsys.readouterr().err
    model = create_model(folder, pretrained=True)
    other = create_model("conv_deq_tiny")
    with pytest.raises(ZooError, match="no words"):
        predict_sentences(model, model.blueprint.card, [""])
    card = save_pretrained(other, folder.removeprefix("local-dir:") + "-other")
    with pytest.raises(ZooError, match="does not tag sentences"):
        predict_sentences(other, card, ["Go!"])


def test_the_shipped_tagger_reads():
    model = create_model("bilstm_crf_small.ewt", pretrained=True).eval()
    (found,) = predict_sentences(model, model.blueprint.card, ["Time flies like an arrow."])
    assert found.words == ("Time", "flies", "like", "an", "arrow", ".")
    assert found.tags == ("NOUN", "VERB", "ADP", "DET", "NOUN", "PUNCT")
    assert all(0 < p <= 1 + 1e-6 for p in found.probabilities)
