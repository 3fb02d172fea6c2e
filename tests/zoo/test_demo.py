"""The demonstration, as a new user runs it."""

import json
import re

import pytest
from PIL import Image

from restpoint.zoo import load_card
from restpoint.zoo.cli import main
from restpoint.zoo.demo import destination


def test_the_demo_prints_and_draws_what_it_promises(tmp_path, capsys):
    picture = tmp_path / "made" / "digits.png"
    assert main(["demo", "--output", str(picture)]) == 0
    printed = capsys.readouterr().out
    accuracy = float(re.search(r"accuracy +([\d.]+) %", printed).group(1))
    assert accuracy == pytest.approx(100 * load_card("conv_deq_tiny.digits").metrics["accuracy"], abs=0.01)
    assert "converged    599 of 599" in printed
    assert re.search(r"time +[\d.]+ ms a digit", printed)
    counts = re.findall(r"^ +\d+  █* ?(\d+)", printed, flags=re.M)
    assert sum(map(int, counts)) == 599
    assert "4 of 4 trusted" in printed
    assert str(picture) in printed
    with Image.open(picture) as image:
        assert min(image.size) > 600
        assert len(image.convert("RGB").getcolors(maxcolors=1 << 20)) > 200


def test_the_demo_as_json(tmp_path, capsys):
    assert main(["demo", "--json", "--output", str(tmp_path / "digits.png")]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["accuracy"] == pytest.approx(load_card("conv_deq_tiny.digits").metrics["accuracy"], abs=1e-4)
    assert facts["digits"] == facts["converged"] == 599
    assert facts["pictures"] == [str(tmp_path / name) for name in ("digits.png", "digits-flows.png")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["digits-flows.png", "digits.png"]


def test_the_demo_has_help_with_an_example(capsys):
    with pytest.raises(SystemExit):
        main(["demo", "--help"])
    assert "restpoint demo --output" in capsys.readouterr().out


def test_the_picture_lies_where_its_path_says(tmp_path):
    assert destination(tmp_path) == tmp_path / "demo.png"
    assert destination(tmp_path / "digits") == tmp_path / "digits.png"
    assert destination(tmp_path / "digits.pdf") == tmp_path / "digits.pdf"
