"""Continuous flows are densities: against closed forms, and by integration."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.distributions import Independent, MultivariateNormal, Uniform

from restpoint.models.flow import ContinuousFlow, ExactTrace, Hutchinson, HutchPlusPlus
from restpoint.solvers import SolverError
from restpoint.solvers.ode import RK4, CheckpointAdjoint, ConstantController, DirectAdjoint

EXACT = {"rtol": 1e-9, "atol": 1e-9}
DIVERGENCES = [ExactTrace(), Hutchinson(), HutchPlusPlus(rank=1)]


class Timed(nn.Module):
    def __init__(self, width=2):
        super().__init__()
        self.inner, self.outer = nn.Linear(width, 16), nn.Linear(16, width)

    def forward(self, t, y):
        return self.outer(torch.tanh(self.inner(y) + t.reshape(-1, *[1] * (y.ndim - 1))))


def points(batch=5, width=2):
    return torch.randn(batch, width, dtype=torch.float64)


def linear(width=2):
    return nn.Linear(width, width, bias=False).double()


def normal_of(matrix, time=1.0):
    """Where dy/dt = matrix y carries the standard normal density."""
    grown = torch.linalg.matrix_exp(time * matrix)
    return MultivariateNormal(grown.new_zeros(len(grown)), grown @ grown.T)


@pytest.mark.parametrize("t", [(0.0, 1.0), (2.0, 0.5)])
def test_a_linear_flow_of_a_normal_density_is_a_normal_density(t):
    field = linear()
    flow = ContinuousFlow(field, 2, t=t, **EXACT)
    x = points().requires_grad_()
    truth = normal_of(field.weight, t[1] - t[0])
    log_prob = flow.log_prob(x)
    torch.testing.assert_close(log_prob, truth.log_prob(x))
    ours = torch.autograd.grad(log_prob.sum(), (x, field.weight))
    theirs = torch.autograd.grad(truth.log_prob(x).sum(), (x, field.weight))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_samples_of_a_linear_flow_have_its_covariance():
    field = linear()
    flow = ContinuousFlow(field, 2)
    x = flow.sample(20_000)
    covariance = normal_of(field.weight.detach()).covariance_matrix
    assert x.dtype == torch.float64
    torch.testing.assert_close(x.detach().T.cov(), covariance, rtol=0.05, atol=0.05)
    (gradient,) = torch.autograd.grad(x.square().mean(), field.weight)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("t", [(0.0, 1.0), (1.0, -1.0)])
def test_a_density_integrates_to_one(t):
    flow = ContinuousFlow(Timed(), 2, t=t, rtol=1e-6, atol=1e-6).double()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.mul_(1.5)
        line = torch.linspace(-10, 10, 101, dtype=torch.float64)
        density = flow.log_prob(torch.cartesian_prod(line, line)).exp()
    total = float(density.sum() * (line[1] - line[0]) ** 2)
    assert total == pytest.approx(1, abs=2e-4)


def test_both_directions_undo_each_other_and_their_determinants():
    flow, x = ContinuousFlow(Timed(), 2, **EXACT).double(), points()
    z, down = flow(x)
    back, up = flow.inverse(z)
    torch.testing.assert_close(back, x, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(up, -down, rtol=1e-7, atol=1e-7)
    jacobian = torch.autograd.functional.jacobian(lambda row: flow(row.unsqueeze(0))[0][0], x[0])
    torch.testing.assert_close(down[0], torch.linalg.slogdet(jacobian)[1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("adjoint", [CheckpointAdjoint(), DirectAdjoint()])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_gradients_of_a_likelihood_are_those_of_finite_differences(divergence, adjoint):
    steps = {"solver": RK4(), "controller": ConstantController(dt=0.5)}
    flow = ContinuousFlow(Timed(), 2, divergence=divergence, adjoint=adjoint, **steps).double()
    names, tensors = zip(*flow.named_parameters(), strict=True)

    def likelihood(x, *parameters):
        torch.manual_seed(0)
        carried = torch.func.functional_call(
            _Method(flow, "transport"), {f"flow.{n}": p for n, p in zip(names, parameters, strict=True)}, (x,)
        )
        return carried.log_det + carried.kinetic + carried.jacobian, carried.value

    # Finite differences would move the subspace of Hutch++, which belongs to the noise.
    if isinstance(divergence, HutchPlusPlus):
        fixed = divergence.draw(lambda y: flow.field(torch.ones(()).double(), y), points(2))
        flow.divergence = _Fixed(fixed)
    inputs = (points(2).requires_grad_(), *tensors)
    assert torch.autograd.gradcheck(likelihood, inputs, atol=1e-6, fast_mode=True, check_undefined_grad=False)


class _Method(nn.Module):
    def __init__(self, flow, name):
        super().__init__()
        self.flow, self.name = flow, name

    def forward(self, x):
        return getattr(self.flow, self.name)(x, energies=True)


class _Fixed(HutchPlusPlus):
    def __init__(self, noise):
        super().__init__(rank=1)
        object.__setattr__(self, "kept", noise)

    def draw(self, f, y):
        return self.kept


@pytest.mark.parametrize("divergence", [Hutchinson(), Hutchinson("gaussian"), HutchPlusPlus(rank=1)], ids=str)
def test_noise_is_fixed_within_a_solve_and_drawn_anew_between(divergence):
    flow, x = ContinuousFlow(Timed(3), 3, divergence=divergence, rtol=1e-6, atol=1e-6).double(), points(width=3)
    first, second = flow.log_prob(x), flow.log_prob(x)
    assert not torch.allclose(first, second)
    # With noise that changed within the solve, the checkpointed replay would meet other values and say so.
    first.sum().backward()
    torch.manual_seed(1)
    once = flow.log_prob(x)
    torch.manual_seed(1)
    assert once.equal(flow.log_prob(x))


def test_estimated_densities_agree_with_exact_ones_in_the_mean():
    exact = ContinuousFlow(Timed(3), 3).double()
    flow = copy.deepcopy(exact)
    flow.divergence = Hutchinson()
    x = points(1, 3)
    found = flow.log_prob(x.expand(4000, -1))
    assert abs(found.mean() - exact.log_prob(x)) < 4 * found.std() / 4000**0.5 + 1e-5


def test_energies_are_integrals_along_the_way():
    field = linear()
    x = points()
    for t in ((0.0, 1.0), (1.0, 0.0)):
        carried = ContinuousFlow(field, 2, t=t, **EXACT).transport(x, energies=True)
        torch.testing.assert_close(carried.jacobian, field.weight.square().sum().expand(5))
        times = torch.linspace(0, 1, 2001, dtype=torch.float64)
        sign = 1.0 if t[1] < t[0] else -1.0
        grown = torch.linalg.matrix_exp(sign * times.view(-1, 1, 1) * field.weight)
        speeds = (x @ (field.weight @ grown).mT).square().sum(2)
        torch.testing.assert_close(carried.kinetic, torch.trapezoid(speeds, times, dim=0), rtol=1e-5, atol=1e-6)
    assert ContinuousFlow(field, 2).transport(x).kinetic is None


def test_the_density_takes_no_part_in_the_choice_of_steps():
    # Nothing moves but the density, and fast.
    class Still(ExactTrace):
        def __call__(self, f, y, noise):
            found = super().__call__(f, y, noise)
            return found._replace(divergence=1e4 * y[:, 0].sin() + found.divergence)

    field, x = Timed().double(), points()
    plain = ContinuousFlow(field, 2, **EXACT).transport(x)
    loaded = ContinuousFlow(field, 2, divergence=Still(), **EXACT).transport(x)
    assert loaded.solution.stats.steps.equal(plain.solution.stats.steps)
    assert loaded.value.equal(plain.value)


def test_another_base():
    base = Independent(Uniform(torch.zeros(2).double(), torch.ones(2).double(), validate_args=False), 1)
    flow = ContinuousFlow(lambda y: y, 2, base=base, **EXACT)
    inside = torch.full((1, 2), 1.0, dtype=torch.float64)
    torch.testing.assert_close(flow.log_prob(inside), torch.tensor([-2.0], dtype=torch.float64))
    assert flow.log_prob(3 * inside).item() == -math.inf
    x = flow.sample(50)
    assert (x >= 0).all()
    assert (x <= math.e).all()
    with pytest.raises(ValueError, match=r"event shape \(3,\) and no batch shape; got event \(2,\)"):
        ContinuousFlow(nn.Tanh(), 3, base=base)


def test_images_flow_too():
    flow = ContinuousFlow(nn.Conv2d(1, 1, 3, padding=1), (1, 4, 4), divergence=HutchPlusPlus(rank=16))
    x = flow.sample(3)
    assert x.shape == (3, 1, 4, 4)
    exact = copy.deepcopy(flow)
    exact.divergence = ExactTrace()
    torch.testing.assert_close(flow.log_prob(x), exact.log_prob(x), rtol=1e-4, atol=1e-4)


def test_arguments_of_the_field_are_given_to_a_call():
    flow = ContinuousFlow(lambda t, y, rate: rate * y, 2, **EXACT)
    x, rate = points(3), torch.tensor([[0.1], [0.2], [0.3]], dtype=torch.float64)
    z, log_det = flow(x, args=(rate,))
    torch.testing.assert_close(z, x * (-rate).exp())
    torch.testing.assert_close(log_det, -2 * rate[:, 0])


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "state_dict"])
def test_copies_compute_the_same(way):
    flow, x = ContinuousFlow(Timed(), 2, divergence=Hutchinson()).double(), points()
    if way == "deepcopy":
        twin = copy.deepcopy(flow)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(flow))  # noqa: S301 - it is our own
    else:
        twin = ContinuousFlow(Timed(), 2, divergence=Hutchinson()).double()
        twin.load_state_dict(flow.state_dict())
    torch.manual_seed(1)
    ours = flow.log_prob(x)
    torch.manual_seed(1)
    assert ours.equal(twin.log_prob(x))
    assert twin.float().sample(2).dtype == torch.float32


def test_inference_mode_gives_the_same_density():
    flow, x = ContinuousFlow(Timed(), 2).double(), points()
    with torch.inference_mode():
        found, drawn = flow.log_prob(x), flow.sample(3)
    torch.testing.assert_close(found, flow.log_prob(x).detach(), rtol=0, atol=0)
    assert drawn.shape == (3, 2)


def test_the_score_inside_a_transform():
    flow, x = ContinuousFlow(linear(), 2, **EXACT), points()
    score = torch.func.grad(lambda x: flow.log_prob(x).sum())(x)
    covariance = normal_of(flow.field.weight.detach()).covariance_matrix
    torch.testing.assert_close(score.detach(), -x @ covariance.inverse(), rtol=1e-6, atol=1e-7)


def test_wrong_use_says_so():
    flow = ContinuousFlow(nn.Tanh(), 2)
    with pytest.raises(ValueError, match=r"expected points \(batch, \*\(2,\)\), got \(4, 3\)"):
        flow.transport(torch.randn(4, 3))
    with pytest.raises(ValueError, match="at least 1 everywhere; got 0"):
        ContinuousFlow(nn.Tanh(), 0)
    with pytest.raises(ValueError, match="another one, the data's"):
        ContinuousFlow(nn.Tanh(), 2, t=(1.0, 1.0))
    with pytest.raises(ValueError, match="ContinuousFlow: the field's root, Dropout,"):
        ContinuousFlow(nn.Dropout(), 2)
    with pytest.raises(SolverError):
        flow.log_prob(torch.tensor([[0.0, math.nan]]))
    assert "divergence=ExactTrace()" in repr(flow)
