"""What the README says is true."""

import re
from pathlib import Path

import pytest

import restpoint
from restpoint.train.data import load_data

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
LOAD, REUSE = re.findall(r"```python\n(.*?)```", README, flags=re.S)


def test_the_example_that_loads_a_model():
    names = {}
    exec(LOAD, names)
    accuracy = (names["classes"] == load_data("digits").test.labels).double().mean()
    assert float(accuracy) == pytest.approx(names["card"].metrics["accuracy"], abs=1e-9)


def test_the_example_that_reuses_a_solver():
    names = {}
    exec(REUSE, names)
    assert names["solution"].converged.all()
    assert all(parameter.grad is not None for parameter in names["model"].parameters())


def test_the_examples_of_the_migration_guide():
    names = {}
    for block in re.findall(
        r"```python\n(.*?)```", (ROOT / "docs/migrating-from-torchdiffeq.md").read_text(), flags=re.S
    ):
        exec(block, names)
    assert names["solution"].converged.all()
    assert all(parameter.grad is not None for parameter in names["field"].parameters())


def test_the_examples_of_the_page_on_structured_distributions():
    names = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs/inference.md").read_text(), flags=re.S):
        exec(block, names)
    assert names["few"].converged.all()
    assert names["weights"].shape == (2, 7, 7)
    assert names["unary"].grad is not None


def test_the_examples_of_the_page_on_optimisation():
    names = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs/optimisation.md").read_text(), flags=re.S):
        exec(block, names)
    assert names["q"].grad is not None
    assert names["scores"].grad.isfinite().all()


def test_the_models_and_recipes_that_are_named_exist():
    assert set(re.findall(r"conv_deq_\w+\.(?!yaml)\w+", README)) <= set(restpoint.list_models(pretrained=True))
    recipes = {path.name for path in (ROOT / "train" / "recipes").iterdir()}
    assert set(re.findall(r"\w+\.yaml", README)) <= recipes


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))], ids=lambda page: page.name
)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (page.parent / target).is_file(), f"{page.name} links to {target}"
