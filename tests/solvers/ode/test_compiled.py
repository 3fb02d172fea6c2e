"""Compiled solves: the same steps, values and derivatives as without, and a warning where they are not compiled."""

import contextlib
import math
import warnings

import pytest
import torch
from torch import Tensor, nn

from restpoint.solvers.ode import (
    RK4,
    BacksolveAdjoint,
    Bosh3,
    CompileWarning,
    ConstantController,
    DirectAdjoint,
    Dopri5,
    Dopri8,
    Euler,
    Event,
    Heun,
    Kvaerno3,
    PIDController,
    Tsit5,
    solve_ode,
)
from restpoint.solvers.ode.compiled import engine, loop
from restpoint.solvers.ode.compiled.loop import Mode, interpreted
from restpoint.solvers.solution import SolverError, Status

OPTIONS = {"rtol": 1e-3, "atol": 1e-3, "solver": Bosh3()}


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _no_engines():
    """Every test traces its own programs."""
    engine._engines.clear()
    engine._disagreed.clear()
    engine._restless.clear()


def agree(field, y0, t, wanted=(), compiler=interpreted, **options):
    """Solve and differentiate both ways, compare everything, and return both solutions."""
    found = []
    for compile in (False, True):
        y, times = y0.clone().requires_grad_(), t.clone().requires_grad_()
        with compiler():
            solution = solve_ode(field, y, times, compile=compile, **{**OPTIONS, **options})
            weights = torch.cos(torch.arange(solution.value.numel(), dtype=y0.dtype)).view_as(solution.value)
            loss = (solution.value * weights).nansum() + solution.value.square().nansum()
            grads = torch.autograd.grad(loss, [y, times, *wanted], allow_unused=True)
        found.append((solution, grads))
    (eager, expected), (compiled, grads) = found
    torch.testing.assert_close(compiled.value, eager.value, rtol=1e-12, atol=1e-12, equal_nan=True)
    for grad, other in zip(grads, expected, strict=True):
        assert (grad is None) == (other is None)
        if grad is not None:
            torch.testing.assert_close(grad, other, rtol=1e-10, atol=1e-10)
    for name in ("accepted", "rejected", "status"):
        assert torch.equal(getattr(compiled.stats, name), getattr(eager.stats, name))
    torch.testing.assert_close(compiled.stats.residual, eager.stats.residual, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(compiled.reached, eager.reached)
    assert compiled.adjoint_stats is not None
    return eager, compiled


def network(t: Tensor, y: Tensor) -> Tensor:
    return torch.tanh(y @ WEIGHT) + torch.sin(3 * t.reshape(-1, 1))


WEIGHT = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
TIMES = torch.tensor([0.0, 0.4, 0.5, 1.9, 2.0], dtype=torch.float64)


@pytest.mark.parametrize(
    "t, options",
    [
        (TIMES, {"solver": Dopri5()}),
        (TIMES[[0, -1]], {"solver": Tsit5()}),
        (TIMES.flip(0), {"rtol": 1e-4}),
        (TIMES[[0, -1]], {"solver": Dopri8(), "adjoint": DirectAdjoint()}),
        (TIMES, {"solver": RK4(), "controller": ConstantController(dt=0.15)}),
        (TIMES, {"solver": Heun(), "rtol": 1e-2, "atol": 1e-2, "controller": PIDController(p=0.3, d=0.1, dt0=1e-3)}),
        (TIMES, {"max_steps": 6, "throw": False}),
        (TIMES, {"controller": PIDController(max_step=0.2, min_step=0.05)}),
    ],
    ids=["dopri5", "ends", "backwards", "dopri8", "constant", "pid", "budget", "bounded"],
)
def test_the_same_steps_values_and_derivatives(t, options):
    eager, compiled = agree(network, randn(4, 3), t, [WEIGHT], **options)
    if {**OPTIONS, **options}["solver"] in (Dopri5(), Tsit5(), Bosh3()):
        assert torch.equal(compiled.stats.evaluations, eager.stats.evaluations)


@pytest.mark.parametrize(
    "solver, end, least",
    [
        (Tsit5(), 2.0, 50),
        (Dopri8(), 2.0, 50),
        # Over the ends of chunks of memory.
        pytest.param(Tsit5(), 20.0, 500, marks=pytest.mark.slow),
        pytest.param(Dopri8(), 20.0, 400, marks=pytest.mark.slow),
    ],
    ids=repr,
)
def test_steps_at_the_limit_of_stability(solver, end, least):
    """In which rounding is multiplied."""
    mu = torch.tensor([1.0, 20.0, 50.0], dtype=torch.float64).requires_grad_()

    def field(t, y, mu):
        return torch.stack([y[:, 1], mu * (1 - y[:, 0] ** 2) * y[:, 1] - y[:, 0]], 1)

    found = []
    for compile in (False, True):
        y0 = torch.tensor([[2.0, 0.0]], dtype=torch.float64).repeat(3, 1).requires_grad_()
        with interpreted():
            options = {"solver": solver, "rtol": 1e-6, "atol": 1e-6, "compile": compile}
            solution = solve_ode(field, y0, (0.0, end), (mu,), **options)
            found.append((solution, torch.autograd.grad(solution.value[-1, :, 0].sum(), [y0, mu])))
    (eager, expected), (compiled, grads) = found
    assert int(eager.stats.accepted[0]) > least
    assert torch.equal(compiled.stats.accepted, eager.stats.accepted)
    assert torch.equal(compiled.stats.rejected, eager.stats.rejected)
    torch.testing.assert_close(compiled.value, eager.value, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(grads, expected, rtol=1e-5, atol=1e-8)


def test_every_dense_output():
    eager, compiled = agree(network, randn(4, 3), TIMES, dense=True)
    t = torch.linspace(0, 2, 11, dtype=torch.float64)
    assert eager.interpolation is not None and compiled.interpolation is not None
    torch.testing.assert_close(compiled.interpolation(t), eager.interpolation(t))
    torch.testing.assert_close(compiled.interpolation.derivative(t), eager.interpolation.derivative(t))


def test_more_steps_than_fit_into_one_chunk():
    _, compiled = agree(
        lambda t, y: -y * WEIGHT[0],
        randn(2, 3),
        TIMES,
        [WEIGHT],
        solver=Euler(),
        controller=ConstantController(dt=2 / 600),
    )
    assert int(compiled.stats.accepted[0]) == 600
    with interpreted(), torch.no_grad():
        again = solve_ode(
            lambda t, y: -y * WEIGHT[0],
            compiled.value[0],
            TIMES,
            solver=Euler(),
            controller=ConstantController(dt=2 / 600),
            compile=True,
        )
    torch.testing.assert_close(again.value, compiled.value)


@pytest.mark.parametrize("t", [TIMES, TIMES[[0, -1]]], ids=["outputs", "ends"])
def test_passes_that_are_replayed_as_on_a_gpu(t):
    agree(network, randn(4, 3), t, [WEIGHT], compiler=lambda: interpreted(Mode.REPLAYED))
    agree(
        lambda t, y: y @ WEIGHT,
        randn(2, 3),
        t,
        [WEIGHT],
        compiler=lambda: interpreted(Mode.REPLAYED),
        solver=Euler(),
        controller=ConstantController(dt=2 / 300),
    )


def test_states_of_any_structure_and_quadratures():
    y0 = {"z": torch.complex(randn(3, 2), randn(3, 2)), "x": randn(3, 4), "cost": torch.zeros(3, dtype=torch.float64)}
    rate = randn(4).requires_grad_()

    def field(t, state, rate):
        speed = -rate * state["x"]
        return {"z": 1j * t * state["z"], "x": speed, "cost": speed.square().sum(1)}

    found = []
    for compile in (False, True):
        with interpreted():
            solution = solve_ode(field, y0, TIMES, (rate,), quadrature=["cost"], compile=compile, **OPTIONS)
        (grad,) = torch.autograd.grad(solution.value["cost"].sum() + solution.value["z"].real.sum(), rate)
        found.append((solution, grad))
    (eager, expected), (compiled, grad) = found
    for key in y0:
        torch.testing.assert_close(compiled.value[key], eager.value[key], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(eager.stats.accepted, compiled.stats.accepted)


class Network(nn.Module):
    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3, dtype=torch.float64)
        self.unused = nn.Linear(2, 2)
        self.scale = scale

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.scale * torch.tanh(self.layer(y))


class Weighted(nn.Module):
    """With a tensor that is neither parameter nor buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = randn(3)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return -self.weights.abs() * y


def test_tensors_may_be_plain_attributes():
    field, y0 = Weighted(), randn(4, 3)
    for _ in range(2):
        found = solve_ode(field, y0, (0.0, 1.0), compile=True, **OPTIONS).value
        torch.testing.assert_close(found, solve_ode(field, y0, (0.0, 1.0), **OPTIONS).value)
        field.weights = randn(3)


def test_a_program_serves_other_values_and_not_other_fields():
    first, second, y0 = Network(), Network(), randn(4, 3)
    for model in (first, second):
        eager, _ = agree(model, y0, TIMES, list(model.parameters()))
    assert len(engine._engines) == 1
    loops = next(iter(engine._engines.values()))._backward
    assert len(loops) == 1
    # Weights that change in place, as an optimizer changes them, and times and tolerances.
    with torch.no_grad():
        second.layer.weight.mul_(2)
    other, _ = agree(second, y0, TIMES[:-1] + 1, list(second.parameters()), rtol=1e-3, atol=1e-3)
    assert not torch.equal(other.value, eager.value[:-1])
    assert len(engine._engines) == 1
    second.scale = 0.5
    agree(second, y0, TIMES, list(second.parameters()))
    agree(second, y0[:2], TIMES, list(second.parameters()))
    assert len(engine._engines) == 3


def test_closures_of_the_same_code_share_a_program():
    def made(factor: Tensor, power: int):
        return lambda t, y: -factor * y**power

    y0 = randn(4, 3)
    for factor in (randn(3).requires_grad_(), randn(3).requires_grad_()):
        agree(made(factor, 1), y0, TIMES, [factor])
    assert len(engine._engines) == 1
    agree(made(factor, 3), y0 / 9, TIMES, [factor], throw=False)
    assert len(engine._engines) == 2


class Hidden:
    """State that cannot be looked through."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 1.0


def test_a_change_that_cannot_be_seen_is_noticed():
    hidden, y0 = Hidden(), randn(4, 3)

    def field(t, y):
        return -hidden.value * y

    for value in (1.0, 2.0):
        hidden.value = value
        agree(field, y0, TIMES)
    hidden.value = 3.0
    with interpreted(), pytest.warns(CompileWarning, match="changes from solve to solve"):
        solution = solve_ode(field, y0, TIMES, compile=True, **OPTIONS)
    torch.testing.assert_close(solution.value[-1], y0 * math.exp(-6), rtol=1e-2, atol=1e-2)


def test_second_derivatives():
    y0, weight = randn(2, 3), randn(3, 3).requires_grad_()
    found = []
    for compile in (False, True):
        with interpreted():
            solution = solve_ode(lambda t, y: torch.tanh(y @ weight), y0, (0.0, 1.0), compile=compile, rtol=1e-4)
        (grad,) = torch.autograd.grad(solution.value.square().sum(), weight, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), weight)[0])
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=1e-10)


def test_samples_that_break_are_reported_as_ever():
    y0 = randn(3, 2)
    y0[1] = 2.0

    def field(t, y):
        return torch.where(y > 3, torch.nan, y)

    found = []
    for compile in (False, True):
        with interpreted():
            found.append(solve_ode(field, y0, (0.0, 1.0), compile=compile, throw=False))
            with pytest.raises(SolverError, match="Sample 1 met a NaN"):
                solve_ode(field, y0, (0.0, 1.0), compile=compile)
    assert found[1].report() == found[0].report()
    torch.testing.assert_close(found[1].value, found[0].value, equal_nan=True)
    with interpreted(), pytest.warns(UserWarning, match="below the resolution"):
        solution = solve_ode(lambda t, y: y**2, y0.abs() + 1, (0.0, 5.0), compile=True, throw="warn")
    assert set(solution.stats.status.tolist()) <= {Status.STEP_UNDERFLOW, Status.NON_FINITE}


@pytest.mark.filterwarnings("error::restpoint.solvers.ode.CompileWarning")
def test_tolerances_that_the_solution_outgrows():
    for rate, status in ((1.0, Status.STEP_UNDERFLOW), (1e-7, Status.CONVERGED)):
        with interpreted():
            options = {"rtol": 0.0, "atol": 1e-12, "throw": False, "compile": True, "max_steps": 500}
            solution = solve_ode(lambda t, y, rate=rate: rate * torch.cos(y), torch.zeros(2, 1), (0.0, 3.0), **options)
        assert solution.stats.status.tolist() == [status] * 2


class Choosing(torch.autograd.Function):
    """Twice a tensor, whose derivative looks at values."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, bar):
        return bar * 2 if float(bar.sum()) < 1e9 else bar


def test_a_derivative_that_cannot_be_compiled_is_taken_without():
    y0 = randn(4, 3)
    with pytest.warns(CompileWarning, match="its derivative; the solve itself is compiled"):
        agree(lambda t, y: Choosing.apply(y) @ WEIGHT / 9, y0, TIMES, [WEIGHT])


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.evaluations = 0

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.evaluations += 1
        return -y


DOUBLED = 2 * WEIGHT
MANY = list(range(30_000))


@pytest.mark.parametrize(
    "field, options, reason",
    [
        (lambda t, y: -y if y.sum() > 0 else y, {}, "cannot be traced"),
        (lambda t, y: -y + 0 * torch.rand_like(y), {}, "random numbers"),
        (Counting(), {}, "changes what it holds"),
        (lambda t, y: y @ WEIGHT + y @ DOUBLED, {}, "computed from another one"),
        (network, {"solver": Kvaerno3()}, "Kvaerno3 is no explicit"),
        (network, {"events": Event(lambda t, y: y[:, 0] - 9)}, "events"),
        (network, {"controller": PIDController(per_sample=True)}, "steps per sample"),
        (network, {"controller": PIDController(jump_t=(0.5,))}, "jump_t"),
        (network, {"adjoint": BacksolveAdjoint()}, "BacksolveAdjoint asks for another one"),
        (lambda t, y: -y + len(MANY), {}, "more objects"),
    ],
    ids=["branch", "random", "counter", "computed", "implicit", "event", "per sample", "jump", "adjoint", "many"],
)
def test_what_is_not_compiled_says_why(field, options, reason):
    y0 = randn(4, 3).requires_grad_()
    expected = solve_ode(field, y0, TIMES, **options)
    with interpreted(), pytest.warns(CompileWarning, match=reason):
        solution = solve_ode(field, y0, TIMES, compile=True, **options)
    torch.testing.assert_close(solution.value, expected.value, rtol=1e-12, atol=1e-12)


def test_transforms_and_autocast_are_not_compiled():
    y0 = randn(4, 3)
    with pytest.warns(CompileWarning, match=r"torch\.func"):
        torch.func.grad(lambda y: solve_ode(network, y, (0.0, 1.0), compile=True).value.sum())(y0)
    with torch.autocast("cpu"), pytest.warns(CompileWarning, match="autocast"):
        solve_ode(network, y0, (0.0, 1.0), compile=True)


def test_bad_fields_raise_as_ever():
    with interpreted(), pytest.raises(ValueError, match="expected a batch of 4"):
        solve_ode(lambda t, y: y[:2], randn(4, 3), TIMES, compile=True)


def divergence(t: Tensor, state: Tensor) -> Tensor:
    """A flow whose divergence is taken by autograd inside the field."""
    with torch.enable_grad():
        z = state[:, :2]
        z = z if z.requires_grad else z.detach().requires_grad_()
        out = torch.tanh(z @ WEIGHT[:2, :2] + t)
        parts = [torch.autograd.grad(out[:, i].sum(), z, create_graph=True)[0][:, i] for i in range(2)]
    return torch.cat([out, -sum(parts).unsqueeze(1)], 1)


def test_derivatives_inside_the_field():
    agree(divergence, randn(4, 3), TIMES, [WEIGHT])


@pytest.mark.slow
def test_the_compiler_agrees_and_is_asked_once():
    def field(t, y):
        return (y**3) @ WEIGHT[:2, :2] / 9 - y

    with warnings.catch_warnings():
        # What the compiler itself does is not under test.
        warnings.filterwarnings("ignore", module="torch")
        agree(field, randn(4, 2), TIMES, [WEIGHT], compiler=torch.enable_grad)
        (made,) = engine._engines.values()
        programs = made.forward._run, [loop for loop, _ in made._backward.values()]
        agree(field, randn(4, 2), TIMES + 1, [WEIGHT], compiler=torch.enable_grad)
        assert (made.forward._run, [loop for loop, _ in made._backward.values()]) == programs
        assert list(engine._engines.values()) == [made]


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.parametrize("controller", [PIDController(), ConstantController(dt=0.25)])
def test_the_compiler_fuses_sums_with_products(controller):
    """Torch 2.14 compiles y + 0.5 (a b) to y + a b where the sum is `torch.add` with alpha."""
    left, right = randn(8, 16).requires_grad_(), randn(16, 8).requires_grad_()

    def field(t: Tensor, y: Tensor) -> Tensor:
        return torch.add(-y, torch.tanh(y @ left) @ right, alpha=0.5)

    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    options = {"solver": Dopri5(), "controller": controller, "compiler": contextlib.nullcontext}
    with warnings.catch_warnings():
        warnings.simplefilter("error", CompileWarning)
        agree(field, randn(4, 8), t, (left, right), **options)


def broken(factor: float, after: int):
    """A compiler whose programs, but for the first ones, multiply what they return."""
    programs = []

    def compiled(program, inputs):
        programs.append(program)
        wrong = len(programs) > after
        return lambda *tensors: [x * (factor if wrong and x.ndim == 2 else 1) for x in program(*tensors)]

    return compiled


@pytest.mark.parametrize("after, part", [(0, "solve_ode runs"), (1, "its derivative")])
def test_a_wrong_program_is_not_used(monkeypatch, after, part):
    """What a compiler makes is compared with what it was given, forward and backward."""
    monkeypatch.setattr(loop, "_compiled", broken(1 + 1e-6, after))
    with pytest.warns(CompileWarning, match="the compiler's program is wrong") as caught:
        agree(network, randn(4, 3), TIMES, [WEIGHT], compiler=contextlib.nullcontext)
    assert all(part in str(warning.message) for warning in caught)


def test_the_compiler_takes_derivatives_inside_the_field():
    agree(divergence, randn(4, 3), TIMES[[0, -1]], [WEIGHT], compiler=torch.enable_grad)


@pytest.mark.slow
def test_the_compiler_takes_tensors_as_they_lie_in_memory():
    weight, bias = randn(2, 3).t().requires_grad_(), randn(1, 2).expand(4, 2)
    found = []
    for compile in (False, True):
        y0 = randn(2, 4).t() if not found else found[0][0]
        with torch.inference_mode() if compile else torch.no_grad():
            value = solve_ode(
                lambda t, y: (torch.tanh(y @ weight.t() + 1) @ weight * bias).t().contiguous().t(),
                y0,
                TIMES,
                solver=Bosh3(),
                rtol=1e-3,
                compile=compile,
            ).value
        found.append((y0, value))
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-12, atol=1e-12)
