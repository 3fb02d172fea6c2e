"""Texts through a language model."""

import json

import pytest
import torch

from restpoint.train.tasks import LanguageModelling
from restpoint.train.tasks.language import draw_texts, wrapped
from restpoint.zoo import ZooError, create_model, save_pretrained
from restpoint.zoo.cli import main
from restpoint.zoo.write import continue_texts

CHARACTERS = ("\n", " ", "a", "b", "c")


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    model = create_model("test_deq_lm", num_tokens=len(CHARACTERS))
    save_pretrained(model, tmp_path / "writer", labels=CHARACTERS)
    return f"local-dir:{tmp_path / 'writer'}"


def test_texts_are_continued(folder, capsys):
    assert main(["predict", folder, "ab c", "b", "--length", "7", "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert (first["text"], second["text"]) == ("ab c", "b")
    assert len(first["continuation"]) == len(second["continuation"]) == 7
    assert set(first["continuation"]) <= set(CHARACTERS)
    assert main(["predict", folder, "ab c", "--length", "7"]) == 0
    assert capsys.readouterr().out == f"ab c{first['continuation']}\n"
    assert main(["predict", folder, "ab c", "--length", "20", "--seed", "1", "--json"]) == 0
    (other,) = json.loads(capsys.readouterr().out)
    assert not other["continuation"].startswith(first["continuation"])


def test_bad_texts(folder, tmp_path, capsys):
    assert main(["predict", folder, "xyz"]) != 0
    assert "the character 'x'" in capsys.readouterr().err
    assert main(["predict", folder, ""]) != 0
    assert "without characters" in capsys.readouterr().err
    model = create_model(folder, pretrained=True)
    other = create_model("conv_deq_tiny")
    with pytest.raises(ZooError, match="does not continue texts"):
        continue_texts(model, save_pretrained(other, tmp_path / "other"), ["a"])


def test_the_picture_holds_what_is_given_and_what_is_written():
    figure = draw_texts([("abc\nde", "f g"), ("x", "yz\n")], "two texts")
    drawn = [(t.get_text(), t.get_color()) for t in figure.texts]
    assert [part for part in drawn[1:] if part[0].strip()] == [
        ("abc", "0.6"), ("de", "0.6"), ("  f g", "k"), ("x", "0.6"), (" yz", "k"),
    ]  # fmt: skip
    assert LanguageModelling().draw(torch.nn.Linear(1, 1), None) is None


def test_lines_are_broken_behind_spaces_and_lose_nothing():
    text = "a short one\n\n" + "many words " * 20 + "\n" + "x" * 130 + " end"
    lines = wrapped(text)
    assert "".join(lines) == text
    assert max(len(line.rstrip("\n")) for line in lines) <= 58
    assert lines[:2] == ["a short one\n", "\n"]
    assert all(line.endswith((" ", "\n")) for line in lines[:5])
