"""Every shipped checkpoint: whole, documented, and as good as its card says."""

import csv
import dataclasses
import shlex

import pytest
import torch
import yaml
from PIL import Image

from restpoint.train.cli import RECIPES
from restpoint.train.evaluate import evaluate_model
from restpoint.zoo import Published, create_model, list_models, load_card
from restpoint.zoo.files import PACKAGE_CHECKPOINTS

NAMES = sorted(path.stem for path in PACKAGE_CHECKPOINTS.glob("*.json"))


def test_cards_and_weights_come_in_pairs(home):
    assert sorted(path.stem for path in PACKAGE_CHECKPOINTS.glob("*.safetensors")) == NAMES
    assert set(list_models(pretrained=True)) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_nobody_has_to_guess_where_a_checkpoint_came_from(name, home):
    card = load_card(name)
    unknown = [f.name for f in dataclasses.fields(card) if getattr(card, f.name) in (None, "", {})]
    may_lack = {"arguments", "note"} | ({"input", "labels"} if card.task != "image-classification" else set())
    assert set(unknown) <= may_lack
    assert all((card.data.name, card.data.split, card.data.licence, card.data.source))
    assert card.command.startswith("restpoint-train ")


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_can_be_looked_at(name):
    path = PACKAGE_CHECKPOINTS / load_card(name).picture
    assert path.stat().st_size <= 120_000
    with Image.open(path) as picture:
        picture.load()
        assert (picture.format, min(picture.size) > 150) == ("PNG", True)


@pytest.mark.parametrize("name", NAMES)
def test_the_recipe_that_a_card_names_says_the_same(name):
    card = load_card(name)
    words = shlex.split(card.command)
    recipe = yaml.safe_load((RECIPES / words[words.index("--config") + 1]).read_text())
    assert recipe["name"] == name
    assert recipe["model"]["name"] == card.architecture
    assert recipe["data"]["name"] == card.data.name
    assert (recipe["epochs"], recipe.get("note", ""), recipe.get("seed", 0)) == (card.epochs, card.note, card.seed)
    assert tuple(Published(**figure) for figure in recipe.get("published", [])) == card.published


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_loads_into_what_its_card_describes(name, home):
    card = load_card(name)
    model = create_model(name, pretrained=True).eval()
    assert sum(p.numel() for p in model.parameters()) == card.parameters
    assert all(value.isfinite().all() for value in model.state_dict().values())
    if card.task == "image-classification":
        assert len(card.labels) == model.num_classes
        images = torch.randn(2, *card.input.shape)
        with torch.no_grad():
            assert model(images).shape == (2, len(card.labels))
        adapted = create_model(name, pretrained=True, num_classes=5, in_chans=2 * card.input.shape[0]).eval()
        with torch.no_grad():
            features = adapted.forward_features(torch.cat([images, images], dim=1))
            torch.testing.assert_close(features, model.forward_features(images), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith(".digits")])
def test_a_metric_of_the_card_is_that_of_the_weights(name, home):
    measured = evaluate_model(name)
    assert measured["accuracy"] == pytest.approx(load_card(name).metrics["accuracy"], abs=2e-3)


def test_the_page_of_results_is_that_of_the_cards(home):
    docs = PACKAGE_CHECKPOINTS.parent / "docs"
    remedy = "make docs/results.md and results.csv anew: restpoint results --data-dir DATA_DIR --batch 16 --write docs"
    rows = {row["model"]: row for row in csv.DictReader((docs / "results.csv").read_text().splitlines())}
    assert rows.keys() == set(NAMES), remedy
    page = (docs / "results.md").read_text()
    for name, row in rows.items():
        card = load_card(name)
        assert f"| {name} |" in page, remedy
        assert float(row["value"]) == card.metrics[row["metric"]], remedy
        assert int(row["parameters"]) == card.parameters, remedy
        assert float(row["checkpoint"]) == card.weights.size / 1024, remedy
        assert float(row["milliseconds"]) > 0
