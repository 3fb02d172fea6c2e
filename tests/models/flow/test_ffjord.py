"""FFJORD, and what every registered density model offers."""

import pytest
import torch

from restpoint.models.flow import FFJORD, ConcatSquash, ConcatSquashField, ExactTrace, HutchPlusPlus, ffjord_tabular
from restpoint.solvers.ode import PIDController
from restpoint.train import evaluate_model
from restpoint.zoo import create_model, list_models, load_card


def test_a_concat_squash_layer_is_gated_and_shifted_by_time():
    layer = ConcatSquash(3, 2)
    x, t = torch.randn(4, 3), torch.tensor(0.7)
    gate = torch.sigmoid(0.7 * layer.gate.weight[:, 0] + layer.gate.bias)
    expected = (x @ layer.linear.weight.T + layer.linear.bias) * gate + 0.7 * layer.shift.weight[:, 0]
    torch.testing.assert_close(layer(t, x), expected)
    torch.testing.assert_close(layer(t.expand(4), x), expected)


def test_a_field_at_times_of_its_own_is_that_of_each_time():
    field, y, t = ConcatSquashField(2, (8, 8)), torch.randn(3, 2), torch.tensor([0.0, 0.5, 1.0])
    alone = torch.cat([field(s, row.unsqueeze(0)) for s, row in zip(t, y, strict=True)])
    torch.testing.assert_close(field(t, y), alone)


def test_steps_per_sample_give_the_same_density():
    flow = FFJORD(hidden=(8,), rtol=1e-8, atol=1e-8).double()
    own = FFJORD(hidden=(8,), rtol=1e-8, atol=1e-8, controller=PIDController(per_sample=True)).double()
    own.load_state_dict(flow.state_dict())
    x = torch.randn(4, 2, dtype=torch.float64) * torch.tensor([[0.1], [1.0], [3.0], [9.0]])
    torch.testing.assert_close(own.log_prob(x), flow.log_prob(x), rtol=1e-6, atol=1e-6)


def test_divergences_go_by_name():
    assert FFJORD().divergence == ExactTrace()
    assert FFJORD(divergence="hutch++").divergence == FFJORD(divergence=HutchPlusPlus()).divergence
    assert ffjord_tabular().divergence.noise == "rademacher"
    with pytest.raises(ValueError, match=r"one of 'exact', .*; got 'exakt'. Did you mean 'exact'"):
        FFJORD(divergence="exakt")


def test_matching_moves_the_base_to_the_data():
    flow = FFJORD(hidden=(16,), t=(0.0, 2.0))
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.02)
    generator = torch.Generator().manual_seed(0)
    data = torch.tensor([2.0, -1.0]) + 0.5 * torch.randn(4000, 2, generator=generator)
    before = float(-flow.log_prob(data[:500]).mean().detach())
    for step in range(150):
        optimizer.zero_grad()
        flow.matching_loss(data[step * 25 : step * 25 + 256]).mean().backward()
        optimizer.step()
    with torch.no_grad():
        after = float(-flow.log_prob(data[:500]).mean())
    entropy = 1 + torch.tensor(2 * torch.pi * 0.25).log().item()
    assert after < entropy + 0.25 < before
    torch.testing.assert_close(flow.sample(2000).mean(0).detach(), torch.tensor([2.0, -1.0]), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", [*list_models(task="density", pretrained=False), "test_image_flow", "image_flow_tiny"])
def test_every_density_model_has_a_log_density_and_samples(name):
    model = create_model(name)
    x = model.sample(3)
    assert len(x) == 3
    log_prob = model.log_prob(x.detach())
    assert log_prob.shape == (3,)
    assert log_prob.isfinite().all()
    log_prob.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


# Tables are no part of the package, and nobody knows their true density.
PLANE = [n for n in list_models(task="density", pretrained=True) if "divergence" in load_card(n).metrics]


@pytest.mark.parametrize("name", PLANE)
def test_a_shipped_flow_is_as_good_as_its_card_says(name):
    metrics = load_card(name).metrics
    measured = evaluate_model(name, limit=500)
    # The same points begin the test set; 500 of them say this much about all.
    assert measured["divergence"] == pytest.approx(metrics["divergence"], abs=5 * measured["divergence_error"])
    assert measured["true_nll"] == pytest.approx(metrics["true_nll"], abs=0.25)
    assert metrics["nll"] - metrics["true_nll"] == pytest.approx(metrics["divergence"], abs=1e-6)
