"""What every registered model of series keeps."""

import copy

import pytest
import torch

from restpoint.models.registry import ARCHITECTURES
from restpoint.zoo import create_model, list_models, save_pretrained

NAMES = list_models(task="series-classification", pretrained=False)


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def model(name):
    return create_model(name, variables=3, statics=2, num_classes=4, span=2.0).eval()


@pytest.fixture
def batch():
    times = (2 * torch.rand(5, 7)).sort(1).values
    times = times - times[:, :1]
    observed = torch.rand(5, 7, 3) < 0.5
    return times, torch.randn(5, 7, 3) * observed, observed, torch.randn(5, 2)


def test_logits_of_classes_and_of_an_event(name, model, batch):
    assert model(*batch).shape == (5, 4)
    torch.testing.assert_close(model.double()(*(x.double() if x.is_floating_point() else x for x in batch)).float(),
                               model.float()(*batch), rtol=1e-3, atol=1e-3)  # fmt: skip
    assert create_model(name, variables=3, statics=2)(*batch).shape == (5,)


def test_every_parameter_learns(model, batch):
    logits = model(*batch)
    loss = logits.logsumexp(1).sum()
    if hasattr(model, "explain"):
        logits, bound = model.explain(*batch)
        loss = loss + logits.logsumexp(1).sum() - bound.sum()
    loss.backward()
    for key, p in model.named_parameters():
        assert p.grad is not None, key
        assert p.grad.isfinite().all(), key
        assert (p.grad != 0).any(), key


def test_series_do_not_touch_each_other(model, batch):
    with torch.no_grad():
        together = model(*batch)
        other = [x.clone() for x in batch]
        other[1][2], other[3][2] = 7.0, -7.0
        changed = model(*other)
    assert changed[[0, 1, 3, 4]].equal(together[[0, 1, 3, 4]])
    assert not changed[2].equal(together[2])


def test_a_series_without_any_observation_has_an_answer(model, batch):
    times, values, observed, static = batch
    with torch.no_grad():
        assert model(times, values, torch.zeros_like(observed), static).isfinite().all()
        assert model(times[:, :1], values[:, :1], observed[:, :1], static).isfinite().all()


def test_solver_and_adjoint_are_options(name):
    assert {"variables", "statics", "num_classes", "span", "solver", "controller", "adjoint", "rtol", "atol"} <= set(
        ARCHITECTURES[name].options
    )


def test_saved_and_loaded_it_is_the_same(model, batch, tmp_path):
    save_pretrained(model, tmp_path)
    again = create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    with torch.no_grad():
        assert again(*batch).equal(model(*batch))
        assert copy.deepcopy(model)(*batch).equal(model(*batch))
