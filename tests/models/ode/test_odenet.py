"""ODE-Nets are Chen et al.'s, and classifiers after timm's conventions."""

import copy

import pytest
import torch
from torch import nn

from restpoint.models.ode import ODENet, anode_net_small, anode_net_tiny, ode_net_small, ode_net_tiny
from restpoint.solvers.ode import ConstantController, DirectAdjoint, Euler, Midpoint, PIDController

BUILDERS = {
    ode_net_small: (28, 208_266),
    anode_net_small: (28, None),
    ode_net_tiny: (8, None),
    anode_net_tiny: (8, None),
}
CHEAP = {"solver": Midpoint(), "controller": ConstantController(dt=0.5)}


@pytest.mark.parametrize("builder", BUILDERS, ids=lambda b: b.__name__)
def test_the_interface_of_an_image_classifier(builder):
    side, parameters = BUILDERS[builder]
    model = builder(in_chans=2, num_classes=7, **CHEAP)
    images = torch.randn(3, 2, side, side)
    features = model.forward_features(images)
    assert features.shape[:2] == (3, model.num_features)
    assert (features >= 0).all()
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (3, model.num_features)
    logits = model(images)
    torch.testing.assert_close(logits, model.get_classifier()(pooled))
    assert logits.shape == (3, 7)
    model.reset_classifier(4)
    assert model(images).shape == (3, 4)
    model.reset_classifier(0)
    torch.testing.assert_close(model(images), pooled)
    assert model.num_classes == 0
    if parameters:
        assert sum(p.numel() for p in builder().parameters()) == parameters <= 220_000


def test_every_parameter_gets_the_gradient_of_the_taped_solve():
    model = anode_net_tiny(rtol=1e-5, atol=1e-5).double()
    direct = copy.deepcopy(model)
    direct.ode.adjoint = DirectAdjoint()
    images = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    for network in (model, direct):
        network(images).square().sum().backward()
    for (name, ours), theirs in zip(model.named_parameters(), direct.parameters(), strict=True):
        assert ours.grad is not None
        assert ours.grad.any(), name
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-10)


def test_euler_with_one_step_is_a_residual_network():
    model = ode_net_tiny(solver=Euler(), controller=ConstantController(dt=1.0))
    images = torch.randn(2, 1, 8, 8)
    y = model.stem(images)
    block = y + model.ode.field(torch.zeros(()), y)
    torch.testing.assert_close(model.forward_features(images), model.norm(block).relu())


def test_an_answer_does_not_depend_on_the_rest_of_the_batch_with_steps_per_sample():
    model = ode_net_tiny(controller=PIDController(per_sample=True)).eval()
    images = torch.randn(4, 1, 8, 8) * torch.tensor([0.1, 1.0, 3.0, 10.0]).view(-1, 1, 1, 1)
    with torch.no_grad():
        together, steps = model(images), model.solve(images).stats.steps
        alone = torch.cat([model(image.unsqueeze(0)) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert steps.shape == (4,)


def test_train_and_eval_compute_the_same():
    model, images = ode_net_tiny(), torch.randn(2, 1, 8, 8)
    assert model.train()(images).equal(model.eval()(images))


def test_a_new_classifier_follows_type_and_mode():
    model = ode_net_tiny().double().eval()
    model.reset_classifier(3)
    assert isinstance(model.get_classifier(), nn.Linear)
    assert model.get_classifier().weight.dtype == torch.float64
    assert not model.get_classifier().training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stem_channels": (8, 8)}, "stem_strides"),
        ({"stem_strides": (1, 3, 2)}, "stride 1 or 2"),
        ({"stem_channels": (), "stem_strides": ()}, "at least 1"),
        ({"groups": 24}, "24 groups do not divide 64 channels"),
        ({"augment": 5}, "32 groups do not divide 69 channels"),
    ],
)
def test_options_that_do_not_fit_together_say_so(options, message):
    with pytest.raises(ValueError, match=message):
        ODENet(**options)
