"""ODE-RNNs and latent ODEs: exact gradients, masks, times of each sample's own, and the bound on the evidence."""

import math

import pytest
import torch

from restpoint.models.series import ODERNN, LatentODE, ODERNNClassifier
from restpoint.solvers import ode
from restpoint.solvers.diagnose import peak_memory

NAN = float("nan")
FINE = {"solver": ode.RK4(), "controller": ode.ConstantController(dt=1 / 8)}


def series(batch=3, length=6, variables=2):
    times = (torch.arange(length) + 0.6 * torch.rand(batch, length, dtype=torch.float64)) / length
    values = torch.randn(batch, length, variables, dtype=torch.float64)
    return times, values, torch.rand(batch, length, variables) < 0.6


def small(**arguments):
    return LatentODE(**{"variables": 2, "latent": 3, "hidden": 4, "width": 5, "depth": 1, **arguments}).double()


@pytest.mark.parametrize("backwards", [False, True])
def test_a_batch_is_what_its_series_are_one_by_one(backwards):
    """The published algorithm, one series and one observation at a time, with an exact flow between them."""
    layer = ODERNN(2, 4, width=5, depth=1, span=2.0, **FINE).double()
    times, values, observed = series()
    found = layer(times, values, observed, backwards)
    for row in range(3):
        h = torch.zeros(1, 4, dtype=torch.float64)
        places = [i for i in range(6) if observed[row, i].any()]
        places = places[::-1] if backwards else places
        now = times[row, -1 if backwards else 0]
        for i in places:
            if times[row, i] != now:
                span = ((now / 2).item(), (times[row, i] / 2).item())
                h = ode.solve_ode(lambda t, y: layer.field(y), h, span, rtol=1e-9, atol=1e-11).value[-1]
            seen = observed[row, i].double()
            h = layer.unit(torch.cat([values[row, i] * seen, seen]).unsqueeze(0), h)
            now = times[row, i]
        end = times[row, 0 if backwards else -1]
        if end != now:
            span = ((now / 2).item(), (end / 2).item())
            h = ode.solve_ode(lambda t, y: layer.field(y), h, span, rtol=1e-9, atol=1e-11).value[-1]
        torch.testing.assert_close(found[row : row + 1], h, rtol=1e-6, atol=1e-8)


def test_gradients_are_exact():
    model = small(latent=2, hidden=3, width=3, solver=ode.RK4(), controller=ode.ConstantController(dt=0.5))
    times, values, observed = series(batch=2, length=3)

    def both(values, *parameters):
        torch.manual_seed(5)
        return model.explain(times, values, observed, kl_weight=0.7)

    # The parameters are changed in place, and need not be handed over.
    assert torch.autograd.gradcheck(both, (values.requires_grad_(), *model.parameters()))


@pytest.mark.parametrize("kind", [small, lambda: ODERNNClassifier(variables=2, hidden=4, width=5).double()])
def test_masked_values_and_other_series_have_no_influence(kind):
    model = kind()
    times, values, observed = series(batch=2)
    before = model(times, values, observed)
    for other in (1e6, NAN, math.inf):
        torch.manual_seed(3)
        assert model(times, values.masked_fill(~observed, other), observed).equal(before)
    # A series that has ended, beside one that goes on.
    longer = torch.cat([times, times[:, -1:] + torch.tensor([[0.0], [0.1]]).double()], 1)
    more = torch.cat([observed, torch.tensor([[[False] * 2], [[True] * 2]])], 1)
    values = torch.cat([values, torch.full((2, 1, 2), NAN, dtype=torch.float64)], 1)
    values[1, -1] = 1.0
    after = model(longer, values, more)
    torch.testing.assert_close(after[0], before[0], rtol=1e-12, atol=1e-12)
    assert after[1] != before[1]


def test_points_without_observation_change_nothing():
    model = small(encoder_solver=ode.RK4(), encoder_controller=ode.ConstantController(dt=1 / 8))
    times, values, observed = series()
    torch.manual_seed(1)
    logits, bound = model.explain(times, values, observed)
    middle = (times[:, 1:2] + times[:, 2:3]) / 2
    times = torch.cat([times[:, :2], middle, times[:, 2:]], 1)
    values = torch.cat([values[:, :2], torch.full_like(values[:, :1], NAN), values[:, 2:]], 1)
    observed = torch.cat([observed[:, :2], torch.zeros_like(observed[:, :1]), observed[:, 2:]], 1)
    torch.manual_seed(1)
    again, as_well = model.explain(times, values, observed)
    torch.testing.assert_close(again, logits, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(as_well, bound, rtol=1e-6, atol=1e-8)


def test_the_bound_is_the_likelihood_of_what_was_observed_less_the_divergence():
    model = small(noise=0.5)
    times, values, observed = series()
    mean, spread = model.posterior(times, values, observed)
    torch.manual_seed(7)
    _, bound = model.explain(times, values, observed)
    torch.manual_seed(7)
    posterior = torch.distributions.Normal(mean, spread)
    z0 = mean + spread * torch.randn_like(mean)
    means = model.decode(z0, times - times[:, :1])
    each = torch.distributions.Normal(means, 0.5).log_prob(values)
    divergence = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum(1)
    expected = torch.stack([each[i][observed[i]].sum() for i in range(3)]) - divergence
    torch.testing.assert_close(bound, expected / observed.sum((1, 2)))
    torch.manual_seed(7)
    _, likelihood = model.explain(times, values, observed, kl_weight=0.0)
    torch.testing.assert_close((likelihood - bound) * observed.sum((1, 2)), divergence)


def test_dense_output_is_the_trajectory_at_every_time_of_a_series():
    model = small(span=2.0, rtol=1e-8, atol=1e-10)
    z0 = torch.randn(2, 3, dtype=torch.float64)
    times = torch.tensor([[0.0, 0.3, 1.1, 2.0], [0.0, 0.0, 0.9, 1.7]], dtype=torch.float64)
    found = model.decode(z0, times)
    for row in range(2):
        for i, t in enumerate(times[row].tolist()):
            z = z0[row : row + 1]
            if t:
                z = ode.solve_ode(lambda s, y: model.field(y), z, (0.0, t / 2), rtol=1e-9, atol=1e-11).value[-1]
            torch.testing.assert_close(found[row, i], model.decoder(z)[0], rtol=1e-6, atol=1e-7)
    with pytest.raises(ode.TimeError, match="the solve reaches"):
        model.decode(z0, 1 + times)


def test_it_learns_oscillations_from_a_few_points():
    phase = torch.rand(16, 1) * 6.28
    times = torch.rand(16, 8).sort(1).values
    times = times - times[:, :1]
    values = torch.sin(6 * times + phase).unsqueeze(-1)
    observed = torch.rand(16, 8, 1) < 0.8
    model = LatentODE(variables=1, latent=4, hidden=10, width=16, depth=1, noise=0.2)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    bounds = []
    for _ in range(40):
        logits, bound = model.explain(times, values, observed, kl_weight=0.1)
        optimizer.zero_grad()
        (logits.square().mean() - bound.mean()).backward()
        optimizer.step()
        bounds.append(float(bound.detach().mean()))
    assert sum(bounds[-5:]) / 5 > bounds[0] / 3


def test_it_is_the_published_one():
    model = LatentODE(variables=41, statics=0)
    assert (model.latent, model.encoder.hidden, model.encoder.unit.input_size) == (20, 40, 82), "values beside masks"
    assert isinstance(model.encoder.solver, ode.Euler)
    assert isinstance(model.solver, ode.Dopri5)
    assert model.encoder.unit.hidden_size == 40


def test_steps_cost_no_memory():
    z0 = torch.randn(256, 20)
    peaks = []
    for steps in (8, 64):
        model = LatentODE(
            variables=2, adjoint=ode.CheckpointAdjoint(recursive=True), solver=ode.RK4(),
            controller=ode.ConstantController(dt=1 / steps),
        )  # fmt: skip
        flow = lambda: ode.solve_ode(  # noqa: E731
            model._rate, z0.requires_grad_(), (0.0, 1.0), solver=model.solver, controller=model.controller,  # noqa: B023
            adjoint=model.adjoint,  # noqa: B023
        ).value[-1].sum().backward()  # fmt: skip
        peaks.append(peak_memory(flow))
    assert peaks[1] < 1.5 * peaks[0]


def test_what_does_not_fit_is_refused():
    times, values, observed = series()
    with pytest.raises(ValueError, match="expected 3 variables; got 2"):
        small(variables=3)(times, values, observed)
    with pytest.raises(ValueError, match="expected 2 values a series"):
        small(statics=2)(times, values, observed)
    with pytest.raises(ValueError, match="noise and span must be positive"):
        small(noise=0.0)
