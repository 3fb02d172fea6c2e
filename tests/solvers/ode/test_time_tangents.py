"""Forward-mode derivatives with respect to the first and last time."""

import pytest
import torch
from torch.autograd import forward_ad

from restpoint.solvers import CheckpointAdjoint, DirectAdjoint, Event, solve_ode
from restpoint.solvers.ode import RK4, ConstantController, Kvaerno5, PIDController

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")
TIMES = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)
MOVE = torch.tensor([0.3, 0.7, -0.2], dtype=torch.float64)


def field(t, y):
    return -y * (1 + t)


def values(times, **knobs):
    y0 = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    return solve_ode(field, y0, times, rtol=1e-8, atol=1e-8, **knobs).value.sum((1, 2))


def dual(function, point, tangent):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(point, tangent))).tangent


@pytest.mark.parametrize(
    "knobs",
    [
        {"adjoint": CheckpointAdjoint()},
        {"adjoint": DirectAdjoint()},
        {"controller": PIDController(per_sample=True)},
        {"solver": RK4(), "controller": ConstantController(dt=0.1)},
        {"solver": Kvaerno5()},
    ],
    ids=["checkpoint", "direct", "per-sample", "constant", "implicit"],
)
def test_tangents_of_times_are_those_of_reverse_mode(knobs):
    def function(times):
        return values(times, **knobs)

    expected = torch.func.jacrev(function)(TIMES)
    assert expected[-1].abs()[[0, 2]].min() > 0.1
    torch.testing.assert_close(torch.func.jacfwd(function)(TIMES), expected)
    torch.testing.assert_close(torch.func.jvp(function, (TIMES,), (MOVE,))[1], expected @ MOVE)
    torch.testing.assert_close(dual(function, TIMES, MOVE), expected @ MOVE)


def test_the_time_of_an_event_moves_with_the_start():
    def when(start):
        times = torch.stack([start, start.new_tensor(5.0)])
        y0 = torch.ones((1, 1), dtype=torch.float64)
        event = Event(lambda t, y: y[:, 0] - 0.5)
        solution = solve_ode(lambda t, y: -y, y0, times, rtol=1e-8, atol=1e-8, events=event)
        return solution.event.t[0]

    start, one = TIMES[0], torch.ones((), dtype=torch.float64)
    torch.testing.assert_close(dual(when, start, one), one)
    torch.testing.assert_close(torch.func.jvp(when, (start,), (one,))[1], one)
