"""The convolutional classifiers: the contract of image classifiers, and what is their own."""

import copy

import pytest
import torch

from restpoint.models.deq import BranchCell, ConvDEQ
from restpoint.models.registry import ARCHITECTURES, ImageClassifier
from restpoint.solvers import PhantomAdjoint, Picard, UnrollAdjoint

NAMES = [name for name in ARCHITECTURES if name.startswith("conv_deq")]


def small(**options):
    torch.manual_seed(0)
    return ConvDEQ(**{"channels": 8, "stem_channels": (8,), "stem_strides": (2,), "groups": 2, **options})


@pytest.mark.parametrize("name", NAMES)
def test_every_registered_model_keeps_the_contract(name):
    model = ARCHITECTURES[name](num_classes=7, in_chans=2)
    assert isinstance(model, ImageClassifier)
    images = torch.randn(3, 2, 12, 10)
    features = model.forward_features(images)
    assert features.shape[:2] == (3, model.num_features)
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (3, model.num_features)
    torch.testing.assert_close(model.get_classifier()(pooled), model.forward_head(features))
    logits = model(images)
    assert logits.shape == (3, 7)
    torch.testing.assert_close(logits, model.forward_head(features))
    logits.logsumexp(1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    for layer in model.input_layers:
        assert any(m.in_channels == 2 for m in model.get_submodule(layer).modules() if hasattr(m, "in_channels"))
    model.double().reset_classifier(4)
    assert model(images.double()).shape == (3, 4)
    model.reset_classifier(0)
    assert model(images.double()).shape == (3, model.num_features)
    assert model.num_classes == 0


def test_statistics_and_problem_belong_to_the_features():
    model, images = small(rtol=1e-5), torch.randn(3, 1, 8, 8)
    problem = model.problem(images)
    solution = model.solve_problem(problem)
    assert solution.converged.all()
    torch.testing.assert_close(solution.value, model.forward_features(images))
    torch.testing.assert_close(problem.f(solution.value, *problem.args), solution.value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu", "softplus"])
@pytest.mark.parametrize("skip", [0.0, 1.0])
def test_gradients_are_those_of_unrolling(activation, skip):
    options = {"activation": activation, "skip": skip, "rtol": 1e-10, "max_steps": 300, "solver": Picard()}
    model = small(**options).double()
    twin = copy.deepcopy(model)
    twin.deq.adjoint = UnrollAdjoint()
    images = torch.randn(2, 1, 6, 6, dtype=torch.float64)
    for each in (model, twin):
        assert each.solve(images).converged.all()
        each(images).square().sum().backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-7)


def test_the_cell_is_the_branch_block():
    cell = BranchCell(4, groups=2, expansion=3, skip=0.5, activation="relu").eval()
    z, x = torch.randn(2, 4, 5, 5), torch.randn(2, 4, 5, 5)
    hidden = torch.relu(cell.norm1(cell.conv1(z)))
    assert hidden.shape[1] == 12
    by_hand = cell.norm3(torch.relu(0.5 * z + cell.norm2(cell.conv2(hidden) + x)))
    torch.testing.assert_close(cell(z, x), by_hand)


def test_images_lie_in_one_ball():
    cell = BranchCell(8)
    norms = [cell(scale * torch.randn(1, 8, 6, 6), torch.randn(1, 8, 6, 6)).norm().item() for scale in (0.1, 1, 100)]
    assert max(norms) <= (8 * 36) ** 0.5 + 1e-3


def test_dropout_normalisation_and_supervision_reach_the_layer():
    model = small(dropout=0.5, norm="weight", supervise=2, adjoint=PhantomAdjoint(2), max_steps=8)
    images = torch.randn(3, 1, 8, 8)
    solution = model.solve(images)
    assert solution.trajectory.shape[0] == 2
    assert not torch.equal(model(images), model(images))
    model.eval()
    assert torch.equal(model(images), model(images))
    assert any("original0" in name for name, _ in model.named_parameters())


def test_options_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="activation must be one of"):
        ConvDEQ(activation="rely")
    with pytest.raises(ValueError, match="differ in length"):
        ConvDEQ(stem_channels=(8, 8), stem_strides=(2,))
    with pytest.raises(TypeError, match="Did you mean 'channels'"):
        ARCHITECTURES["conv_deq_tiny"](chanels=3)
