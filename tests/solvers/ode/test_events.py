"""Events: where they are found, what they end, and their derivatives."""

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from restpoint.solvers import StateError, Status
from restpoint.solvers.ode import (
    RK4,
    BacksolveAdjoint,
    CheckpointAdjoint,
    ConstantController,
    DirectAdjoint,
    Event,
    InterpolatedAdjoint,
    PIDController,
    solve_ode,
)

F64 = torch.float64
PER_SAMPLE = pytest.mark.parametrize("per_sample", [False, True])


def fall(t, y, g):
    return torch.stack([y[:, 1], -g.expand(len(y))], 1)


GROUND = Event(lambda t, y, g: y[:, 0])
Y0 = torch.tensor([[1.0, 0.0], [4.0, 0.0], [2.0, 3.0], [100.0, 0.0]], dtype=F64)
G = torch.tensor(9.81, dtype=F64)


@PER_SAMPLE
@pytest.mark.parametrize("adjoint", [DirectAdjoint(), CheckpointAdjoint()], ids=repr)
def test_falling_bodies_reach_the_ground(adjoint, per_sample):
    y0, g = Y0.clone().requires_grad_(), G.clone().requires_grad_()
    t = torch.linspace(0, 2, 9, dtype=F64)
    solution = solve_ode(
        fall, y0, t, (g,), events=GROUND, adjoint=adjoint, controller=PIDController(per_sample=per_sample)
    )
    event = solution.event
    exact = (y0[:, 1] + torch.sqrt(y0[:, 1] ** 2 + 2 * y0[:, 0] * g)) / g
    assert event.index.tolist() == [0, 0, 0, -1]
    assert solution.stats.status.tolist() == [Status.EVENT] * 3 + [Status.CONVERGED]
    assert solution.converged.all()
    torch.testing.assert_close(event.t[:3], exact[:3])
    assert event.t[3].isnan()
    assert event.value[3].isnan().all()
    torch.testing.assert_close(event.value[:3, 0], torch.zeros(3, dtype=F64), atol=1e-12, rtol=0)
    torch.testing.assert_close(solution.reached, torch.where(event.t.isnan(), 2.0, event.t).detach())
    # Before the event the trajectory, after it the state at the event.
    free = y0[:, :1].T + y0[:, 1] * t[:, None] - 0.5 * g * t[:, None] ** 2
    expected = torch.where(t[:, None] < exact, free, 0.0)
    torch.testing.assert_close(solution.value[..., 0], expected, atol=1e-10, rtol=0)
    for got, want in ((event.t[:3], exact[:3]), (solution.value[..., 0], expected)):
        pulled = [torch.autograd.grad(x.sum(), [y0, g], retain_graph=True) for x in (got, want)]
        torch.testing.assert_close(*pulled, atol=1e-9, rtol=1e-9)


@PER_SAMPLE
@pytest.mark.parametrize("adjoint", [DirectAdjoint(), CheckpointAdjoint()], ids=repr)
def test_implicit_derivatives_against_finite_differences(adjoint, per_sample):
    y0, g = Y0[:2].clone().requires_grad_(), G.clone().requires_grad_()
    level = torch.tensor(0.1, dtype=F64, requires_grad=True)
    control = ConstantController(dt=0.3, per_sample=per_sample)
    ends = torch.tensor([0.0, 0.4, 2.0], dtype=F64, requires_grad=True)

    def run(y0, g, level, ends):
        # A condition that closes over a tensor.
        event = Event(lambda t, y, g: y[:, 0] ** 3 - level + 0.01 * t)
        solution = solve_ode(fall, y0, ends, (g,), solver=RK4(), controller=control, events=event, adjoint=adjoint)
        return solution.event.t, solution.event.value, solution.value

    assert gradcheck(run, (y0, g, level, ends))
    assert gradgradcheck(run, (y0, g, level, ends), fast_mode=True)


@pytest.mark.filterwarnings("ignore::restpoint.solvers.AdjointWarning")
@pytest.mark.parametrize("adjoint", [BacksolveAdjoint(), InterpolatedAdjoint()], ids=lambda a: type(a).__name__)
def test_continuous_adjoints_take_the_steps_instead(adjoint):
    y0 = Y0[:2].clone().requires_grad_()
    time = solve_ode(fall, y0, (0.0, 2.0), (G,), events=GROUND, adjoint=adjoint).event.t
    exact = torch.sqrt(2 * y0[:, 0] / G)
    torch.testing.assert_close(
        torch.autograd.grad(time.sum(), y0)[0][:, 0], torch.autograd.grad(exact.sum(), y0)[0][:, 0]
    )


def turn(t, y, w):
    return torch.cat([w * y[:, 1:], -w * y[:, :1]], 1)


@PER_SAMPLE
@pytest.mark.parametrize("dense", [False, True])
def test_several_events_and_directions(dense, per_sample):
    w = torch.tensor([[1.0], [2.5]], dtype=F64, requires_grad=True)
    y0 = torch.tensor([[0.0, 1.0], [0.0, 1.0]], dtype=F64)
    events = [
        Event(lambda t, y, w: y[:, 0], terminal=False),
        Event(lambda t, y, w: y[:, 0], terminal=False, direction=1),
        Event(lambda t, y, w: y[:, 0], terminal=False, direction=-1),
        Event(lambda t, y, w: t - 7.0, direction=1),
    ]
    solution = solve_ode(
        turn, y0, (0.0, 8.0), (w,), events=events, dense=dense, controller=PIDController(per_sample=per_sample),
        rtol=1e-9, atol=1e-9,
    )  # fmt: skip
    event = solution.event
    # The sine of w t has its zeros at multiples of pi / w; the one at the start is none.
    counts = [2, 5]
    for sample, count in enumerate(counts):
        zeros = torch.arange(1, count + 1, dtype=F64) * math.pi / float(w.detach()[sample])
        for times, every in ((event.times[0], zeros), (event.times[1], zeros[1::2]), (event.times[2], zeros[::2])):
            assert times.shape[1] == 2
            torch.testing.assert_close(times[: len(every), sample].detach(), every, atol=1e-7, rtol=0)
            assert times[len(every) :, sample].isnan().all()
    torch.testing.assert_close(event.t.detach(), torch.full((2,), 7.0, dtype=F64))
    assert event.index.tolist() == [3, 3]
    torch.testing.assert_close(event.values[0][0, :, 1], torch.tensor([-1.0, -1.0], dtype=F64), atol=1e-7, rtol=0)
    got = torch.autograd.grad(event.times[0][1].sum(), w)[0]
    torch.testing.assert_close(got, -2 * math.pi / w.detach() ** 2, rtol=1e-5, atol=0)


@PER_SAMPLE
def test_the_earliest_of_two_in_one_step_ends_the_sample(per_sample):
    y0 = torch.zeros(1, 1, dtype=F64)
    events = [Event(lambda t, y: y[:, 0] - 0.6), Event(lambda t, y: y[:, 0] - 0.4), Event(lambda t, y: y[:, 0] - 0.5)]
    control = ConstantController(dt=1.0, per_sample=per_sample)
    solution = solve_ode(
        lambda t, y: torch.ones_like(y), y0, (0.0, 1.0), solver=RK4(), controller=control, events=events
    )
    assert solution.event.index.tolist() == [1]
    assert [len(times) for times in solution.event.times] == [0, 1, 0]
    torch.testing.assert_close(solution.event.t, torch.tensor([0.4], dtype=F64))


@PER_SAMPLE
def test_backwards_in_time_and_structured_states(per_sample):
    y0 = {"x": torch.ones(2, 1, dtype=F64), "v": torch.zeros(2, 1, dtype=F64)}
    solution = solve_ode(
        lambda t, s: {"x": s["v"], "v": -s["x"]}, y0, (0.0, -3.0), rtol=1e-9, atol=1e-9,
        events=Event(lambda t, s: s["x"][:, 0]), controller=PIDController(per_sample=per_sample),
    )  # fmt: skip
    torch.testing.assert_close(solution.event.t, torch.full((2,), -math.pi / 2, dtype=F64), rtol=1e-7, atol=0)
    assert solution.event.value.keys() == y0.keys()
    torch.testing.assert_close(solution.event.value["v"], torch.ones(2, 1, dtype=F64))


@PER_SAMPLE
def test_an_event_saves_a_sample_from_what_lies_behind_it(per_sample):
    """y' = y^2 blows up at t = 1 / y0, and the other sample is none the worse for it."""
    y0 = torch.tensor([[2.0], [0.1]], dtype=F64, requires_grad=True)
    solution = solve_ode(
        lambda t, y: y**2, y0, (0.0, 1.0), events=Event(lambda t, y: y[:, 0] - 10.0), rtol=1e-9, atol=1e-9,
        controller=PIDController(per_sample=per_sample),
    )  # fmt: skip
    torch.testing.assert_close(solution.event.t[0], torch.tensor(0.4, dtype=F64))
    torch.testing.assert_close(solution.value[-1], torch.tensor([[10.0], [1 / 9]], dtype=F64))
    (grad,) = torch.autograd.grad(solution.value[-1].sum(), y0)
    torch.testing.assert_close(grad, torch.tensor([[0.0], [(1 / 0.9) ** 2]], dtype=F64), atol=1e-6, rtol=1e-6)


def test_a_zero_that_is_hit_exactly_stays_while_others_are_looked_for():
    """The middle of the only step is one sample's; the other's takes a number of iterations."""
    y0, goal = torch.zeros((2, 1), dtype=F64), torch.tensor([0.5, 0.3], dtype=F64)
    event = Event(lambda t, y: y[:, 0] ** 3 + y[:, 0] - goal**3 - goal)
    for order in ([0, 1], [1, 0]):
        goal = goal[order]
        step = ConstantController(dt=1.0)
        solution = solve_ode(lambda t, y: torch.ones_like(y), y0, (0.0, 1.0), events=event, controller=step)
        torch.testing.assert_close(solution.event.t, goal, rtol=0, atol=1e-12)
    linear = Event(lambda t, y: torch.where(goal == 0.5, y[:, 0] - 0.5, y[:, 0] ** 3 - 0.1))
    solution = solve_ode(lambda t, y: torch.ones_like(y), y0, (0.0, 1.0), events=linear, controller=step)
    expected = torch.where(goal == 0.5, 0.5, torch.tensor(0.1 ** (1 / 3), dtype=F64))
    torch.testing.assert_close(solution.event.t, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("direction", [-1, 0, 1])
@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["forwards", "backwards"])
@pytest.mark.parametrize("per_sample", [False, True])
def test_an_event_at_the_last_time(per_sample, sign, direction):
    """The state grows with time from 0 and 1e6: it is exact but for rounding, in which the condition would drown."""
    y0 = torch.tensor([[0.0], [1e6]], dtype=F64)
    controller = PIDController(per_sample=per_sample)

    def solved(end, span=0.7):
        condition = Event(lambda t, y: (y - y0)[:, 0] * sign - end, direction=direction)
        return solve_ode(
            lambda t, y: torch.ones_like(y), y0, (0.0, sign * span), events=condition, controller=controller
        )

    for grad in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with grad():
            solution = solved(0.7)
        if direction < 0:
            assert solution.stats.status.tolist() == [Status.CONVERGED] * 2
        else:
            assert solution.stats.status.tolist() == [Status.EVENT] * 2
            torch.testing.assert_close(solution.event.t, torch.full((2,), sign * 0.7, dtype=F64), rtol=0, atol=2e-9)
            assert not solution.value.isnan().any()
    # An event that lies behind the last time by more than rounding does not happen, and none where it is passed.
    assert solved(0.7 + 1e-7).stats.status.tolist() == [Status.CONVERGED] * 2
    if direction >= 0:
        solution = solved(0.7, 1.3)
        assert solution.stats.status.tolist() == [Status.EVENT] * 2
        torch.testing.assert_close(solution.event.t, torch.full((2,), sign * 0.7, dtype=F64), rtol=0, atol=2e-9)


@pytest.mark.parametrize("per_sample", [False, True])
def test_at_the_last_time_a_condition_that_is_always_almost_zero_does_not_count(per_sample):
    """At rest within rounding, and on the way there."""
    controller = PIDController(per_sample=per_sample)
    event = Event(lambda t, y: y[:, 0] - 1)
    for start, end in ((1 + 1e-15, 1.0), (2.0, 25.0)):
        y0 = torch.full((1, 1), start, dtype=F64)
        solution = solve_ode(
            lambda t, y: 1 - y, y0, (0.0, end), events=event, controller=controller, rtol=1e-10, atol=1e-10
        )
        assert solution.stats.status.tolist() == [Status.CONVERGED]


def test_an_event_at_the_last_time_inside_torch_func():
    def when(rate):
        y0 = torch.zeros((1, 1), dtype=F64)
        event = Event(lambda t, y: y[:, 0] - 0.7)
        return solve_ode(lambda t, y: rate * torch.ones_like(y), y0, (0.0, 0.7), events=event).event.t.sum()

    rate = torch.tensor(1.0, dtype=F64)
    assert float(torch.func.grad(when)(rate)) == pytest.approx(-0.7, rel=1e-9)
    leaf = rate.clone().requires_grad_()
    assert float(torch.autograd.grad(when(leaf), leaf)[0]) == pytest.approx(-0.7, rel=1e-9)


def test_no_event_happens():
    solution = solve_ode(lambda t, y: y, torch.ones(2, 1), (0.0, 1.0), events=Event(lambda t, y: y[:, 0] + 1.0))
    assert solution.event.index.tolist() == [-1, -1]
    assert solution.event.times[0].shape == (0, 2)
    assert solution.event.value.isnan().all()
    assert solve_ode(lambda t, y: y, torch.ones(2, 1), (0.0, 1.0)).event is None


def test_bad_events():
    y0 = torch.ones(2, 1)
    with pytest.raises(StateError, match=r"one real number per sample, \(2,\), got .*\(2, 1\)"):
        solve_ode(lambda t, y: y, y0, (0.0, 1.0), events=Event(lambda t, y: y))
    with pytest.raises(ValueError, match="direction must be -1, 0 or 1"):
        Event(lambda t, y: y, direction=2)
    with pytest.raises(TypeError):
        solve_ode(lambda t, y: y, y0, (0.0, 1.0), events=[lambda t, y: y])
