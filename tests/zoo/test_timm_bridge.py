"""The zoo's names in timm.create_model, and what timm does with models."""

import json
import pickle
import subprocess
import sys

import pytest
import timm
import timm.data
import timm.optim
import timm.utils
import torch
from safetensors.torch import load_file, save_file

from restpoint import create_model, list_models, load_card
from restpoint.zoo import CheckpointError, UnknownModelError, timm_bridge

NAMES = list_models(task="image-classification", pretrained=False)


def same(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_every_classifier_and_every_set_of_weights_is_listed():
    assert set(timm.list_models("restpoint*")) >= {f"restpoint_{name}" for name in NAMES}
    weights = list_models(task="image-classification", pretrained=True)
    assert set(timm.list_models("restpoint*", pretrained=True)) >= {f"restpoint_{name}" for name in weights}
    assert timm_bridge.register() == []


@pytest.mark.parametrize("name", NAMES)
def test_every_classifier_is_built_by_timm(name):
    model = timm.create_model(f"restpoint_{name}", num_classes=7, in_chans=1, drop_rate=0.0, drop_path_rate=None)
    assert type(model) is type(create_model(name))
    assert model.get_classifier().out_features == 7
    assert model.get_submodule(model.default_cfg["classifier"]) is model.get_classifier()
    assert model.get_submodule(model.default_cfg["first_conv"]).in_channels == 1


def test_pretrained_weights_with_another_head_and_other_channels():
    ours = create_model("conv_deq_tiny.digits", pretrained=True).eval()
    for name in ("restpoint_conv_deq_tiny", "restpoint_conv_deq_tiny.digits"):
        assert same(timm.create_model(name, pretrained=True), ours)
    assert not same(timm.create_model("restpoint_conv_deq_tiny.digits"), ours)
    model = timm.create_model("restpoint_conv_deq_tiny", pretrained=True, num_classes=3, in_chans=3).eval()
    grey = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        assert model(grey.expand(-1, 3, -1, -1)).shape == (2, 3)
        features = model.forward_features(grey.expand(-1, 3, -1, -1))
        torch.testing.assert_close(features, ours.forward_features(grey), rtol=1e-2, atol=1e-2)
    data = timm.data.resolve_model_data_config(ours := timm.create_model("restpoint_conv_deq_tiny", pretrained=True))
    how = load_card("conv_deq_tiny.digits").input
    assert (data["input_size"], data["mean"], data["std"]) == (how.shape, how.mean, how.std)
    assert ours.pretrained_cfg["label_names"] == tuple("0123456789")


def test_multiscale_equilibria_come_with_weights():
    ours = create_model("mdeq_tiny.cifar10", pretrained=True).eval()
    model = timm.create_model("restpoint_mdeq_tiny", pretrained=True, num_classes=10)
    assert same(model, ours)
    data = timm.data.resolve_model_data_config(model)
    assert data["input_size"] == (3, 32, 32)
    assert model.pretrained_cfg["label_names"][:2] == ("airplane", "automobile")


def test_a_tag_sets_the_arguments():
    model = timm.create_model("restpoint_ode_net_small.mnist")
    assert model.stem[0].out_channels == 32
    assert timm.create_model("restpoint_ode_net_small").stem[0].out_channels == 64


def test_features_only():
    images = torch.randn(2, 1, 8, 8)
    options = {"pretrained": True, "features_only": True}
    net = timm.create_model("restpoint_conv_deq_tiny", **options).eval()
    assert net.feature_info.channels() == [32, 32]
    assert net.feature_info.reduction() == [1, 1]
    with torch.no_grad():
        levels = net(images)
        last = timm.create_model("restpoint_conv_deq_tiny", pretrained=True, features_only=True, out_indices=(-1,))(
            images
        )
        whole = create_model("conv_deq_tiny", pretrained=True).forward_features(images)
    assert [tuple(level.shape) for level in levels] == [(2, 32, 8, 8), (2, 32, 8, 8)]
    assert len(last) == 1
    torch.testing.assert_close(last[0], whole)
    torch.testing.assert_close(levels[-1], whole)


def test_layer_decay_and_average():
    torch.manual_seed(0)
    model = timm.create_model("restpoint_conv_deq_tiny", num_classes=3)
    optimizer = timm.optim.create_optimizer_v2(model, "adamw", lr=0.01, weight_decay=0.05, layer_decay=0.5)
    scale = {p: group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    assert scale[model.classifier.weight] == 1.0
    assert scale[model.deq.cell.conv1.weight] == 0.5
    assert scale[model.stem[1][0].weight] == 0.25
    assert scale[model.stem[0][0].weight] == 0.125
    average = timm.utils.ModelEmaV3(model, decay=0.5)
    before = average.module.classifier.weight.clone()
    images, labels = torch.randn(6, 1, 8, 8), torch.arange(6) % 3
    losses = []
    for _ in range(8):
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update(model)
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not torch.equal(average.module.classifier.weight, before)
    assert average.module(images).shape == (6, 3)


def test_weights_of_ones_own(tiny, tmp_path):
    timm_bridge.register()
    trained = create_model("trial_tiny", num_classes=9, in_chans=2)
    path = tmp_path / "w.safetensors"
    torch.save(trained.state_dict(), tmp_path / "w.pt")
    save_file(trained.state_dict(), path)
    overlay = {"file": str(path)}
    model = timm.create_model(
        "restpoint_trial_tiny", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=4, in_chans=2
    )
    assert torch.equal(model.stem.weight, trained.stem.weight)
    assert model.head.out_features == 4
    for name, message in (("w.pt", "nothing else is read"), ("absent.safetensors", "absent.* cannot be read")):
        overlay = {"file": str(tmp_path / name)}
        with pytest.raises(CheckpointError, match=message):
            timm.create_model("restpoint_trial_tiny", pretrained=True, pretrained_cfg_overlay=overlay)
    with pytest.raises(CheckpointError, match="hf_hub_id='me/mine' cannot be loaded here"):
        timm.create_model("restpoint_trial_tiny", pretrained=True, pretrained_cfg_overlay={"hf_hub_id": "me/mine"})


def test_a_checkpoint_path_is_adapted_and_says_so(tmp_path):
    ours = create_model("conv_deq_tiny.digits", pretrained=True).eval()
    path = tmp_path / "w.safetensors"
    save_file(ours.state_dict(), path)
    assert same(timm.create_model("restpoint_conv_deq_tiny.digits", checkpoint_path=path), ours)
    with pytest.warns(UserWarning, match="another number of classes than 3|1 channels, .* adapted to 3") as said:
        model = timm.create_model("restpoint_conv_deq_tiny.digits", checkpoint_path=path, num_classes=3, in_chans=3)
    assert len(said) == 2
    grey = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        assert model.eval()(grey.expand(-1, 3, -1, -1)).shape == (2, 3)
        features = model.forward_features(grey.expand(-1, 3, -1, -1))
    torch.testing.assert_close(features, ours.forward_features(grey), rtol=1e-2, atol=1e-2)
    with pytest.raises(RuntimeError, match="size mismatch for deq"):
        timm.create_model("restpoint_conv_deq_tiny.digits", checkpoint_path=path, channels=16)
    # The models stay what they were for all else that is done with models.
    copied = pickle.loads(pickle.dumps(model))  # noqa: S301
    assert same(copied, model)
    copied.load_state_dict(model.state_dict())


MDEQ = list_models("mdeq_tiny.*", pretrained=True)


@pytest.mark.skipif(not MDEQ, reason="mdeq_tiny has no weights in this tree")
@pytest.mark.filterwarnings("ignore::restpoint.solvers.SolverWarning")
def test_the_largest_of_the_shipped_classifiers_is_fine_tuned_as_any_of_timms():
    name = f"restpoint_{MDEQ[0] if MDEQ else ''}"
    images = torch.randn(2, 3, 32, 32)
    model = timm.create_model("restpoint_mdeq_tiny", pretrained=True, num_classes=10).eval()
    assert model(images).shape == (2, 10)
    assert timm.create_model(name, pretrained=True, num_classes=4, in_chans=1).eval()(images[:, :1]).shape == (2, 4)
    levels = timm.create_model(name, pretrained=True, features_only=True).eval()(images)
    assert len(levels) > 1
    optimizer = timm.optim.create_optimizer_v2(model, "adamw", lr=1e-4, layer_decay=0.7)
    assert len({group["lr_scale"] for group in optimizer.param_groups}) > 2
    average = timm.utils.ModelEmaV3(model, decay=0.5)
    model(images).logsumexp(1).sum().backward()
    optimizer.step()
    average.update(model)
    assert all(p.grad is not None for p in model.parameters())


def test_the_way_through_a_folder_of_timms(tmp_path):
    from timm.models import save_for_hf

    model = timm.create_model("restpoint_conv_deq_tiny.digits", pretrained=True)
    model.reset_classifier(5)
    save_for_hf(model, tmp_path, safe_serialization=True)
    assert json.loads((tmp_path / "config.json").read_text())["architecture"] == "restpoint_conv_deq_tiny"
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert same(again, model)
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()


def test_what_is_not_there_is_named(tiny):
    timm_bridge.register()
    with pytest.raises(UnknownModelError, match="no weights called 'digit'. Did you mean 'digits'"):
        timm.create_model("restpoint_conv_deq_tiny.digit", pretrained=True)
    with pytest.raises(UnknownModelError, match="restpoint_anode_net_tiny has no pretrained weights"):
        timm.create_model("restpoint_anode_net_tiny", pretrained=True)
    with pytest.raises(TypeError, match="no option 'num_clases'. Did you mean 'num_classes'"):
        timm.create_model("restpoint_conv_deq_tiny", num_clases=3)
    with pytest.raises(TypeError, match="no option 'drop_rate'"):
        timm.create_model("restpoint_conv_deq_tiny", drop_rate=0.5)
    with pytest.raises(ValueError, match="RESTPOINT_HOME"):
        timm.create_model("restpoint_conv_deq_tiny", cache_dir="cache")
    with pytest.raises(ValueError, match="trial_tiny has no forward_intermediates"):
        timm.create_model("restpoint_trial_tiny", features_only=True)


@pytest.mark.parametrize("indices", [(0, 2), (-3,), 3, 0])
def test_maps_of_features_that_there_are_not_are_refused(indices):
    with pytest.raises(ValueError, match="conv_deq_tiny has 2 maps of features; out_indices=.* asks for others"):
        timm.create_model("restpoint_conv_deq_tiny", features_only=True, out_indices=indices)


def test_weights_that_are_damaged_or_gone_never_become_a_model_of_timms(tiny, home):
    timm_bridge.register()
    weights = home / "checkpoints" / "trial_tiny.ones.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(CheckpointError, match="corrupt"):
        timm.create_model("restpoint_trial_tiny", pretrained=True)
    weights.unlink()
    with pytest.raises(CheckpointError, match="are in none of"):
        timm.create_model("restpoint_trial_tiny", pretrained=True)


def test_timm_is_imported_by_those_alone_who_want_it(tmp_path):
    code = "import sys, restpoint; restpoint.list_models(); restpoint.create_model('conv_deq_tiny'); "
    code += "assert 'timm' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
