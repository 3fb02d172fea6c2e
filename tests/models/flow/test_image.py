"""Image flows: the way from pixels to the flow's space and its determinant, bits a dimension, samples, memory."""

import math

import pytest
import torch
from torch.distributions import AffineTransform, Independent, Normal, SigmoidTransform, TransformedDistribution, Uniform

from restpoint.models.flow import ImageField, ImageFlow
from restpoint.solvers.diagnose import peak_memory
from restpoint.solvers.ode import ConstantController, Midpoint, adjoint_checkpoint
from restpoint.zoo import create_model


@pytest.fixture
def flow():
    return create_model("test_image_flow").double()


def pixels(flow, n=3):
    return torch.randint(0, flow.levels, (n, *flow.shape), dtype=torch.uint8)


def awake(flow):
    """With weights that are not the zeros they begin with."""
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) / max(parameter[0].numel(), 1) ** 0.5)
    return flow


@pytest.mark.parametrize("margin", [0.0, 0.05])
def test_the_determinant_of_the_way_into_the_flows_space_is_that_of_autograd(margin):
    flow = create_model("test_image_flow", margin=margin, levels=17).double()
    values = pixels(flow, 2) + torch.rand(2, *flow.shape, dtype=torch.float64)
    x, log_det = flow.encode(values)
    torch.testing.assert_close(flow.decode(x), values)
    for k in range(2):
        jacobian = torch.autograd.functional.jacobian(lambda v: flow.encode(v)[0][0], values[k : k + 1])
        expected = torch.linalg.slogdet(jacobian.reshape(16, 16))[1]
        torch.testing.assert_close(log_det[k], expected)


def test_a_uniform_density_of_pixels_has_the_bits_of_its_levels(flow):
    """The base whose pixels are uniform, and a field that begins as zero: log2 of the levels, for any image."""
    flow = create_model("test_image_flow", levels=8, margin=0.0).double()
    zeros = torch.zeros(flow.shape, dtype=torch.float64)
    logistic = TransformedDistribution(
        Uniform(zeros, zeros + 1), [SigmoidTransform().inv, AffineTransform(0.0, 1 / flow.scale)]
    )
    flow.base = Independent(logistic, 3)
    with torch.no_grad():
        bits = flow.bits_per_dimension(flow.pixel_log_prob(pixels(flow)))
    torch.testing.assert_close(bits, torch.full((3,), 3.0, dtype=torch.float64), rtol=1e-9, atol=0)


def test_the_density_of_noisy_pixels_is_in_the_mean_the_probability_of_the_pixels():
    """One pixel, and a field of zeros, whose probabilities are differences of the normal distribution function."""
    flow = ImageFlow(shape=(1, 1, 1), levels=3, channels=(4,), groups=2, patch=1, divergence="exact").double()
    edges = flow.encode(torch.tensor([1.0, 2.0], dtype=torch.float64).view(2, 1, 1, 1))[0].flatten()
    inner = Normal(0.0, 1.0).cdf(edges)
    truth = torch.stack([inner[0], inner[1] - inner[0], 1 - inner[1]])
    images = torch.arange(3, dtype=torch.uint8).repeat_interleave(500).view(-1, 1, 1, 1)
    with torch.no_grad():
        log_p = flow.pixel_log_prob(images).view(3, -1)
    found, error = log_p.exp().mean(1), log_p.exp().std(1) / log_p.shape[1] ** 0.5
    assert ((found - truth).abs() < 4 * error).all()
    assert (log_p.mean(1) < truth.log() + 4 * log_p.std(1) / log_p.shape[1] ** 0.5).all()


def test_a_trained_field_has_a_density_that_its_samples_fit(flow):
    flow = awake(flow)
    torch.manual_seed(3)
    drawn = flow.sample_pixels(5)
    assert drawn.dtype == torch.uint8
    assert int(drawn.max()) < flow.levels
    torch.manual_seed(3)
    assert drawn.equal(flow.sample_pixels(5))
    exact = create_model("test_image_flow", divergence="exact").double()
    exact.load_state_dict(flow.state_dict())
    x = flow.sample(1).detach()
    with torch.no_grad():
        truth, found = float(exact.log_prob(x)), flow.log_prob(x.expand(200, -1, -1, -1))
    error = float(found.std()) / 200**0.5
    assert float(found.mean()) == pytest.approx(truth, abs=4 * error + 1e-3)


@pytest.mark.parametrize("channels", [(8,), (8, 8)])
def test_a_field_at_times_of_its_own_is_that_of_each_time(channels):
    field = awake(ImageField(1, channels, 1, 2, 4).double())
    y, t = torch.randn(3, 1, 8, 8, dtype=torch.float64), torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    alone = torch.cat([field(s, row.unsqueeze(0)) for s, row in zip(t, y, strict=True)])
    torch.testing.assert_close(field(t, y), alone)


def test_training_by_likelihood_takes_little_more_memory_for_more_steps(flow, monkeypatch):
    # Nothing is small enough to be kept whole.
    monkeypatch.setattr(adjoint_checkpoint, "_TAPED", 0)
    x = awake(flow).sample(1).detach()

    def peak(steps):
        flow.solver, flow.controller = Midpoint(), ConstantController(dt=1 / steps)

        def run():
            flow.log_prob(x).sum().backward()
            flow.zero_grad()

        run()
        return peak_memory(run)

    # The root of the number of steps, since some of the states between them are kept.
    assert peak(8) < 2 * peak(2)


def test_wrong_use_says_so(flow):
    with pytest.raises(ValueError, match=r"expected pixels \(batch, \*\(1, 4, 4\)\), got \(2, 1, 5, 5\)"):
        flow.dequantise(torch.zeros(2, 1, 5, 5, dtype=torch.uint8))
    with pytest.raises(ValueError, match="whole numbers from 0 to 3; got 0 to 4"):
        flow.dequantise(torch.arange(16, dtype=torch.uint8).view(1, 1, 4, 4).clamp(max=4))
    with pytest.raises(ValueError, match="both divisible by 4, a patch of 2 pixels halved 1 times"):
        ImageFlow(shape=(1, 30, 30))
    with pytest.raises(ValueError, match="8 groups do not divide"):
        ImageFlow(channels=(12, 16))
    with pytest.raises(ValueError, match="needs 2 levels and a margin"):
        ImageFlow(margin=0.5)
    with pytest.raises(ValueError, match="ImageFlow: divergence must be one of 'exact'"):
        ImageFlow(divergence="trace")
    many = create_model("test_image_flow", levels=1000)
    with pytest.raises(ValueError, match="more than 8 bits"):
        many.sample_pixels(1)
    bits = flow.bits_per_dimension(torch.tensor([-16 * math.log(2)], dtype=torch.float64))
    assert float(bits) == pytest.approx(1.0)
