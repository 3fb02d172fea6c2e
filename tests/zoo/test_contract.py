"""What every image classifier of the zoo keeps, after timm."""

import copy

import pytest
import torch

from restpoint.models.registry import ARCHITECTURES, ImageClassifier
from restpoint.zoo import create_model, list_models, save_pretrained

# Too large for here, or made for images of one size: a test_* model of the same class stands for each.
ELSEWHERE = {
    "mdeq_large", "mdeq_large_imagenet", "mdeq_large_imagenet_reg", "mdeq_large_reg", "mdeq_small_imagenet",
    "mdeq_small_imagenet_reg", "mdeq_tiny", "mdeq_xl_imagenet", "mon_fc_small",
}  # fmt: skip
NAMES = [n for n in list_models(task="image-classification", pretrained=False) if n not in ELSEWHERE]
SIDE = 12


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def model(name):
    return create_model(name, num_classes=7, in_chans=2)


@pytest.fixture
def images():
    return torch.randn(2, 2, SIDE, SIDE)


def test_heads(model, images):
    assert isinstance(model, ImageClassifier)
    assert (model.num_classes, model.in_chans) == (7, 2)
    # Batch normalisation makes another map of a model in training.
    model.train(not any(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules()))
    features = model.forward_features(images)
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, model.num_features)
    torch.testing.assert_close(model.get_classifier()(pooled), model.forward_head(features))
    logits = model(images)
    assert logits.shape == (2, 7)
    torch.testing.assert_close(logits, model.forward_head(features))
    model.eval()
    torch.testing.assert_close(model(images), logits)
    model.double().reset_classifier(4)
    assert not model.get_classifier().training
    with torch.no_grad():
        assert model(images.double()).shape == (2, 4)
        model.reset_classifier(0)
        torch.testing.assert_close(model(images.double()).float(), pooled, rtol=1e-2, atol=1e-2)
    assert model.num_classes == 0


def test_every_parameter_learns(model, images):
    model(images).logsumexp(1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_autocast_computes_in_half_precision_what_can_be(model, images):
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images)
    assert logits.dtype == torch.bfloat16
    logits.float().logsumexp(1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(logits.float(), model(images), rtol=0.1, atol=0.1)


def test_levels_of_features_are_as_described(model, images):
    with torch.no_grad():
        features, levels = model.forward_intermediates(images)
    assert len(levels) == len(model.feature_info)
    assert features is levels[-1]
    assert features.shape[1] == model.num_features
    for level, info in zip(levels, model.feature_info, strict=True):
        assert level.shape == (2, info["num_chs"], SIDE // info["reduction"], SIDE // info["reduction"])
        assert model.get_submodule(info["module"])
    reductions = [info["reduction"] for info in model.feature_info]
    assert reductions == sorted(reductions)
    with torch.no_grad():
        only = model.forward_intermediates(images, indices=[-1], intermediates_only=True)
        last = model.forward_intermediates(images, indices=1, intermediates_only=True)
    torch.testing.assert_close(only, [features])
    torch.testing.assert_close(last, [features])
    with pytest.raises(ValueError, match="levels of features"):
        model.forward_intermediates(images, indices=[len(levels)])
    with pytest.raises(ValueError, match="output_fmt 'NCHW'"):
        model.forward_intermediates(images, output_fmt="NLC")


def test_layers_lie_in_the_order_of_their_depth(model):
    from timm.models import group_parameters

    names = dict(model.named_parameters())
    assert model.no_weight_decay() <= names.keys()
    for coarse in (False, True):
        depth = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
        assert depth.keys() == names.keys()
        deepest = max(depth.values())
        assert {key for key in names if depth[key] == deepest} == {"classifier.weight", "classifier.bias"}
        reading = [key for key in names if key.startswith(tuple(f"{layer}." for layer in model.input_layers))]
        assert reading
        assert all(depth[key] == 0 for key in reading)
        assert deepest >= 2


def test_another_head_and_other_channels_on_saved_weights(name, model, images, tmp_path):
    model.eval()
    save_pretrained(model, tmp_path)
    folder, twice = f"local-dir:{tmp_path}", torch.cat([images, images], dim=1)
    with torch.no_grad():
        features = model.forward_features(images)
        again = create_model(folder, pretrained=True).eval()
        assert torch.equal(again(images), model(images))
        for adapted in (
            create_model(folder, pretrained=True, num_classes=3, in_chans=4),
            create_model(name, checkpoint_path=tmp_path / "model.safetensors", num_classes=3, in_chans=4),
        ):
            assert adapted.eval()(twice).shape == (2, 3)
            torch.testing.assert_close(adapted.forward_features(twice), features, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "name", [n for n in NAMES if ARCHITECTURES[n].family in ("deq", "mdeq", "monotone")], indirect=True
)
def test_images_do_not_touch_each_other(name):
    model = create_model(name, in_chans=2, rtol=1e-5).eval()
    images = torch.randn(4, 2, SIDE, SIDE)
    with torch.no_grad():
        together = model(images)
        images[2] = float("nan")
        broken = model(images)
    torch.testing.assert_close(broken[[0, 1, 3]], together[[0, 1, 3]], rtol=1e-4, atol=1e-4)
    assert broken[2].isnan().all()


def test_solver_and_tolerances_are_options(name):
    wanted = {"num_classes", "in_chans", "solver", "adjoint", "rtol", "atol", "max_steps"}
    assert wanted <= set(ARCHITECTURES[name].options)


def test_a_copy_is_a_model_of_its_own(model, images):
    twin = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(twin(images), model(images))
        next(twin.parameters()).add_(1.0)
        assert not torch.equal(twin(images), model(images))
