"""Names: registered once, listed with wildcards, and only what can be loaded is called pretrained."""

import pytest

from restpoint.models.registry import ARCHITECTURES, register_model
from restpoint.zoo import CardError, CardWarning, ImageClassifier, UnknownModelError, create_model, list_models

from .conftest import Tiny, publish


def test_wildcards_families_and_tasks(tiny):
    assert list_models("trial_*", pretrained=False) == ["trial_bare", "trial_tiny"]
    assert list_models("*.ones") == list_models("trial*", pretrained=True) == ["trial_tiny.ones"]
    assert list_models(["*bare", "*.ones"]) == ["trial_bare", "trial_tiny.ones"]
    assert list_models(family="trial") == ["trial_bare", "trial_tiny", "trial_tiny.ones"]
    assert list_models(task="regression", family="trial") == ["trial_bare"]
    assert list_models("nothing*") == []
    assert set(list_models(pretrained=True)) < set(list_models())


def test_an_unknown_family_or_task_is_an_error(tiny):
    with pytest.raises(UnknownModelError, match="No model has the family 'trail'. Did you mean 'trial'"):
        list_models(family="trail")
    with pytest.raises(UnknownModelError, match="image-classification"):
        list_models(task="image_classification")


def test_names_come_in_natural_order(tiny, home):
    for size in (10, 9, 100):
        publish(home / "checkpoints", f"trial_tiny.v{size}")
    assert list_models("*.v*") == ["trial_tiny.v9", "trial_tiny.v10", "trial_tiny.v100"]


def test_a_card_without_its_weights_is_not_called_pretrained(tiny, home):
    (home / "checkpoints" / "trial_tiny.ones.safetensors").unlink()
    assert list_models("trial*") == ["trial_bare", "trial_tiny"]


def test_a_card_of_an_unknown_architecture_is_not_listed(tiny, home):
    publish(home / "checkpoints", "elsewhere.ones")
    assert list_models("elsewhere*") == []


def test_a_card_under_another_name_is_refused(tiny, home):
    folder = home / "checkpoints"
    (folder / "trial_tiny.ones.json").rename(folder / "trial_tiny.other.json")
    message = r"says that its name is 'trial_tiny.ones'; call the file trial_tiny.ones.json"
    with pytest.warns(CardWarning, match=message):
        assert list_models("trial*") == ["trial_bare", "trial_tiny"]
    with pytest.warns(CardWarning), pytest.raises(CardError, match=message):
        create_model("trial_tiny.other", pretrained=True)


@pytest.mark.parametrize("content", ["{}", "no JSON"])
def test_a_broken_card_is_named_and_harms_no_other_model(tiny, home, content):
    (home / "checkpoints" / "trial_tiny.broken.json").write_text(content)
    with pytest.warns(CardWarning, match=r"trial_tiny\.broken\.json.*passed over"):
        assert list_models("trial*") == ["trial_bare", "trial_tiny", "trial_tiny.ones"]
    with pytest.warns(CardWarning):
        create_model("trial_tiny.ones", pretrained=True)
    with pytest.warns(CardWarning), pytest.raises(CardError, match=r"broken\.json"):
        create_model("trial_tiny.broken", pretrained=True)


def test_a_name_belongs_to_one_builder(tiny):
    def other():
        return Tiny()

    other.__name__ = "trial_tiny"
    with pytest.raises(ValueError, match="model 'trial_tiny' .*is already registered by .*trial_tiny"):
        register_model(family="trial", task="regression")(other)


@pytest.mark.parametrize("name", ["Upper", "with.dot", "with-dash", "_hidden", "9lives"])
def test_a_name_is_fit_for_a_file_and_a_tag(name):
    def builder():
        return Tiny()

    builder.__name__ = name
    with pytest.raises(ValueError, match="lower-case letters, digits and underscores"):
        register_model(family="trial", task="regression")(builder)
    assert name not in ARCHITECTURES


def test_a_builder_whose_options_nobody_knows_is_refused():
    def open_ended(**arguments):
        return Tiny(**arguments)

    def positional(width, /):
        return Tiny(width=width)

    def starred(*widths):
        return Tiny(width=widths[0])

    with pytest.raises(TypeError, match=r"accepts=\.\.\."):
        register_model(family="trial", task="regression")(open_ended)
    with pytest.raises(TypeError, match="keyword arguments only, and has width"):
        register_model(family="trial", task="regression")(positional)
    with pytest.raises(TypeError, match=r"keyword arguments only, and has \*widths"):
        register_model(family="trial", task="regression")(starred)


@pytest.mark.parametrize("name", list_models(pretrained=False))
def test_every_architecture_builds_from_its_defaults(name):
    model = create_model(name)
    architecture = ARCHITECTURES[name]
    assert architecture.summary
    if architecture.task == "image-classification":
        assert isinstance(model, ImageClassifier)
        assert all(model.get_submodule(layer) for layer in model.input_layers)
        assert model.get_classifier() in set(model.modules())
