"""The neural ODE layer solves the problem it says, has its gradients, and survives what modules go through."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from restpoint.models import VariationalDropout
from restpoint.models.ode import NeuralODE
from restpoint.solvers import SolverError, StateError
from restpoint.solvers.ode import (
    RK4,
    CheckpointAdjoint,
    ConstantController,
    DirectAdjoint,
    Dopri5,
    Euler,
    PIDController,
    TimeError,
)

EXACT = {"rtol": 1e-10, "atol": 1e-10}


class Timed(nn.Module):
    """W tanh(V y + t), with dropout between if asked for."""

    def __init__(self, width=3, dropout=0.0):
        super().__init__()
        self.inner, self.outer = nn.Linear(width, 8), nn.Linear(8, width)
        self.drop = VariationalDropout(dropout)

    def forward(self, t, y):
        time = t.reshape(-1, *[1] * (y.ndim - 1))
        return self.outer(self.drop(torch.tanh(self.inner(y) + time)))


def inputs(batch=4, width=3):
    return torch.randn(batch, width, dtype=torch.float64)


def gradients(layer, x):
    """The value and the gradients of input and parameters of one pass."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    value = layer(x)
    (value**3).sum().backward()
    return [value.detach(), x.grad, *[p.grad.clone() for p in layer.parameters() if p.requires_grad]]


def assert_equal(ours, theirs, rtol=1e-7):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-8)


def test_a_linear_field_gives_the_matrix_exponential_forwards_and_backwards_in_time():
    linear = nn.Linear(3, 3, bias=False).double()
    x = inputs()
    there = NeuralODE(linear, t=(0.5, 2.0), **EXACT)(x)
    torch.testing.assert_close(there, x @ torch.linalg.matrix_exp(1.5 * linear.weight).T)
    torch.testing.assert_close(NeuralODE(linear, t=(2.0, 0.5), **EXACT)(there), x)


@pytest.mark.parametrize(
    "field",
    [nn.Tanh(), lambda y: y.tanh(), lambda t, y: y.tanh(), torch.tanh, lambda *both: both[1].tanh(), nn.Tanh().forward],
    ids=["module", "function of y", "function of t and y", "builtin", "star", "method"],
)
def test_a_field_may_or_may_not_take_the_time(field):
    x = inputs()
    # sinh y grows by the factor exp(t).
    expected = (x.sinh() * math.e).asinh()
    torch.testing.assert_close(NeuralODE(field, **EXACT)(x), expected)


def test_a_field_that_depends_on_time_gets_it_and_further_arguments():
    layer = NeuralODE(lambda t, y, rate: 2 * t * rate, **EXACT)
    x, rate = inputs(), inputs()
    torch.testing.assert_close(layer(x, args=(rate,)), x + rate)
    autonomous = NeuralODE(lambda y, rate=None: rate, **EXACT)
    torch.testing.assert_close(autonomous(x, args=(rate,)), x + rate)


def test_given_times_return_every_state():
    layer, x = NeuralODE(nn.Tanh(), **EXACT), inputs()
    times = torch.tensor([0.0, 0.4, 1.0, 1.5], dtype=torch.float64)
    values = layer(x, times)
    assert values.shape == (4, *x.shape)
    for time, value in zip(times, values, strict=True):
        torch.testing.assert_close(value, (x.sinh() * time.exp()).asinh(), rtol=1e-6, atol=1e-7)
    assert layer.solve(x).value.shape == (2, *x.shape)
    own = torch.stack([times, times / 2, times / 4, times / 8])
    ends = layer(x, own)[-1]
    torch.testing.assert_close(ends, (x.sinh() * own[:, -1:].exp()).asinh())


def test_a_structured_state_comes_back_as_it_was():
    layer = NeuralODE(lambda t, y: {"a": -y["a"], "b": (y["b"][0] * 0,)}, **EXACT)
    state = {"a": inputs(), "b": (inputs(width=2),)}
    end = layer(state)
    torch.testing.assert_close(end["a"], state["a"] / math.e)
    torch.testing.assert_close(end["b"][0], state["b"][0])


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("adjoint", [CheckpointAdjoint(), DirectAdjoint()])
def test_gradients_are_those_of_finite_differences(adjoint, per_sample):
    layer = NeuralODE(
        Timed().double(), adjoint=adjoint, controller=PIDController(per_sample=per_sample), rtol=1e-9, atol=1e-9
    )
    names, tensors = zip(*layer.named_parameters(), strict=True)

    def end(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(end, (inputs(2).requires_grad_(), *tensors), atol=1e-5, rtol=1e-4, fast_mode=True)


def test_augmentation_appends_channels_of_zeros():
    seen = []

    def field(t, y):
        seen.append(y)
        return torch.ones_like(y)

    x = torch.randn(2, 3, 4, 4)
    end = NeuralODE(field, augment=2)(x)
    assert end.shape == (2, 5, 4, 4)
    assert seen[0][:, :3].equal(x)
    assert not seen[0][:, 3:].any()
    torch.testing.assert_close(end, torch.cat([x, torch.zeros(2, 2, 4, 4)], 1) + 1)
    with pytest.raises(ValueError, match=r"one tensor \(batch, channels"):
        NeuralODE(field, augment=2)((x, x))


def test_augmented_trajectories_can_cross():
    # x -> -x is no flow of the line, and is one of the plane: half a turn.
    turn = torch.tensor([[0.0, -math.pi], [math.pi, 0.0]], dtype=torch.float64)
    x = inputs(width=1)
    end = NeuralODE(lambda y: y @ turn, augment=1, **EXACT)(x)
    torch.testing.assert_close(end[:, :1], -x)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "state_dict", "torch.save"])
def test_copies_compute_the_same(way):
    layer, x = NeuralODE(Timed(dropout=0.3), solver=Dopri5(), augment=1 - 1).double(), inputs()
    layer.field.inner.bias.requires_grad_(False)
    gradients(layer, x)
    if way == "deepcopy":
        twin = copy.deepcopy(layer)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(layer))  # noqa: S301 - it is our own
    elif way == "torch.save":
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    else:
        twin = NeuralODE(Timed(dropout=0.3), solver=Dopri5()).double()
        twin.load_state_dict(layer.state_dict())
        twin.field.inner.bias.requires_grad_(False)
    assert list(twin.state_dict()) == [
        "field.inner.weight",
        "field.inner.bias",
        "field.outer.weight",
        "field.outer.bias",
    ]
    for mode in (True, False):
        torch.manual_seed(1)
        ours = gradients(layer.train(mode), x)
        torch.manual_seed(1)
        assert all(map(torch.equal, ours, gradients(twin.train(mode), x)))


def test_changes_of_type_keep_working():
    layer = NeuralODE(Timed(), augment=0)
    for dtype in (torch.float64, torch.float32):
        value = layer.to(dtype)(torch.randn(2, 3, dtype=dtype))
        assert value.dtype == dtype
        value.sum().backward()


def test_a_layer_keeps_nothing_and_may_be_used_twice_in_one_graph():
    layer, x = NeuralODE(Timed().double(), **EXACT), inputs()
    before = {key: id(value) for key, value in layer.__dict__.items()}
    twice = gradients(nn.Sequential(layer, layer), x)
    assert {key: id(value) for key, value in layer.__dict__.items()} == before
    once = copy.deepcopy(layer)
    once.t = (0.0, 1.0)
    direct = copy.deepcopy(layer)
    direct.adjoint = DirectAdjoint()
    assert_equal(twice, gradients(nn.Sequential(direct, direct), x))
    torch.testing.assert_close(twice[0], once(once(x)))


def test_dropout_holds_still_within_a_solve_and_changes_between():
    layer, x = NeuralODE(Timed(dropout=0.5).double()), inputs()
    direct = copy.deepcopy(layer)
    direct.adjoint = DirectAdjoint()
    found = []
    for module in (layer, direct, layer):
        torch.manual_seed(3 if module is direct or not found else 4)
        found.append(gradients(module, x))
    assert_equal(found[0], found[1])
    assert not torch.allclose(found[0][0], found[2][0])
    assert_equal(gradients(layer.eval(), x), gradients(direct.eval(), x))


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_normalised_weights_hold_still_within_a_solve(norm):
    field = Timed().double()
    norm(field.inner)
    layer, x = NeuralODE(field, **EXACT), inputs()
    direct = copy.deepcopy(layer)
    direct.adjoint = DirectAdjoint()
    assert_equal(gradients(layer, x), gradients(direct, x))


def test_statistics_say_how_the_solve_went():
    layer = NeuralODE(Timed(), solver=RK4(), controller=ConstantController(dt=0.25))
    solution = layer.solve(torch.randn(5, 3))
    assert solution.stats.steps.tolist() == [4] * 5
    assert solution.stats.evaluations.tolist() == [16] * 5
    assert solution.converged.all()
    assert "RK4()" in repr(layer)
    assert "augment" not in repr(layer)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Dropout(0.1), "draws a new mask at every evaluation; use restpoint.models.VariationalDropout"),
        (nn.BatchNorm1d(3), r"0, BatchNorm1d, mixes samples.*GroupNorm"),
    ],
)
def test_fields_that_do_not_hold_still_are_refused(module, message):
    with pytest.raises(ValueError, match=message):
        NeuralODE(nn.Sequential(module))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"t": (1.0, 1.0)}, "another time to end at"), ({"augment": -1}, "augment must be at least 0; got -1")],
)
def test_wrong_options_say_so(options, message):
    with pytest.raises(ValueError, match=message):
        NeuralODE(nn.Tanh(), **options)


def test_wrong_use_says_so():
    with pytest.raises(TypeError, match="takes no positional argument"):
        NeuralODE(lambda: None)
    with pytest.raises(TypeError):
        NeuralODE(3)
    with pytest.raises(StateError, match="derivative: expected shape"):
        NeuralODE(nn.Linear(3, 2))(torch.randn(2, 3))
    with pytest.raises(TimeError, match="are equal"):
        NeuralODE(nn.Tanh())(torch.randn(2, 3), (0.0, 1.0, 1.0))
    with pytest.raises(SolverError, match="Sample 1"):
        NeuralODE(nn.Tanh())(torch.tensor([[0.0], [math.nan]]))
    outside = NeuralODE(nn.Tanh(), throw=False)
    assert outside.solve(torch.tensor([[0.0], [math.nan]])).converged.tolist() == [True, False]
    with pytest.raises(NotImplementedError, match="set it to 0 in the inner one"):
        NeuralODE(nn.Sequential(VariationalDropout(0.1), NeuralODE(nn.Sequential(VariationalDropout(0.1)))))(inputs())


def test_one_step_of_euler_is_a_residual_block():
    field, x = Timed(), torch.randn(2, 3)
    layer = NeuralODE(field, solver=Euler(), controller=ConstantController(dt=1.0))
    torch.testing.assert_close(layer(x), x + field(torch.zeros(()), x))
