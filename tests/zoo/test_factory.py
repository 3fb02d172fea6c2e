"""create_model and its way back, save_pretrained; heads and input channels that adapt."""

import copy
import pickle

import pytest
import safetensors.torch
import torch
from torch import nn

import restpoint
from restpoint.solvers import Anderson, Picard
from restpoint.zoo import CardError, CheckpointError, UnknownModelError, create_model, load_card, save_pretrained
from restpoint.zoo.adapt import adapt_channels

from .conftest import publish

IMAGES = (2, 1, 6, 5)


def same(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_pretrained_weights_come_with_their_arguments(tiny):
    for name in ("trial_tiny.ones", "trial_tiny"):
        model = create_model(name, pretrained=True)
        assert same(model, tiny)
        assert model.training
        assert model.solver == Picard(damping=0.5)
        assert model.blueprint.card == load_card(name)
    images = torch.randn(IMAGES)
    assert torch.equal(model(images), tiny(images))


def test_without_weights_a_tag_gives_the_arguments_alone(tiny):
    model = create_model("trial_tiny.ones")
    assert model.solver == Picard(damping=0.5)
    assert not same(model, tiny)
    assert create_model("trial_tiny").solver is None
    assert create_model("trial_tiny", width=8).num_features == 8


def test_the_face_of_the_package_is_the_zoo(tiny):
    assert same(restpoint.create_model("trial_tiny.ones", pretrained=True), tiny)
    assert restpoint.list_models("trial*") == ["trial_bare", "trial_tiny", "trial_tiny.ones"]
    assert restpoint.load_card("trial_tiny.ones").parameters == sum(p.numel() for p in tiny.parameters())


@pytest.mark.parametrize(
    ("name", "pretrained", "message"),
    [
        ("trial_tini", False, r"no model 'trial_tini'. Did you mean 'trial_tiny'"),
        ("trial_tini.ones", True, r"no model 'trial_tini.ones'. Did you mean 'trial_tiny'"),
        ("trial_tiny.onse", True, r"no weights called 'onse'. Did you mean 'ones'\? It has: trial_tiny.ones"),
        ("trial_tiny.", False, r"no weights called ''"),
        ("trial_bare.ones", False, r"trial_bare has no weights called 'ones'. It has: none"),
        ("trial_bare", True, r"trial_bare has no pretrained weights. Models that have: .*trial_tiny.ones"),
        ("", False, r"no model ''"),
        ("../../etc", True, r"no weights|no model"),
    ],
)
def test_an_unknown_name_is_met_with_a_suggestion(tiny, name, pretrained, message):
    with pytest.raises(UnknownModelError, match=message):
        create_model(name, pretrained=pretrained)


def test_several_weights_want_to_be_named(tiny, home):
    publish(home / "checkpoints", "trial_tiny.twos")
    with pytest.raises(UnknownModelError, match="several weights; name one of trial_tiny.ones, trial_tiny.twos"):
        create_model("trial_tiny", pretrained=True)


def test_an_unknown_override_is_met_with_a_suggestion(tiny):
    for pretrained in (False, True):
        with pytest.raises(
            TypeError, match=r"no option 'num_clases'. Did you mean 'num_classes'\? Its options: num_cl"
        ):
            create_model("trial_tiny", pretrained=pretrained, num_clases=3)


def test_another_solver_keeps_the_weights(tiny):
    model = create_model("trial_tiny.ones", pretrained=True, solver=Anderson(memory=2))
    assert same(model, tiny)
    assert model.solver == model.blueprint.arguments["solver"] == Anderson(memory=2)


def test_another_shape_is_refused_by_name(tiny):
    with pytest.raises(CheckpointError, match=r"trial_tiny.ones does not fit Tiny.*stem.weight \(4, 1, 3, 3\)"):
        create_model("trial_tiny.ones", pretrained=True, width=8)


def test_another_number_of_classes_gets_a_new_head_on_the_pretrained_body(tiny):
    model = create_model("trial_tiny.ones", pretrained=True, num_classes=7)
    images = torch.randn(IMAGES)
    assert model(images).shape == (2, 7)
    assert torch.equal(model.forward_features(images), tiny.forward_features(images))
    features = create_model("trial_tiny.ones", pretrained=True, num_classes=0)(images)
    assert torch.equal(features, tiny.forward_head(tiny.forward_features(images), pre_logits=True))
    kept = create_model("trial_tiny.ones", pretrained=True, num_classes=3)
    assert same(kept, tiny)


@pytest.mark.parametrize("norm", [None, "weight"])
@pytest.mark.parametrize(("old", "new"), [(1, 3), (3, 1), (3, 6), (3, 4), (4, 3), (2, 2)])
def test_equal_channels_are_answered_as_before(tiny, home, norm, old, new):
    before = publish(home / "checkpoints", "trial_tiny.chans", in_chans=old, norm=norm)
    after = create_model("trial_tiny.chans", pretrained=True, in_chans=new)
    grey = torch.randn(2, 1, 6, 5)
    # A convolution's answer to equal channels is that to one channel times the sum of its weights over channels.
    torch.testing.assert_close(after(grey.expand(-1, new, -1, -1)), before(grey.expand(-1, old, -1, -1)))
    assert after.stem.in_channels == new


def test_a_multiple_of_the_channels_keeps_what_tells_them_apart():
    weight = torch.randn(4, 3, 2, 2)
    adapted = adapt_channels(weight, 6)
    images = torch.randn(1, 3, 5, 5)
    torch.testing.assert_close(
        nn.functional.conv2d(torch.cat([images, images], 1), adapted), nn.functional.conv2d(images, weight)
    )


def test_both_overrides_at_once(tiny):
    model = create_model("trial_tiny.ones", pretrained=True, num_classes=5, in_chans=3)
    assert model(torch.randn(2, 3, 6, 5)).shape == (2, 5)
    assert model.blueprint.arguments == {"num_classes": 5, "in_chans": 3, "solver": Picard(damping=0.5)}


def test_a_layer_with_a_memory_is_not_adapted_silently(tiny, home):
    publish(home / "checkpoints", "trial_tiny.spectral", norm="spectral")
    create_model("trial_tiny.spectral", pretrained=True, in_chans=1)
    with pytest.raises(CheckpointError, match=r"Tiny\.stem has a parametrization with a memory"):
        create_model("trial_tiny.spectral", pretrained=True, in_chans=3)


def test_a_model_that_knows_nothing_of_heads_says_so(tiny, tmp_path):
    save_pretrained(create_model("trial_bare"), tmp_path)
    name = f"local-dir:{tmp_path}"
    assert create_model(name, pretrained=True).weight.shape == (2, 1)
    with pytest.raises(CheckpointError, match="Linear has no `reset_classifier`"):
        create_model(name, pretrained=True, num_classes=3)
    with pytest.raises(CheckpointError, match="Linear has no `input_layers`"):
        create_model(name, pretrained=True, in_chans=3)
    with pytest.raises(CheckpointError, match=r"weight \(2, 1\), in the model \(3, 1\)"):
        create_model("trial_bare", checkpoint_path=tmp_path / "model.safetensors", num_classes=3)


def test_a_checkpoint_whose_card_lies_beside_it_is_verified(tiny, home, tmp_path):
    path = home / "checkpoints" / "trial_tiny.ones.safetensors"
    create_model("trial_tiny", checkpoint_path=path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="is corrupt"):
        create_model("trial_tiny", checkpoint_path=path)
    (tmp_path / "other.safetensors").write_bytes(content)
    create_model("trial_tiny", checkpoint_path=tmp_path / "other.safetensors")
    save_pretrained(create_model("trial_tiny"), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="is corrupt"):
        create_model("trial_tiny", checkpoint_path=tmp_path / "model.safetensors")


@pytest.mark.parametrize("norm", [None, "weight"])
def test_a_checkpoint_without_a_card_adapts_as_well(tiny, tmp_path, norm):
    path = tmp_path / "w.safetensors"
    trained = create_model("trial_tiny", num_classes=9, in_chans=2, norm=norm)
    safetensors.torch.save_file(trained.state_dict(), path)
    assert same(create_model("trial_tiny", checkpoint_path=path, num_classes=9, in_chans=2, norm=norm), trained)
    model = create_model("trial_tiny", checkpoint_path=path, num_classes=4, in_chans=4, norm=norm)
    images = torch.randn(2, 2, 6, 5)
    torch.testing.assert_close(model.forward_features(torch.cat([images, images], 1)), trained.forward_features(images))
    assert model(torch.cat([images, images], 1)).shape == (2, 4)
    # Nobody asked for another number of classes than the architecture's: that is a mistake.
    with pytest.raises(CheckpointError, match=r"head.weight \(9, 4\), in the model \(3, 4\)"):
        create_model("trial_tiny.ones", checkpoint_path=path, in_chans=2, norm=norm)


@pytest.mark.parametrize("pretrained", [True, False])
@pytest.mark.parametrize(
    "option, value", [("num_classes", -1), ("num_classes", "ten"), ("num_classes", 2.5), ("in_chans", 0)]
)
def test_a_number_of_classes_or_channels_that_is_none_is_refused(tiny, option, value, pretrained):
    with pytest.raises(ValueError, match=f"create_model: {option} must be an integer of at least"):
        create_model("trial_tiny", pretrained=pretrained, **{option: value})


def test_two_sources_of_weights_are_one_too_many(tiny, tmp_path):
    with pytest.raises(ValueError, match="either pretrained=True or checkpoint_path"):
        create_model("trial_tiny", pretrained=True, checkpoint_path=tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "are in none of"),
        (lambda path: path.write_bytes(path.read_bytes()[:-10]), "truncated"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x7f"), "corrupt"),
    ],
)
def test_damaged_weights_never_become_a_model(tiny, home, damage, message):
    create_model("trial_tiny.ones", pretrained=True)
    damage(home / "checkpoints" / "trial_tiny.ones.safetensors")
    with pytest.raises(CheckpointError, match=message):
        create_model("trial_tiny.ones", pretrained=True)


def test_the_random_numbers_of_the_caller_are_left_alone_by_saving(tiny, tmp_path):
    model = create_model("trial_tiny.ones", pretrained=True)
    state = torch.get_rng_state()
    save_pretrained(model, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_folder_gives_back_what_was_saved(tiny, tmp_path):
    model = create_model("trial_tiny.ones", pretrained=True, num_classes=5, solver=Anderson(memory=3))
    card = save_pretrained(model, tmp_path / "mine", metrics={"accuracy": 0.25}, seed=7)
    assert card == load_card(f"local-dir:{tmp_path / 'mine'}")
    again = create_model(f"local-dir:{tmp_path / 'mine'}", pretrained=True)
    assert same(again, model)
    assert again.solver == Anderson(memory=3)
    assert (card.seed, card.labels, card.input) == (7, None, load_card("trial_tiny.ones").input)
    adapted = create_model(f"local-dir:{tmp_path / 'mine'}", pretrained=True, num_classes=2)
    assert adapted(torch.randn(IMAGES)).shape == (2, 2)


def test_a_head_that_was_reset_by_hand_is_saved_as_it_is(tiny, tmp_path):
    model = create_model("trial_tiny.ones", pretrained=True)
    model.reset_classifier(11)
    assert save_pretrained(model, tmp_path).arguments["num_classes"] == 11
    assert same(create_model(f"local-dir:{tmp_path}", pretrained=True), model)


def test_what_could_not_be_rebuilt_is_not_saved(tiny, tmp_path):
    model = create_model("trial_tiny.ones", pretrained=True)
    model.stem = nn.Conv2d(1, 4, 5, padding=2)
    with pytest.raises(CheckpointError, match=r"does not rebuild this model.*stem\.weight"):
        save_pretrained(model, tmp_path / "a")
    with pytest.raises(CheckpointError, match="was not built by create_model"):
        save_pretrained(nn.Linear(2, 2), tmp_path / "a")
    with pytest.raises(CardError, match="the argument solver"):
        save_pretrained(create_model("trial_tiny", solver=object()), tmp_path / "a")
    with pytest.raises(CardError, match="name must be"):
        save_pretrained(create_model("trial_tiny"), tmp_path / "a", tag="no/tag")
    assert not (tmp_path / "a").exists()


def test_a_folder_that_is_none_says_so(tiny, tmp_path):
    with pytest.raises(CardError, match="there is no folder"):
        create_model(f"local-dir:{tmp_path / 'absent'}", pretrained=True)
    with pytest.raises(CardError, match=r"No card at .*card\.json"):
        create_model(f"local-dir:{tmp_path}", pretrained=True)


def test_models_can_be_copied_and_pickled(tiny):
    model = create_model("trial_tiny.ones", pretrained=True)
    assert copy.deepcopy(model).blueprint == model.blueprint
    assert pickle.loads(pickle.dumps(model.blueprint)) == model.blueprint  # noqa: S301
