"""Controllers: how the error is kept, how steps are bounded and made to land, and where samples and outputs end."""

import math

import pytest
import torch

from restpoint.solvers import Status
from restpoint.solvers.ode import (
    RK4,
    Bosh3,
    ConstantController,
    Dopri5,
    IController,
    Kvaerno3,
    Kvaerno5,
    Leapfrog,
    PIController,
    PIDController,
    ReversibleHeun,
    Tsit5,
    solve_ode,
)

F64 = torch.float64
PER_SAMPLE = pytest.mark.parametrize("per_sample", [False, True])
DIRECTION = pytest.mark.parametrize("sign", [1.0, -1.0], ids=["forwards", "backwards"])


def oscillate(t, y):
    return torch.stack([y[:, 1], -y[:, 0]], 1)


class Watch:
    """A field that notes the times it is evaluated at, each sample's for itself."""

    def __init__(self, field=oscillate, batch=2):
        self.field, self.batch, self.times = field, batch, []

    def __call__(self, t, y):
        self.times.append(t.detach().double().expand(self.batch).clone())
        return self.field(t, y)


def steps_of(solution):
    """The lengths of each sample's steps, in order."""
    interpolation = solution.interpolation
    h = interpolation._h if interpolation._h.ndim == 2 else interpolation._h.unsqueeze(1)
    return [column[column != 0] for column in h.T]


Y0 = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=F64)


@DIRECTION
@PER_SAMPLE
@pytest.mark.parametrize("solver", [Bosh3(), Tsit5()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize(
    "controller", [PIDController, PIController, IController, lambda **k: PIDController(p=0.3, i=0.3, d=0.1, **k)],
    ids=["PID", "PI", "I", "all gains"],
)  # fmt: skip
def test_the_error_follows_the_tolerance(controller, solver, per_sample, sign):
    errors, steps = [], []
    for rtol in (1e-2, 1e-5):
        control = controller(per_sample=per_sample)
        solution = solve_ode(oscillate, Y0, (0.0, sign * 3), solver=solver, controller=control, rtol=rtol, atol=rtol)
        exact = math.cos(3.0), math.sin(sign * 3.0)
        turned = torch.stack([Y0[:, 0] * exact[0] + Y0[:, 1] * exact[1], Y0[:, 1] * exact[0] - Y0[:, 0] * exact[1]], 1)
        errors.append(float((solution.value[-1] - turned).abs().max()))
        steps.append(int(solution.stats.accepted.max()))
    assert errors[0] < 0.1
    assert errors[1] < 1e-3
    assert errors[1] < 0.05 * errors[0]
    assert steps[1] > 1.5 * steps[0]


class TestBounds:
    @DIRECTION
    @PER_SAMPLE
    def test_max_step(self, per_sample, sign):
        control = PIDController(max_step=0.1, per_sample=per_sample)
        solution = solve_ode(oscillate, Y0, (0.0, sign * 2.05), controller=control, rtol=1e-2, atol=1e-2, dense=True)
        for h in steps_of(solution):
            assert (h * sign > 0).all()
            assert float(h.abs().max()) <= 0.1 * (1 + 2e-3)
            assert len(h) >= 21

    @DIRECTION
    @PER_SAMPLE
    def test_min_step(self, per_sample, sign):
        """No step is shorter but the one that lands, and an error too large at this length is accepted."""
        control = PIDController(min_step=0.3, per_sample=per_sample)
        solution = solve_ode(oscillate, Y0, (0.0, sign * 2.0), controller=control, rtol=1e-9, atol=1e-9, dense=True)
        for h in steps_of(solution):
            assert float(h[:-1].abs().min()) == pytest.approx(0.3)
            assert len(h) == 7
        assert (solution.stats.residual > 1).all()
        assert solution.converged.all()

    @PER_SAMPLE
    def test_first_step(self, per_sample):
        control = PIDController(dt0=0.0123, per_sample=per_sample)
        solution = solve_ode(oscillate, Y0, (0.0, -2.0), controller=control, dense=True)
        for h in steps_of(solution):
            assert float(h[0]) == pytest.approx(-0.0123)

    @DIRECTION
    @PER_SAMPLE
    @pytest.mark.parametrize("solver", [RK4(), Tsit5(), Leapfrog(), ReversibleHeun(), Kvaerno3()], ids=repr)
    def test_constant(self, solver, per_sample, sign):
        control = ConstantController(dt=0.25, per_sample=per_sample)
        solution = solve_ode(
            lambda t, y: (y[1], -y[0]), tuple(Y0), (0.0, sign * 1.1), solver=solver, controller=control, dense=True
        )
        for h in steps_of(solution):
            torch.testing.assert_close(h, sign * torch.tensor([0.25] * 4 + [0.1], dtype=F64))
        assert (solution.stats.accepted == 5).all()
        assert (solution.stats.rejected == 0).all()


class TestLanding:
    TIMES = (0.77, 0.2, 5.0, -0.4)

    @DIRECTION
    @PER_SAMPLE
    @pytest.mark.parametrize("solver", [Tsit5(), RK4(), Kvaerno3()], ids=lambda s: type(s).__name__)
    def test_step_t(self, solver, per_sample, sign):
        kind = ConstantController if isinstance(solver, RK4) else PIDController
        knobs = {"dt": 0.3} if isinstance(solver, RK4) else {}
        control = kind(step_t=[sign * t for t in self.TIMES], per_sample=per_sample, **knobs)
        solution = solve_ode(oscillate, Y0, (0.0, sign), solver=solver, controller=control, dense=True)
        for h in steps_of(solution):
            ends = (h.cumsum(0) * sign).tolist()
            for t in (0.2, 0.77, 1.0):
                assert min(abs(end - t) for end in ends) < 1e-15

    @DIRECTION
    @PER_SAMPLE
    @pytest.mark.parametrize("dtype", [torch.float32, F64])
    @pytest.mark.parametrize("solver", [Tsit5(), Kvaerno3(), RK4()], ids=lambda s: type(s).__name__)
    def test_jump_t(self, solver, dtype, per_sample, sign):
        """y' = 1 up to the jump and 3 after it: a method that knows of it makes no error."""
        place = 0.37

        def field(t, y):
            assert not (t == sign * torch.tensor(place, dtype=dtype)).any()
            return torch.where(t.reshape(-1, 1) * sign < place, 1.0, 3.0).to(y.dtype).expand_as(y)

        kind = ConstantController if isinstance(solver, RK4) else PIDController
        knobs = {"dt": 0.3} if isinstance(solver, RK4) else {}
        control = kind(jump_t=(sign * place,), per_sample=per_sample, **knobs)
        y0 = torch.zeros(2, 1, dtype=dtype)
        solution = solve_ode(field, y0, (0.0, sign * 0.5, sign), solver=solver, controller=control)
        expected = sign * torch.tensor([0.0, place + 3 * (0.5 - place), place + 3 * (1 - place)], dtype=dtype)
        torch.testing.assert_close(solution.value[:, 0, 0], expected, rtol=0, atol=1e-6 if dtype is F64 else 1e-5)
        assert int(solution.stats.rejected.max()) == 0

    def test_a_jump_that_nobody_told_of_costs_rejections(self):
        solution = solve_ode(
            lambda t, y: torch.where(t < 0.37, 1.0, 3.0).to(y).expand_as(y), torch.zeros(2, 1, dtype=F64), (0.0, 1.0)
        )
        assert int(solution.stats.rejected.max()) > 3


class TestTimesPerSample:
    """y' = -rate y, whose solution is known at any time."""

    RATES = torch.tensor([[1.0], [20.0], [0.1]], dtype=F64)

    def field(self, t, y):
        return -self.RATES * (y - torch.sin(t).reshape(-1, 1)) + torch.cos(t).reshape(-1, 1)

    def exact(self, t):
        """At times (T, batch), from y = 1 + sin(t0)."""
        return (torch.exp(-self.RATES.T * (t - t[0])) + torch.sin(t)).unsqueeze(-1)

    @DIRECTION
    @pytest.mark.parametrize("solver", [Tsit5(), Kvaerno5(), RK4()], ids=lambda s: type(s).__name__)
    def test_outputs(self, solver, sign):
        """Every sample starts, goes by and ends at times of its own; one goes the other way."""
        t = sign * torch.tensor([[0.0, 0.3, 0.31, 2.0], [1.0, 1.1, 1.15, 1.2], [0.5, 0.2, -0.3, -1.0]], dtype=F64)
        y0 = 1 + torch.sin(t[:, :1])
        control = ConstantController(dt=0.01) if isinstance(solver, RK4) else PIDController()
        solution = solve_ode(self.field, y0, t, solver=solver, controller=control, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(solution.value, self.exact(t.T), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(solution.reached, t[:, -1])
        assert solution.value.shape == (4, 3, 1)

    def test_a_sample_is_solved_as_if_it_were_alone(self):
        t = torch.tensor([[0.0, 0.3, 2.0], [1.0, 1.1, 1.2], [0.5, -0.3, -1.0]], dtype=F64)
        y0 = 1 + torch.sin(t[:, :1])
        together = solve_ode(self.field, y0, t)
        for i in range(3):
            alone = solve_ode(
                lambda t, y: -self.RATES[i] * (y - torch.sin(t).reshape(-1, 1)) + torch.cos(t).reshape(-1, 1),  # noqa: B023
                y0[i : i + 1],
                t[i : i + 1],
            )
            torch.testing.assert_close(together.value[:, i], alone.value[:, 0], rtol=1e-14, atol=1e-14)
            assert int(together.stats.accepted[i]) == int(alone.stats.accepted[0])

    def test_fewer_steps_for_the_easy_ones(self):
        y0 = torch.ones(3, 1, dtype=F64)
        shared, own = (
            solve_ode(self.field, y0, (0.0, 5.0), controller=PIDController(per_sample=flag)) for flag in (False, True)
        )
        assert len(set(shared.stats.accepted.tolist())) == 1
        assert int(own.stats.accepted[2]) < 0.5 * int(own.stats.accepted[1])
        assert (own.stats.status == Status.CONVERGED).all()


class TestDenseOutput:
    @DIRECTION
    @PER_SAMPLE
    @pytest.mark.parametrize("solver", [Tsit5(), Dopri5(), Kvaerno5()], ids=lambda s: type(s).__name__)
    def test_value_and_derivative_anywhere(self, solver, per_sample, sign):
        t = (0.0, sign * 4.0)
        solution = solve_ode(
            oscillate, Y0, t, solver=solver, controller=PIDController(per_sample=per_sample), dense=True, rtol=1e-8,
            atol=1e-8,
        )  # fmt: skip
        times = sign * torch.rand(50, dtype=F64) * 4.0
        cos, sin = torch.cos(times).unsqueeze(1), torch.sin(times).unsqueeze(1)
        exact = torch.stack([Y0[:, 0] * cos + Y0[:, 1] * sin, Y0[:, 1] * cos - Y0[:, 0] * sin], -1)
        rates = torch.stack([exact[..., 1], -exact[..., 0]], -1)
        torch.testing.assert_close(solution.interpolation(times), exact, rtol=0, atol=1e-6)
        torch.testing.assert_close(solution.interpolation.derivative(times), rates, rtol=0, atol=1e-4)
        own = times.view(2, 25)
        torch.testing.assert_close(
            solution.interpolation(own),
            torch.stack([solution.interpolation(own[i])[:, i] for i in range(2)], 1),
        )

    def test_equals_the_outputs(self):
        t = torch.linspace(0, 4, 9, dtype=F64)
        solution = solve_ode(oscillate, Y0, t, dense=True)
        torch.testing.assert_close(solution.interpolation(t), solution.value, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("t", [[4.1], [-0.1], [math.nan], [[0.0], [1.0], [2.0]]])
    def test_times_outside(self, t):
        solution = solve_ode(oscillate, Y0, (0.0, 4.0), dense=True)
        with pytest.raises(ValueError, match="the solve reaches from 0 to 4|expected shape"):
            solution.interpolation(torch.tensor(t, dtype=F64))
        assert solve_ode(oscillate, Y0, (0.0, 4.0)).interpolation is None


def test_the_field_is_asked_no_more_often_than_needed():
    """Tsit5 hands its last stage on: six evaluations a step, one at the start, and one to find the first step."""
    watch = Watch()
    with torch.no_grad():
        solution = solve_ode(watch, Y0, (0.0, 5.0))
    steps = int(solution.stats.steps[0])
    assert len(watch.times) == 6 * steps + 2 == int(solution.stats.evaluations[0])
    watch = Watch()
    control = ConstantController(dt=0.1)
    solve_ode(watch, Y0, torch.linspace(0, 5, 7, dtype=F64), solver=Tsit5(), controller=control)
    # One more where gradients may be wanted, to find out what the field depends on.
    assert len(watch.times) == 6 * 50 + 2
    # No evaluation lies behind the last time.
    assert float(torch.stack(watch.times).max()) <= 5.0
