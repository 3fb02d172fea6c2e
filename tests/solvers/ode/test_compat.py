"""The interface of torchdiffeq, call by call beside torchdiffeq itself: values, options, callbacks, failures."""

import math
import subprocess
import sys
import warnings

import pytest
import torch
import torchdiffeq

from restpoint.solvers.ode import compat

FIXED = ["euler", "midpoint", "heun2", "heun3", "rk4"]
ADAPTIVE = ["dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun"]
FOREIGN = ["explicit_adams", "implicit_adams", "fixed_adams", "scipy_solver"]
FORWARD = torch.linspace(0.2, 2, 7, dtype=torch.float64)
TIMES = [FORWARD, FORWARD.flip(0)]


def rotation(t, y):
    return torch.stack([y[..., 1] * torch.cos(t), -y[..., 0]], -1)


def start():
    return torch.tensor([[1.0, 0.5], [0.3, -0.2], [0.0, 0.0]], dtype=torch.float64)


class Recorder:
    """A field that remembers what its callbacks were told."""

    def __init__(self, field=rotation):
        self.field, self.log = field, []

    def __call__(self, t, y):
        return self.field(t, y)

    def callback_step(self, t, y, dt):
        self.log.append(("step", t.item(), dt.item()))

    def callback_accept_step(self, t, y, dt):
        self.log.append(("accept", t.item(), dt.item()))

    def callback_reject_step(self, t, y, dt):
        self.log.append(("reject", t.item(), dt.item()))


def answer(library, *args, adjoint=False, **kwargs):
    """What a call gives: a value, or the type of its exception; and its warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            value = (library.odeint_adjoint if adjoint else library.odeint)(*args, **kwargs)
        except Exception as error:
            value = type(error)
    return value, [str(warning.message) for warning in caught]


def assert_same(*args, rtol=1e-6, atol=1e-6, **kwargs):
    """Both libraries give the same value with the same warnings."""
    expected, said = answer(torchdiffeq, *args, **kwargs)
    got, told = answer(compat, *args, **kwargs)
    if not isinstance(expected, type):
        torch.testing.assert_close(got, expected, rtol=rtol, atol=atol)
    else:
        assert got is expected
    assert told == said
    return got


@pytest.mark.parametrize("t", TIMES, ids=["forward", "backward"])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_adaptive_methods(method, t):
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if method in ("fehlberg2", "adaptive_heun") else {}
    got = compat.odeint(rotation, start(), t, method=method, **tolerance)
    reference = torchdiffeq.odeint(rotation, start(), t, rtol=1e-11, atol=1e-12)
    theirs = torchdiffeq.odeint(rotation, start(), t, method=method, **tolerance)
    error, their_error = ((x - reference).abs().max() for x in (got, theirs))
    assert error < 2 * their_error


@pytest.mark.parametrize("t", TIMES, ids=["forward", "backward"])
def test_dopri5_takes_the_same_steps(t):
    ours, theirs = Recorder(), Recorder()
    got = compat.odeint(ours, start(), t)
    expected = torchdiffeq.odeint(theirs, start(), t)
    assert [kind for kind, *_ in ours.log] == [kind for kind, *_ in theirs.log]
    for (_, *times), (_, *their_times) in zip(ours.log[:-1], theirs.log[:-1]):
        assert times[0] == pytest.approx(their_times[0], rel=1e-6)
    torch.testing.assert_close(got[:-1], expected[:-1], rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"step_size": 0.1},
        {"step_size": 0.13, "interp": "cubic"},
        {"step_size": 0.13, "perturb": True},
        {"grid_constructor": lambda func, y0, t: torch.linspace(t[0].item(), t[-1].item(), 23, dtype=t.dtype)},
    ],
    ids=["outputs", "size", "cubic", "perturb", "grid"],
)
@pytest.mark.parametrize("method", FIXED)
def test_fixed_steps_agree_to_rounding(method, options, dtype):
    slack = 1e-13 if dtype == torch.float64 else 2e-5
    for t in TIMES:
        assert_same(rotation, start().to(dtype), t.to(dtype), method=method, options=options, rtol=slack, atol=slack)


@pytest.mark.filterwarnings("ignore:Functional iteration did not converge")
@pytest.mark.parametrize("method", FOREIGN)
def test_methods_without_a_counterpart_are_torchdiffeqs(method):
    got = compat.odeint(rotation, start(), FORWARD, method=method)
    torch.testing.assert_close(got, torchdiffeq.odeint(rotation, start(), FORWARD, method=method), rtol=0, atol=0)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
@pytest.mark.parametrize(
    "state",
    [
        torch.tensor(1.0),
        torch.tensor(1.0, dtype=torch.float64),
        torch.ones(3),
        torch.ones(2, 3, 4, dtype=torch.float64),
        torch.tensor([1 + 2j, 0.5j], dtype=torch.complex128),
        torch.tensor([[1 + 2j]], dtype=torch.complex64),
    ],
    ids=lambda state: f"{state.dtype}{tuple(state.shape)}",
)
def test_states_of_any_shape(method, state):
    fields = [lambda t, y: -y * t, lambda t, y: y * 1j] if state.is_complex() else [lambda t, y: -y * t]
    for field in fields:
        got = assert_same(field, state, FORWARD, method=method, rtol=1e-5, atol=1e-5)
        assert got.dtype == state.dtype


@pytest.mark.parametrize("method", ["dopri5", "heun3", "euler"])
def test_tuples(method):
    def field(t, state):
        y, scalar, matrix = state
        return y.sin() * t, scalar * 0 + y.sum(), -matrix

    state = (torch.ones(3), torch.tensor(0.5), torch.ones(2, 2))
    got = assert_same(field, state, FORWARD.float(), method=method, rtol=1e-4, atol=1e-4)
    assert [x.shape for x in got] == [(7, 3), (7,), (7, 2, 2)]
    mixed = (torch.ones(3, dtype=torch.float64), torch.tensor(0.5), torch.ones(2, 2))
    assert_same(field, mixed, FORWARD, method=method, rtol=1e-5, atol=1e-5)


def test_fields_that_broadcast_or_change_the_dtype():
    for method in ("dopri5", "rk4"):
        assert_same(lambda t, y: torch.tensor(2.0), torch.ones(3, dtype=torch.float64), FORWARD, method=method)
        assert_same(lambda t, y: torch.ones(4), torch.ones(3), FORWARD, method=method)
    assert_same(lambda t, y: -y.double(), torch.ones(3), FORWARD)
    assert_same(lambda t, y: t * torch.ones(3, 2), torch.ones(3, 2), FORWARD)
    assert_same(lambda t, y: [-y[0], -y[1].T], (torch.ones(3), torch.ones(1, 2)), FORWARD)


def test_the_time_that_a_field_sees():
    seen = []

    def field(t, y):
        seen.append(t)
        return -y

    for method in ("dopri5", "rk4"):
        compat.odeint(field, torch.ones(2), FORWARD, method=method)
    assert all(t.shape == () and t.dtype == torch.float32 for t in seen)
    assert max(seen) <= 2.0 + 1e-6 and min(seen) >= 0.2


@pytest.mark.parametrize("state", [torch.ones(2, 3), (torch.ones(3), torch.zeros(2))], ids=["tensor", "tuple"])
def test_tolerances_as_tensors(state):
    def field(t, y):
        return -y if isinstance(y, torch.Tensor) else (-y[0], y[0][:2])

    pairs = [(torch.tensor(1e-5), torch.tensor(1e-6))]
    if isinstance(state, tuple):
        pairs += [((1e-5, 1e-3), (1e-6, torch.full((2,), 1e-4))), (1e-5, (1e-6, 1e-3))]
    else:
        pairs += [(torch.full((2, 3), 1e-5), torch.tensor([1e-6, 1e-3, 1.0])), (1e-4, torch.full((2, 1), 1e-5))]
    for rtol, atol in pairs:
        counts = []
        for library in (torchdiffeq, compat):
            recorder = Recorder(field)
            library.odeint(recorder, state, FORWARD, rtol=rtol, atol=atol)
            counts.append([kind for kind, *_ in recorder.log])
        # The last step is cut short here where torchdiffeq goes on, and so may not be rejected.
        assert counts[1][:-2] == counts[0][: len(counts[1]) - 2]


OPTIONS = [
    {"first_step": 0.3},
    {"first_step": torch.tensor(0.02), "max_step": 0.05},
    {"min_step": 0.2},
    {"safety": 0.5, "ifactor": 2.0, "dfactor": 0.8},
    {"step_t": torch.tensor([0.7, 1.1, 5.0, -1.0])},
    {"step_t": torch.tensor([0.7], dtype=torch.float64), "jump_t": torch.tensor([0.9, 1.3], dtype=torch.float64)},
    {"norm": lambda y: y.abs().max()},
    {"norm": lambda y: 1e-3 * y.pow(2).mean().sqrt()},
    {"dtype": torch.float32},
    {"max_num_steps": 100},
]


@pytest.mark.parametrize("t", TIMES, ids=["forward", "backward"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options))
def test_options_of_adaptive_methods(options, t):
    logs, values = [], []
    for library in (compat, torchdiffeq):
        recorder = Recorder()
        values.append(
            library.odeint(recorder, start(), t, rtol=1e-5, atol=1e-6, method="dopri5", options=dict(options))
        )
        logs.append(recorder.log)
    torch.testing.assert_close(*values, rtol=1e-3, atol=1e-3)
    # The last step is cut short here where torchdiffeq goes on, and so may not be rejected.
    for (kind, *ours), (their_kind, *theirs) in zip(logs[0][:-3], logs[1]):
        assert kind == their_kind
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    assert len(logs[1]) - 2 <= len(logs[0]) <= len(logs[1])


@pytest.mark.parametrize("norm", [None, lambda parts: max(part.abs().max() for part in parts)], ids=["mixed", "own"])
def test_norms_of_tuples(norm):
    def field(t, state):
        return torch.sin(3 * state[0]), state[0].sum() * torch.cos(7 * t) + torch.zeros(4, dtype=torch.float64)

    counts = []
    for library in (torchdiffeq, compat):
        recorder = Recorder(field)
        options = {} if norm is None else {"norm": norm}
        state = (torch.ones(30, dtype=torch.float64), torch.zeros(4, dtype=torch.float64))
        library.odeint(recorder, state, FORWARD, rtol=1e-5, method="dopri5", options=options)
        counts.append([kind for kind, *_ in recorder.log])
    assert counts[1][:-2] == counts[0][: len(counts[1]) - 2]


@pytest.mark.parametrize("t", TIMES, ids=["forward", "backward"])
def test_a_jump_of_the_field(t):
    def field(t, y):
        return -y if t < 1 else y + 3

    def rejections(library, options):
        recorder = Recorder(field)
        library.odeint(recorder, torch.ones(2, dtype=torch.float64), t, method="dopri5", options=options)
        return sum(kind == "reject" for kind, *_ in recorder.log)

    told = {"jump_t": torch.tensor([1.0], dtype=torch.float64)}
    assert rejections(compat, told) <= rejections(torchdiffeq, told) < rejections(compat, None) - 5
    assert_same(field, torch.ones(2, dtype=torch.float64), t, method="dopri5", options=told)


def test_callbacks_see_the_state():
    class Field:
        def __call__(self, t, state):
            return -state[0], state[1] * 0

        def callback_step(self, t, state, dt):
            assert [x.shape for x in state] == [(2, 3), ()]
            assert t.shape == dt.shape == () and dt > 0

    compat.odeint(Field(), (torch.ones(2, 3), torch.tensor(1.0)), FORWARD.flip(0))
    compat.odeint(Field(), (torch.ones(2, 3), torch.tensor(1.0)), FORWARD.flip(0), method="euler")


def test_callbacks_of_fixed_steps():
    logs = []
    for library in (compat, torchdiffeq):
        recorder = Recorder()
        with pytest.warns(UserWarning, match="Solver 'rk4' does not support callbacks"):
            library.odeint(recorder, start(), FORWARD.flip(0), method="rk4", options={"step_size": 0.4})
        logs.append(recorder.log)
    assert [kind for kind, *_ in logs[0]] == [kind for kind, *_ in logs[1]] == ["step"] * 5
    for (_, *ours), (_, *theirs) in zip(*logs):
        assert ours == pytest.approx(theirs)


def test_unknown_options_warn():
    assert_same(rotation, start(), FORWARD, method="dopri5", options={"step_size": 0.1, "nonsense": 3})
    for method in ("bosh3", "fehlberg2", "adaptive_heun", "dopri8", *FIXED):
        _, told = answer(compat, rotation, start(), FORWARD, rtol=1e-3, atol=1e-3, method=method, options={"odd": 1})
        _, said = answer(
            torchdiffeq, rotation, start(), FORWARD, rtol=1e-3, atol=1e-3, method=method, options={"odd": 1}
        )
        assert told == said and len(told) == 1


class Growth(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.rate = torch.nn.Parameter(torch.tensor(0.5))
        self.frozen = torch.nn.Parameter(torch.tensor(0.5), requires_grad=False)

    def forward(self, t, y):
        return self.rate * y


ONE = torch.ones(2)
BAD = {
    "list": (rotation, [start()], FORWARD, {}),
    "integer-times": (rotation, start(), torch.arange(3), {}),
    "two-dimensional-times": (rotation, start(), FORWARD[None], {}),
    "equal-times": (rotation, start(), torch.tensor([0.0, 0.0, 1.0]), {}),
    "turning-times": (rotation, start(), torch.tensor([0.0, 1.0, 0.5]), {}),
    "nan-times": (rotation, start(), torch.tensor([0.0, math.nan, 0.5]), {}),
    "method": (rotation, start(), FORWARD, {"method": "rk5"}),
    "differentiable-rtol": (rotation, start(), FORWARD, {"rtol": torch.tensor(1e-3, requires_grad=True)}),
    "differentiable-atol": (rotation, start(), FORWARD, {"atol": torch.tensor(1e-3, requires_grad=True)}),
    "tuple-of-tolerances": (lambda t, y: y, (ONE, ONE), FORWARD, {"rtol": (1e-3,)}),
    "two-grids": (
        rotation,
        start(),
        FORWARD,
        {"method": "rk4", "options": {"step_size": 0.1, "grid_constructor": lambda f, y, t: t}},
    ),
    "short-grid": (
        rotation,
        start(),
        FORWARD,
        {"method": "rk4", "options": {"grid_constructor": lambda f, y, t: t[:-1]}},
    ),
    "interpolation": (
        rotation,
        start(),
        FORWARD,
        {"method": "rk4", "options": {"interp": "quintic", "step_size": 0.2}},
    ),
    "twice-the-same-time": (
        rotation,
        start(),
        FORWARD,
        {"method": "dopri5", "options": {"step_t": torch.tensor([0.5]), "jump_t": torch.tensor([0.5])}},
    ),
    "budget": (rotation, start(), FORWARD, {"method": "dopri5", "options": {"max_num_steps": 2}}),
    "blow-up": (lambda t, y: y * y, torch.ones(2), torch.tensor([0.0, 2.0]), {}),
    "nan-field": (lambda t, y: y * math.nan, ONE, FORWARD, {}),
    "nan-later": (lambda t, y: torch.where(t < 1, y, math.nan), ONE, FORWARD, {}),
    "nan-start": (rotation, start() * math.nan, FORWARD, {}),
    "event-times": (rotation, start(), FORWARD, {"event_fn": lambda t, y: t - 1}),
    "event-needs-step-size": (rotation, start(), FORWARD[:2], {"event_fn": lambda t, y: t - 1, "method": "rk4"}),
    "no-module": (rotation, start(), FORWARD, {"adjoint": True}),
    "adjoint-options": (
        Growth(),
        ONE,
        FORWARD,
        {"adjoint": True, "method": "dopri5", "options": {"max_step": 0.3}, "adjoint_method": "rk4"},
    ),
    "adjoint-method": (Growth(), ONE, FORWARD, {"adjoint": True, "method": "odd"}),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_calls_fail_in_the_same_way(name):
    *args, kwargs = BAD[name]
    expected, _ = answer(torchdiffeq, *args, **kwargs)
    assert isinstance(expected, type)
    got, _ = answer(compat, *args, **kwargs)
    assert got is expected


def test_messages():
    with pytest.raises(
        ValueError, match='Invalid method "rk5". Must be one of {"dopri8", "dopri5", .*"scipy_solver"}.'
    ):
        compat.odeint(rotation, start(), FORWARD, method="rk5")
    with pytest.raises(AssertionError, match=r"underflow in dt .* t = 1.0000.* Loosen rtol"):
        compat.odeint(lambda t, y: y * y, torch.ones(2, dtype=torch.float64), torch.tensor([0.0, 2.0]))
    with pytest.raises(AssertionError, match=r"underflow in dt .*The field is NaN or infinite there"):
        compat.odeint(lambda t, y: y * math.nan, ONE, FORWARD)
    with pytest.raises(AssertionError, match=r"max_num_steps exceeded \(2>=2\) at t = "):
        compat.odeint(rotation, start(), FORWARD, method="dopri5", options={"max_num_steps": 2})
    with pytest.raises(RuntimeError, match="Reached maximum number of iterations 20000"):
        compat.odeint(
            lambda t, y: y * 0, ONE, FORWARD[:2], method="euler", options={"step_size": 0.1}, event_fn=lambda t, y: y[0]
        )


def test_a_parameter_without_gradient_under_an_own_norm_warns():
    norm = {"norm": lambda parts: max(part.abs().max() for part in parts)}
    assert_same(Growth(), ONE, FORWARD, adjoint=True, method="dopri5", adjoint_options=norm)


def test_a_nan_that_a_shorter_step_avoids():
    def field(t, y):
        return -torch.sqrt(y)

    def root(t):
        return (1 - t / 2) ** 2

    t = torch.tensor([0.0, 1.9], dtype=torch.float64)
    got = compat.odeint(field, torch.ones(1, dtype=torch.float64), t, method="dopri5", options={"first_step": 5.0})
    torch.testing.assert_close(got[-1], root(t[-1:]), rtol=1e-6, atol=1e-7)


def test_one_time_is_the_initial_value():
    assert_same(rotation, start(), FORWARD[:1])
    assert_same(rotation, start(), FORWARD[:1], method="rk4")


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"method": "bosh3", "rtol": 1e-6, "atol": 1e-8, "options": {"max_step": 0.01}},
        {"method": "rk4", "options": {"step_size": 0.01}, "atol": 1e-9},
        {"method": "rk4", "options": {"step_size": 0.01, "interp": "cubic"}, "atol": 1e-9},
        {"method": "dopri5", "options": {"max_step": 0.1}},
    ],
    ids=["dopri5", "bosh3", "rk4", "cubic", "max-step"],
)
def test_events(kwargs, reverse):
    def fall(t, state):
        speed = state[1]
        return speed, torch.full_like(speed, -9.8)

    def ground(t, state):
        return torch.stack([state[0] + 1, state[0] - 50 + t])

    t = torch.tensor([0.5, 0.3 if reverse else 0.7], dtype=torch.float64)
    state = (torch.tensor([4.0], dtype=torch.float64), torch.tensor([2.0], dtype=torch.float64))
    expected = torchdiffeq.odeint(fall, state, t, event_fn=ground, **kwargs)
    got = compat.odeint(fall, state, t, event_fn=ground, **kwargs)
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=1e-4)
    assert got[0].dtype == torch.float64 and got[1][0].shape == (2, 1)


def test_an_event_at_the_start():
    t = torch.tensor([0.5, 1.0])
    assert_same(lambda t, y: -y, ONE, t, event_fn=lambda t, y: t - 0.5)


def test_nothing_but_a_call_imports_torchdiffeq():
    code = (
        "import sys; import restpoint.solvers; import restpoint.solvers.ode.compat as c; import torch;"
        "c.odeint(lambda t, y: -y, torch.ones(2), torch.tensor([0., 1.]));"
        "assert 'torchdiffeq' not in sys.modules and 'scipy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
