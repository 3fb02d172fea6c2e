"""Derivatives of the interface of torchdiffeq, beside torchdiffeq's own and finite differences."""

import pytest
import torch
import torchdiffeq

from restpoint.solvers import AdjointWarning
from restpoint.solvers.ode import compat

F64 = torch.float64
TIMES = torch.tensor([0.1, 0.4, 0.9, 1.5], dtype=F64)


class Net(torch.nn.Module):
    def __init__(self, dtype=F64):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.first = torch.nn.Parameter(torch.randn(3, 5, dtype=dtype, generator=generator))
        self.second = torch.nn.Parameter(torch.randn(5, 3, dtype=dtype, generator=generator) / 2)
        self.evaluations = 0

    def forward(self, t, y):
        self.evaluations += 1
        return torch.tanh(y @ self.first + t) @ self.second - y


class Pair(torch.nn.Module):
    """A field on tuples."""

    def __init__(self):
        super().__init__()
        self.net = Net()

    def forward(self, t, state):
        y, total = state
        speed = self.net(t, y)
        return speed, speed.pow(2).sum() + 0 * total


def start():
    return torch.randn(4, 3, dtype=F64, generator=torch.Generator().manual_seed(7)).requires_grad_()


def gradients(solve, net, t=TIMES, y0=None, **kwargs):
    """Of a loss on the whole trajectory, with respect to y0, t and the parameters."""
    y0, t = start() if y0 is None else y0, t.clone().requires_grad_()
    weights = torch.linspace(-1, 1, 12, dtype=F64).reshape(4, 3)
    solution = solve(net, y0, t, **kwargs)
    loss = ((solution**2 + solution) * weights).sum(dim=(1, 2)) @ torch.arange(1.0, len(t) + 1, dtype=F64)
    return torch.autograd.grad(loss, [y0, t, *net.parameters()])


def assert_all_close(got, expected, **slack):
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, **slack)


DIRECTIONS = pytest.mark.parametrize("t", [TIMES, TIMES.flip(0), TIMES[:2]], ids=["forward", "backward", "two"])


def moved_grid(func, y0, t):
    return torch.cat([t[:1], t[:1] * 0.4 + t[-1:] * 0.6, t[-1:]])


def constant_grid(func, y0, t):
    return torch.linspace(float(t[0].detach()), float(t[-1].detach()), 15, dtype=t.dtype)


@DIRECTIONS
@pytest.mark.parametrize(
    "kwargs",
    [
        {"method": "rk4"},
        {"method": "midpoint", "options": {"step_size": 0.07}},
        {"method": "euler", "options": {"perturb": True}},
        {"method": "heun3", "options": {"step_size": 0.07, "interp": "cubic"}},
        {"method": "heun2", "options": {"grid_constructor": moved_grid}},
        {"method": "rk4", "options": {"step_size": 0.1, "interp": "cubic"}},
        {"method": "rk4", "options": {"grid_constructor": constant_grid, "interp": "cubic"}},
    ],
    ids=["rk4", "midpoint", "perturb", "cubic", "grid", "on the grid", "constant grid"],
)
def test_gradients_of_fixed_steps(kwargs, t):
    got = gradients(compat.odeint, Net(), t, **kwargs)
    assert_all_close(got, gradients(torchdiffeq.odeint, Net(), t, **kwargs), rtol=1e-11, atol=1e-11)


@DIRECTIONS
@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3", "adaptive_heun", "fehlberg2"])
def test_gradients_of_adaptive_steps(method, t):
    loose = {"rtol": 1e-6, "atol": 1e-6} if method in ("adaptive_heun", "fehlberg2") else {}
    got = gradients(compat.odeint, Net(), t, method=method, **loose)
    expected = gradients(torchdiffeq.odeint, Net(), t, rtol=1e-10, atol=1e-11)
    slack = {"fehlberg2": 3e-2, "adaptive_heun": 1e-3, "bosh3": 1e-4}.get(method, 1e-5)
    assert_all_close(got, expected, rtol=slack, atol=slack)
    if method == "dopri5":
        assert_all_close(got, gradients(torchdiffeq.odeint, Net(), t, method=method), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["midpoint", "rk4"])
def test_gradients_of_fixed_steps_from_kept_states(method):
    """Without derivatives of times the steps are replayed from kept states."""
    results = []
    for library in (compat, torchdiffeq):
        net, y0 = Net(), start()
        solution = library.odeint(net, y0, TIMES, method=method, options={"step_size": 0.05})
        results.append(torch.autograd.grad(solution.pow(3).sum(), [y0, *net.parameters()]))
    assert_all_close(*results, rtol=1e-11, atol=1e-11)


ADJOINTS = [
    {},
    {"adjoint_method": "bosh3", "adjoint_rtol": 1e-6, "adjoint_atol": 1e-7, "adjoint_options": {}},
    {"adjoint_options": {"norm": "seminorm"}},
    {"adjoint_options": {"norm": lambda parts: max(part.abs().max() for part in parts)}},
    {"method": "dopri5", "options": {"norm": lambda y: y.abs().max()}},
    {"method": "dopri5", "options": {"norm": lambda y: y.abs().max()}, "adjoint_options": {"norm": "seminorm"}},
    {"method": "rk4", "options": {"step_size": 0.05}},
    {"method": "rk4", "options": {"step_size": 0.05}, "adjoint_method": "dopri5", "adjoint_options": {}},
]


@pytest.mark.parametrize("t", [TIMES, TIMES.flip(0)], ids=["forward", "backward"])
@pytest.mark.parametrize("kwargs", ADJOINTS, ids=lambda kwargs: "-".join(kwargs) or "default")
def test_gradients_of_odeint_adjoint(kwargs, t):
    counts, results = [], []
    for library in (compat, torchdiffeq):
        net = Net()
        results.append(gradients(library.odeint_adjoint, net, t, **kwargs))
        counts.append(net.evaluations)
    slack = 1e-10 if kwargs.get("method") == "rk4" and "adjoint_method" not in kwargs else 2e-5
    slack = 1e-3 if "adjoint_rtol" in kwargs else slack
    assert_all_close(*results, rtol=slack, atol=slack)
    assert counts[0] == pytest.approx(counts[1], rel=0.1)


def test_the_adjoint_of_a_tuple():
    norms = []

    def norm(parts):
        norms.append(tuple(part.shape for part in parts))
        return max(part.abs().max() for part in parts)

    for kwargs in ({}, {"adjoint_options": {"norm": "seminorm"}}, {"adjoint_options": {"norm": norm}}):
        results = []
        for library in (compat, torchdiffeq):
            net, y0, total = Pair(), start(), torch.zeros((), dtype=F64, requires_grad=True)
            solution = library.odeint_adjoint(net, (y0, total), TIMES, **kwargs)
            loss = solution[0][1:].sum() + solution[1].pow(2).sum()
            results.append(torch.autograd.grad(loss, [y0, total, *net.parameters()]))
        assert_all_close(*results, rtol=1e-5, atol=1e-5)
    assert set(norms) == {((), (4, 3), (), (4, 3), (), (3, 5), (5, 3))}


def test_complex_states():
    rate = torch.tensor([[0.3 - 2j, 0.5], [0.1j, -1.0]], dtype=torch.complex128, requires_grad=True)
    y0 = torch.tensor([1.0 + 1j, 2.0], dtype=torch.complex128, requires_grad=True)
    exact = torch.stack([torch.matrix_exp(rate * t) @ y0 for t in TIMES - TIMES[0]])
    expected = torch.autograd.grad(exact.abs().pow(3).sum(), [rate, y0])
    for solve, extra in ((compat.odeint, {}), (compat.odeint_adjoint, {"adjoint_params": (rate,)})):
        for tupled in (False, True):
            field = (lambda t, y: (rate @ y[0],)) if tupled else (lambda t, y: rate @ y)
            solution = solve(field, (y0,) if tupled else y0, TIMES, **extra)
            solution = solution[0] if tupled else solution
            got = torch.autograd.grad(solution.abs().pow(3).sum(), [rate, y0])
            assert_all_close(got, expected, rtol=1e-5, atol=1e-6)


def test_parameters_of_another_type_than_the_state():
    for state, other in ((torch.float32, F64), (F64, torch.float32)):
        scale = torch.tensor(0.5, dtype=other, requires_grad=True)
        y0 = torch.ones(3, dtype=state, requires_grad=True)
        got = []
        for solve, extra in ((compat.odeint, {}), (compat.odeint_adjoint, {"adjoint_params": (scale,)})):
            solution = solve(
                lambda t, y, scale=scale: -y * scale.to(y.dtype), y0, TIMES.to(state), rtol=1e-5, atol=1e-6, **extra
            )
            got.append(torch.autograd.grad(solution.sum(), [scale, y0]))
            assert [x.dtype for x in got[-1]] == [other, state]
        assert_all_close(*got, rtol=1e-4, atol=1e-4)


def test_only_adjoint_params_get_gradients():
    net, y0 = Net(), start()
    solution = compat.odeint_adjoint(net, y0, TIMES, adjoint_params=iter([net.first]))
    first, second = torch.autograd.grad(solution.sum(), [net.first, net.second], allow_unused=True)
    assert first is not None and second is None
    solution = compat.odeint_adjoint(lambda t, y: net(t, y), y0, TIMES, adjoint_params=())
    assert torch.autograd.grad(solution.sum(), y0)[0].abs().sum() > 0


def test_adjoint_params_that_were_computed():
    """As from a hypernetwork: not leaves, and the field reaches them by closure."""
    base = torch.eye(3, dtype=F64, requires_grad=True)
    results = []
    for library in (compat, torchdiffeq):
        weight, y0 = torch.tanh(base * 2), start()
        solution = library.odeint_adjoint(lambda t, y, w=weight: torch.sin(y @ w), y0, TIMES, adjoint_params=(weight,))
        results.append(torch.autograd.grad(solution.pow(2).sum(), [base, y0]))
    assert_all_close(*results, rtol=1e-5, atol=1e-6)


def test_callbacks_of_the_backward_solve():
    class Watched(Net):
        def __init__(self):
            super().__init__()
            self.log = []

        def callback_accept_step_adjoint(self, t, state, dt):
            self.log.append((t.item(), len(state), tuple(state[1].shape)))

    logs = []
    for library in (compat, torchdiffeq):
        net = Watched()
        gradients(library.odeint_adjoint, net, TIMES[:2])
        logs.append(net.log)
    assert len(logs[0]) == len(logs[1]) > 0
    assert logs[0][0] == logs[1][0] == (0.4, 5, (4, 3))


@pytest.mark.parametrize(
    "solve, method",
    [(compat.odeint, "dopri5"), (compat.odeint, "rk4"), (compat.odeint_adjoint, "dopri5")],
    ids=["odeint", "odeint-rk4", "odeint_adjoint"],
)
def test_second_derivatives(solve, method):
    weight = torch.tensor([[0.3, -1.0], [0.8, 0.1]], dtype=F64, requires_grad=True)
    y0 = torch.tensor([0.3, -0.2], dtype=F64, requires_grad=True)
    t = torch.tensor([0.0, 0.2, 0.3], dtype=F64, requires_grad=True)

    def trajectory(y0, t, weight):
        extra = {"adjoint_params": (weight,)} if solve is compat.odeint_adjoint else {}
        field = lambda t, y: torch.tanh(weight @ y + t)  # noqa: E731
        return solve(field, y0, t, method=method, rtol=1e-9, atol=1e-9, **extra)[1:]

    assert torch.autograd.gradcheck(trajectory, (y0, t, weight), atol=1e-5, fast_mode=True)
    assert torch.autograd.gradgradcheck(trajectory, (y0, t, weight), atol=1e-4, fast_mode=True)


def test_third_derivatives_of_the_adjoint_raise():
    y0 = torch.ones(2, dtype=F64, requires_grad=True)
    value = compat.odeint_adjoint(lambda t, y: torch.sin(y), y0, TIMES, adjoint_params=())[-1].sum()
    (first,) = torch.autograd.grad(value, y0, create_graph=True)
    with pytest.raises(RuntimeError, match="no third derivatives"):
        torch.autograd.grad(first.sum(), y0, create_graph=True)


def test_a_backward_solve_that_breaks_down():
    """Backwards in time this equation explodes, where torchdiffeq ends by "underflow in dt"."""
    stiffness = torch.tensor(30.0, dtype=F64, requires_grad=True)

    def field(t, y):
        return -stiffness * (y - torch.cos(t)) * (1 + y**2)

    y0, t = torch.tensor([2.0, 0.5], dtype=F64, requires_grad=True), torch.tensor([0.0, 2.0], dtype=F64)
    with pytest.raises(AssertionError, match="underflow in dt"):
        torchdiffeq.odeint_adjoint(field, y0, t, adjoint_params=(stiffness,))[-1].sum().backward()
    solution = compat.odeint_adjoint(field, y0, t, adjoint_params=(stiffness,))
    with pytest.warns(AdjointWarning, match="backwards in time"):
        got = torch.autograd.grad(solution[-1].sum(), [stiffness, y0])
    expected = torch.autograd.grad(compat.odeint(field, y0, t)[-1].sum(), [stiffness, y0])
    assert_all_close(got, expected, rtol=1e-12, atol=1e-14)


def test_noise_drawn_at_every_evaluation_is_differentiated_as_it_was():
    net = torch.nn.Sequential(torch.nn.Linear(3, 20), torch.nn.Dropout(0.2), torch.nn.Linear(20, 3)).double()
    y0 = start()
    for kwargs in ({"method": "rk4", "options": {"step_size": 0.1}}, {"rtol": 1e-1, "atol": 1e-1}):
        solution = compat.odeint(lambda t, y: net(y), y0, TIMES, **kwargs)
        grads = torch.autograd.grad(solution.sum(), [y0, *net.parameters()])
        assert all(grad.isfinite().all() and grad.abs().sum() > 0 for grad in grads)


def test_noise_fixed_at_the_first_evaluation_is_replayed():
    class Noisy(Net):
        noise = None

        def forward(self, t, y):
            if self.noise is None:
                self.noise = torch.randn_like(y)
            return super().forward(t, y) * self.noise

    net, y0 = Noisy(), start()
    got = torch.autograd.grad(compat.odeint(net, y0, TIMES).sum(), [y0, *net.parameters()])
    expected = torch.autograd.grad(torchdiffeq.odeint(net, y0, TIMES).sum(), [y0, *net.parameters()])
    assert_all_close(got, expected, rtol=1e-6, atol=1e-7)


def test_functions_that_differentiate_inside():
    """As in a continuous flow: the divergence of the field by autograd."""

    class Flow(Net):
        def forward(self, t, state):
            y = state[0]
            with torch.enable_grad():
                y.requires_grad_(True)
                t.requires_grad_(True)
                speed = super().forward(t, y)
                rows = [torch.autograd.grad(speed[:, i].sum(), y, create_graph=True)[0][:, i] for i in range(3)]
            return speed, -sum(rows).unsqueeze(-1)

    for name in ("odeint", "odeint_adjoint"):
        results = []
        for library in (compat, torchdiffeq):
            net, y0 = Flow(), start()
            state = (y0, torch.zeros(4, 1, dtype=F64))
            y, change = getattr(library, name)(net, state, TIMES, rtol=1e-7, atol=1e-8)
            results.append(torch.autograd.grad((y[-1].pow(2) + change[-1]).sum(), [y0, *net.parameters()]))
        assert_all_close(*results, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        compat.odeint(Flow(), (start(), torch.zeros(4, 1, dtype=F64)), TIMES)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
def test_fixed_steps_under_function_transforms():
    weight = torch.randn(3, 3, dtype=F64, generator=torch.Generator().manual_seed(0)) / 2

    def end(y0, weight):
        return compat.odeint(lambda t, y: torch.sin(y @ weight), y0, TIMES, method="rk4")[-1]

    y0 = torch.ones(5, 3, dtype=F64)
    jacobian = torch.func.vmap(torch.func.jacrev(end), (0, None))(y0, weight)
    expected = torch.stack([torch.autograd.functional.jacobian(lambda y: end(y, weight), y) for y in y0])
    torch.testing.assert_close(jacobian, expected)
    tangent = torch.func.jvp(lambda w: end(y0, w), (weight,), (torch.ones_like(weight),))[1]
    forward = torch.func.jacfwd(end, 1)(y0, weight)
    torch.testing.assert_close(tangent, forward.sum((-1, -2)))


class Bounce(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gravity = torch.nn.Parameter(torch.tensor([9.8], dtype=F64))

    def forward(self, t, state):
        return state[1], -self.gravity * torch.ones_like(state[1]) - 0.1 * state[1]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("name", ["odeint", "odeint_adjoint"])
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_event_times(name, reverse, method):
    results = []
    kwargs = {"method": "rk4", "options": {"step_size": 1e-2}, "atol": 1e-9} if method == "rk4" else {}
    for library in (compat, torchdiffeq):
        field = Bounce()
        t0 = torch.tensor([0.3], dtype=F64, requires_grad=True)
        state = (torch.tensor([4.0], dtype=F64).requires_grad_(), torch.tensor([1.0], dtype=F64).requires_grad_())

        def ground(t, state):
            return state[0] + 0.2 * t

        time, solution = library.odeint_event(
            field, state, t0, event_fn=ground, reverse_time=reverse, odeint_interface=getattr(library, name), **kwargs
        )
        loss = time + 3 * solution[1][-1].sum() + solution[0].sum()
        results.append([time.detach(), *torch.autograd.grad(loss, [*state, t0, *field.parameters()])])
    assert_all_close(*results, rtol=1e-4, atol=1e-4)


def test_event_times_of_a_tensor_and_their_finite_differences():
    rate = torch.tensor(0.7, dtype=F64, requires_grad=True)
    level = torch.tensor(3.0, dtype=F64, requires_grad=True)
    y0 = torch.tensor([1.0, 0.5], dtype=F64, requires_grad=True)
    t0 = torch.tensor(0.0, dtype=F64, requires_grad=True)

    def crossing(rate, level, y0, t0):
        time, solution = compat.odeint_event(
            lambda t, y: rate * y, y0, t0, event_fn=lambda t, y: y.sum() - level - t, atol=1e-11, rtol=1e-9
        )
        return time, solution[-1]

    # torchdiffeq does not differentiate with respect to what the event function uses, such as the level here.
    assert torch.autograd.gradcheck(crossing, (rate, level, y0, t0), eps=1e-5, atol=1e-4, fast_mode=True)
    time, _ = crossing(rate, level, y0, t0)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(time, rate, create_graph=True)


def test_second_derivatives_of_the_state_at_an_event():
    def end(y0):
        t = torch.tensor([0.0, 1.0], dtype=F64)
        return compat.odeint_adjoint(
            lambda t, y: torch.sin(y), y0, t, event_fn=lambda t, y: t - 0.7, adjoint_params=(), rtol=1e-9, atol=1e-10
        )[1]

    y0 = torch.tensor([0.4, 1.0], dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(end, y0, atol=1e-5, fast_mode=True)
    assert torch.autograd.gradgradcheck(end, y0, atol=1e-4, fast_mode=True)
