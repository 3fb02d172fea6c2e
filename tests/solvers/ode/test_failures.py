"""Bad input to solve_ode, and solves that cannot succeed: what is said, and that other samples are none the worse."""

import math
import re
import warnings

import jaxtyping
import pytest
import torch

from restpoint.solvers import SolverError, SolverWarning, StateError, Status
from restpoint.solvers.ode import (
    RK4,
    BacksolveAdjoint,
    Bosh3,
    CheckpointAdjoint,
    ConstantController,
    DirectAdjoint,
    Dopri5,
    ImplicitEuler,
    InterpolatedAdjoint,
    Kvaerno3,
    Kvaerno5,
    PIDController,
    Reversible,
    ReversibleAdjoint,
    ReversibleHeun,
    TimeError,
    Tsit5,
    solve_ode,
)
from restpoint.solvers.solution import AdjointWarning, MaxStepsWarning

F64 = torch.float64
PER_SAMPLE = pytest.mark.parametrize("per_sample", [False, True])
DIRECTION = pytest.mark.parametrize("sign", [1.0, -1.0], ids=["forwards", "backwards"])


@pytest.fixture(autouse=True)
def _as_outside_of_tests(monkeypatch):
    """Types are not checked by beartype, which would see some of this first."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def decay(t, y):
    return -y


def solve(t, y0=None, field=decay, **options):
    return solve_ode(field, torch.ones(2, 3) if y0 is None else y0, t, **options)


class TestTimes:
    @pytest.mark.parametrize(
        "t, message",
        [
            ([0.0, 1.0, 0.5], r"t\[1\] = 1 and t\[2\] = 0.5 turn back"),
            ([0.0, -1.0, -0.5], r"t\[1\] = -1 and t\[2\] = -0.5 turn back"),
            ([0.0, 1.0, 1.0], r"t\[1\] = 1 and t\[2\] = 1 are equal"),
            ([2.0, 2.0], r"t\[0\] = 2 and t\[1\] = 2 are equal"),
            ([0.0, math.nan, 1.0], r"t\[1\] is nan"),
            ([0.0, math.inf], r"t\[1\] is inf"),
            ([0.0], r"expected shape \(T,\) or .* with T >= 2, got \(1,\)"),
            (torch.tensor([0, 1]), "expected a floating-point dtype, got torch.int64"),
            (torch.zeros(3, 2), r"expected shape \(T,\) or \(batch, T\) = \(2, T\).* got \(3, 2\)"),
            (torch.zeros(2, 2, 2), r"got \(2, 2, 2\)"),
            (torch.tensor([[0.0, 1.0], [0.0, 0.0]]), r"t\[1, 0\] = 0 and t\[1, 1\] = 0 are equal"),
            (torch.tensor([[0.0, 1.0], [math.nan, 0.0]]), r"t\[1, 0\] is nan"),
            (torch.tensor([0.0, 1.0], device="meta"), "expected device cpu as the initial value's, got meta"),
            (1.0, "expected a tensor of times or a sequence of numbers"),
            (["0", "1"], "expected a tensor of times or a sequence of numbers"),
        ],
    )
    def test_refused(self, t, message):
        with pytest.raises(TimeError, match=message):
            solve(t)

    def test_close_times_are_fine(self):
        t = torch.tensor([0.0, 1.0, 1.0 + 1e-12, 2.0], dtype=F64)
        value = solve(t, torch.ones(1, 1, dtype=F64), rtol=1e-9, atol=1e-9).value
        torch.testing.assert_close(value.flatten(), torch.exp(-t), rtol=1e-7, atol=0)


class TestState:
    @pytest.mark.parametrize(
        "y0, message",
        [
            (torch.ones(2, 3, dtype=torch.long), "expected a floating-point or complex dtype, got torch.int64"),
            (torch.tensor(1.0), "expected a leading batch dimension"),
            (torch.ones(0, 3), "the batch is empty"),
            ({"x": torch.ones(2, 1), "v": torch.ones(3, 1)}, "expected a batch of 2 as in the first tensor, got 3"),
            ((torch.ones(2, 1), torch.ones(2, 1, device="meta")), "expected device cpu, got meta"),
            ([], "expected a tensor or a structure of tensors"),
        ],
    )
    def test_refused(self, y0, message):
        with pytest.raises(StateError, match=message):
            solve((0.0, 1.0), y0)


class TestField:
    @PER_SAMPLE
    @pytest.mark.parametrize("solver", [Tsit5(), Kvaerno3()], ids=repr)
    @pytest.mark.parametrize(
        "field, message",
        [
            (lambda t, y: y[:, :2], r"expected shape \(batch, 3\), got \(2, 2\)"),
            (lambda t, y: y[:1], r"expected a batch of 2, got shapes \[\(1, 3\)\]"),
            (lambda t, y: y.sum(), r"expected shape \(batch, 3\), got \(\)"),
            (lambda t, y: y.double(), "expected dtype torch.float32 as in the initial value, got torch.float64"),
            (lambda t, y: y.to(torch.complex64), "expected dtype torch.float32 .* got torch.complex64"),
            (lambda t, y: (y, y), "expected the structure of the initial value"),
            (lambda t, y: {"y": y}, "expected the structure of the initial value"),
            (lambda t, y: None, "expected the structure of the initial value|expected a tensor"),
            (lambda t, y: y.to("meta"), "expected device cpu, got meta"),
        ],
    )
    def test_returns_something_else(self, field, message, solver, per_sample):
        with pytest.raises(StateError, match=f"the field's derivative: {message}"):
            solve((0.0, 1.0), field=field, solver=solver, controller=PIDController(per_sample=per_sample))

    def test_returns_something_else_later_on(self):
        with pytest.raises(StateError, match=r"got \(2, 2\)"):
            solve((0.0, 1.0), field=lambda t, y: -y if t < 0.5 else y[:, :2])

    def test_a_part_of_a_structure_is_named(self):
        y0 = {"x": torch.ones(2, 2), "v": torch.ones(2, 2)}
        with pytest.raises(StateError, match=r"\['v'\]: expected shape \(batch, 2\), got \(2, 1\)"):
            solve((0.0, 1.0), y0, lambda t, y: {"x": y["x"], "v": y["v"][:, :1]})

    def test_what_it_raises_itself_comes_through(self):
        with pytest.raises(KeyError, match="missing"):
            solve((0.0, 1.0), field=lambda t, y: {}["missing"])


def breaking(ends, value=math.nan):
    """y' = -y up to a time of every sample's own; the last component breaks behind it."""

    def field(t, y):
        late = (t.abs() > ends).reshape(-1, 1)
        bad = torch.where(late, value, -y[:, -1:])
        return torch.cat([-y[:, :-1], bad], 1)

    return field


class TestNonFinite:
    ENDS = torch.tensor([math.inf, 0.5, math.inf, 0.25], dtype=F64)

    @DIRECTION
    @PER_SAMPLE
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    @pytest.mark.parametrize("solver", [Tsit5(), Bosh3(), Kvaerno5()], ids=repr)
    def test_others_finish(self, solver, value, per_sample, sign):
        y0 = torch.ones(4, 2, dtype=F64)
        solution = solve_ode(
            lambda t, y: sign * breaking(self.ends(t), value)(t, y), y0, (0.0, sign), solver=solver,
            controller=PIDController(per_sample=per_sample), throw=False, rtol=1e-7, atol=1e-7,
        )  # fmt: skip
        status = [Status(int(s)) for s in solution.stats.status]
        assert status[0] == status[2] == Status.CONVERGED
        assert {status[1], status[3]} <= {Status.NON_FINITE, Status.STEP_UNDERFLOW}
        torch.testing.assert_close(solution.value[-1, ::2], math.exp(-1) * y0[::2], rtol=1e-6, atol=0)
        assert solution.value[-1, 1::2].isnan().all()
        reached = (solution.reached * sign).tolist()
        assert reached[0] == reached[2] == 1.0
        assert reached[1] == pytest.approx(0.5, abs=0.02)
        assert reached[3] == pytest.approx(0.25, abs=0.02)

    def ends(self, t):
        return self.ENDS

    @PER_SAMPLE
    def test_alone_or_beside_a_broken_one(self, per_sample):
        """With steps of its own a sample takes the same ones whoever else is there, to the last bit."""
        y0 = torch.linspace(1, 2, 8, dtype=F64).view(4, 2)
        control = PIDController(per_sample=per_sample)
        found = solve_ode(breaking(self.ENDS), y0, (0.0, 1.0), controller=control, throw=False).value[-1, ::2]
        alone = solve_ode(decay, y0[::2], (0.0, 1.0), controller=control).value[-1]
        slack = {"rtol": 1e-15, "atol": 1e-15} if per_sample else {"rtol": 1e-5, "atol": 1e-6}
        torch.testing.assert_close(found, alone, **slack)

    @PER_SAMPLE
    def test_the_message(self, per_sample):
        y0 = {"x": torch.ones(4, 1, dtype=F64), "z": torch.ones(4, 2, dtype=F64)}

        def field(t, y):
            broken = breaking(self.ENDS)(t, y["z"])
            return {"x": -y["x"], "z": broken}

        with pytest.raises(SolverError) as caught:
            solve_ode(field, y0, (0.0, 1.0), controller=PIDController(per_sample=per_sample))
        message = str(caught.value)
        found = re.search(
            r"2 of 4 samples did not reach the end\. Sample 3 .* at t = ([\d.]+) with a step of ([-\d.e]+), "
            r"in y\['z'\]\[1\], after (\d+) steps\. They reached t = \{1: ([\d.]+), 3: ([\d.]+)\}\. To change: ",
            message,
        )
        assert found, message
        assert float(found[1]) == pytest.approx(0.25, abs=0.02)
        assert 0 < float(found[2]) < 0.5
        assert int(found[3]) > 0
        assert float(found[4]) == pytest.approx(0.5, abs=0.02)
        solution = caught.value.solution
        assert solution.converged.tolist() == [True, False, True, False]

    def test_a_warning_instead(self):
        with pytest.warns(SolverWarning, match="2 of 4 samples did not reach the end"):
            solution = solve_ode(breaking(self.ENDS), torch.ones(4, 2, dtype=F64), (0.0, 1.0), throw="warn")
        assert solution.value[-1, 0].isfinite().all()

    @PER_SAMPLE
    def test_from_the_start(self, per_sample):
        y0 = torch.ones(3, 2, dtype=F64)
        y0[1, 1] = math.nan
        solution = solve((0.0, 1.0), y0, controller=PIDController(per_sample=per_sample), throw=False)
        assert solution.stats.status.tolist() == [0, int(Status.NON_FINITE), 0]
        torch.testing.assert_close(solution.value[-1, ::2], math.exp(-1) * y0[::2], rtol=1e-4, atol=0)
        with pytest.raises(SolverError, match=r"Sample 1 met a NaN or an infinity at t = 0 .* in y\[1\]"):
            solve((0.0, 1.0), y0, controller=PIDController(per_sample=per_sample))

    @PER_SAMPLE
    @pytest.mark.parametrize("solver", [Tsit5(), Kvaerno3()], ids=["Tsit5", "Kvaerno3"])
    @pytest.mark.parametrize("adjoint", [CheckpointAdjoint(), CheckpointAdjoint(2)], ids=repr)
    def test_gradients_of_the_others(self, adjoint, solver, per_sample):
        """The field breaks where a state has grown too far; y' = rate y, so that dy/drate = t y."""
        y0 = torch.tensor([[1.0], [3.0], [1.2], [2.0]], dtype=F64, requires_grad=True)
        rate = torch.tensor(1.0, dtype=F64, requires_grad=True)
        solution = solve_ode(
            lambda t, y: rate * torch.where(y > 4.0, math.nan, y), y0, (0.0, 1.0), throw=False, solver=solver,
            controller=PIDController(per_sample=per_sample), adjoint=adjoint,
        )  # fmt: skip
        assert solution.converged.tolist() == [True, False, True, False]
        kept = solution.value[-1, ::2]
        got = torch.autograd.grad(kept.sum(), [y0, rate])
        assert (got[0][1::2] == 0).all()
        torch.testing.assert_close(got[0][::2], torch.full((2, 1), math.e, dtype=F64), rtol=1e-3, atol=0)
        torch.testing.assert_close(got[1], kept.detach().sum(), rtol=1e-3, atol=0)

    @PER_SAMPLE
    @pytest.mark.parametrize("nan_from", [0.0, 0.5])
    @pytest.mark.parametrize(
        "adjoint, solver",
        [
            (DirectAdjoint(), Tsit5()),
            (CheckpointAdjoint(), Tsit5()),
            (CheckpointAdjoint(segments=2), Tsit5()),
            (CheckpointAdjoint(recursive=True), Kvaerno3()),
            (BacksolveAdjoint(), Tsit5()),
            (ReversibleAdjoint(), Reversible(Tsit5())),
            (ReversibleAdjoint(), ReversibleHeun()),
        ],
        ids=repr,
    )
    def test_gradients_where_args_of_a_sample_are_broken(self, adjoint, solver, nan_from, per_sample):
        """The weight is as long as the batch by chance, and is not taken for a tensor of samples."""
        generator = torch.Generator().manual_seed(0)
        start, weight = (torch.randn(4, 4, generator=generator, dtype=F64) for _ in range(2))
        until = torch.tensor([9.0, nan_from or math.nan, 9.0, 9.0], dtype=F64)

        def field(t, y, until, weight):
            return torch.tanh(y @ weight) * torch.sqrt(until - t.reshape(-1)).unsqueeze(1)

        def gradients(samples, adjoint, solver):
            y0, until_, weight_ = (x.clone().requires_grad_() for x in (start[samples], until[samples], weight))
            solution = solve_ode(
                field, y0, (0.0, 1.0), args=(until_, weight_), solver=solver, adjoint=adjoint, rtol=1e-5, atol=1e-5,
                controller=PIDController(per_sample=per_sample), throw=False,
            )  # fmt: skip
            assert (solution.stats.status == Status.NON_FINITE).tolist() == [i == 1 for i in samples]
            kept = [i for i, sample in enumerate(samples) if sample != 1]
            by_y0, by_until, by_weight = torch.autograd.grad(
                solution.value[-1, kept].square().sum(), [y0, until_, weight_]
            )
            return by_y0[kept], by_until[kept], by_weight, by_until[[i for i in range(len(samples)) if i not in kept]]

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AdjointWarning)  # Backsolve falls back, since a sample ended early.
            *found, of_broken = gradients([0, 1, 2, 3], adjoint, solver)
        *expected, _ = gradients([0, 2, 3], DirectAdjoint(), Tsit5())
        assert of_broken.isfinite().all()
        for one, other in zip(found, expected):
            torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-3)


class TestBlowUp:
    """y' = y^2 / scale from y = 1 blows up at t0 + scale; the other sample lives twice as long."""

    @PER_SAMPLE
    @pytest.mark.parametrize(
        "solver, start, scale",
        [
            (Tsit5(), 0.0, 1.0),
            (Tsit5(), 100.0, -1.0),
            (Tsit5(), 0.0, 1e-12),
            (Bosh3(), -1e9, 1e12),
            (Kvaerno3(), 0.0, 1.0),
            (Kvaerno5(), 0.0, -1e-12),
        ],
    )
    def test_ends_where_time_is_resolved_no_more(self, solver, start, scale, per_sample):
        y0 = torch.tensor([[0.1], [1.0]], dtype=F64)
        solution = solve_ode(
            lambda t, y: y**2 / scale, y0, (start, start + 2 * scale), solver=solver, rtol=1e-3, atol=1e-6,
            controller=PIDController(per_sample=per_sample), throw=False,
        )  # fmt: skip
        assert solution.stats.status.tolist() == [Status.CONVERGED, Status.STEP_UNDERFLOW]
        assert float((solution.reached[1] - start) / scale) == pytest.approx(1.0, abs=2e-2)
        torch.testing.assert_close(solution.value[-1, 0], torch.tensor([0.125], dtype=F64), rtol=1e-2, atol=0)

    @PER_SAMPLE
    def test_the_message(self, per_sample):
        y0 = torch.tensor([[0.1, 0.1], [0.1, 1.0]], dtype=F64)
        with pytest.raises(SolverError, match=r"Sample 1 needed a step below .* at t = 1\.0000.* in y\[1\].*implicit"):
            solve((0.0, 2.0), y0, lambda t, y: y**2, controller=PIDController(per_sample=per_sample))

    def test_float32(self):
        solution = solve((0.0, 2.0), torch.tensor([[0.1], [1.0]]), lambda t, y: y**2, throw=False, rtol=1e-3)
        assert solution.stats.status.tolist() == [Status.CONVERGED, Status.STEP_UNDERFLOW]

    @PER_SAMPLE
    def test_a_first_step_below_resolution_is_no_failure(self, per_sample):
        control = PIDController(dt0=1e-25, per_sample=per_sample)
        value = solve((1.0, 2.0), torch.ones(2, 1, dtype=F64), controller=control).value[-1]
        torch.testing.assert_close(value, torch.full_like(value, math.exp(-1)), rtol=1e-4, atol=0)

    @PER_SAMPLE
    @pytest.mark.parametrize("close", [1e-15, 1e-18])
    def test_a_short_step_to_a_time_is_no_failure(self, close, per_sample):
        t = (0.0, 1e-15 if close < 1e-17 else 1.0)
        control = PIDController(step_t=(t[1] - close,), per_sample=per_sample)
        value = solve(t, torch.ones(2, 1, dtype=F64), controller=control).value[-1]
        torch.testing.assert_close(value, torch.full_like(value, math.exp(-t[1])), rtol=1e-4, atol=0)


class TestMaxSteps:
    RATES = torch.tensor([[1.0], [60.0]], dtype=F64)

    def field(self, t, y):
        return torch.cos(self.RATES * t.reshape(-1, 1)) * self.RATES

    @PER_SAMPLE
    def test_status(self, per_sample):
        control = PIDController(per_sample=per_sample)
        y0 = torch.zeros(2, 1, dtype=F64)
        solution = solve_ode(self.field, y0, (0.0, 0.5, 9.0), controller=control, max_steps=60, throw=False)
        assert solution.stats.status.tolist() == [0 if per_sample else Status.MAX_STEPS, Status.MAX_STEPS]
        assert int(solution.stats.steps[1]) == 60
        assert 0.5 < float(solution.reached[1]) < 9.0
        exact = torch.sin(0.5 * self.RATES)
        torch.testing.assert_close(solution.value[1], exact, rtol=1e-3, atol=1e-3)
        assert solution.value[2, 1].isnan().all()
        assert bool(solution.value[2, 0].isnan().all()) is not per_sample

    @PER_SAMPLE
    def test_the_message_says_how_far_each_came(self, per_sample):
        options = {"controller": PIDController(per_sample=per_sample), "max_steps": 60}
        y0 = torch.zeros(2, 1, dtype=F64)
        with pytest.raises(SolverError, match="used up max_steps .* after 60 steps") as caught:
            solve_ode(self.field, y0, (0.0, 9.0), **options)
        came = dict(re.findall(r"(\d+): ([\d.]+)", str(caught.value).split("They reached")[1]))
        failed = (~caught.value.solution.converged).nonzero().flatten().tolist()
        assert [int(i) for i in came] == failed
        for i, t in came.items():
            assert float(t) == pytest.approx(float(caught.value.solution.reached[int(i)]), rel=1e-4)
        assert "raise max_steps" in str(caught.value)
        with pytest.warns(MaxStepsWarning):
            solve_ode(self.field, y0, (0.0, 9.0), throw="warn", **options)

    def test_many_samples_are_summed_up(self):
        y0 = torch.zeros(20, 1, dtype=F64)
        rates = torch.linspace(60, 80, 20, dtype=F64).unsqueeze(1)
        with pytest.raises(SolverError, match=r"7: [\d.]+, and 12 more between [\d.]+ and [\d.]+\}"):
            solve_ode(
                lambda t, y: torch.cos(rates * t.reshape(-1, 1)) * rates, y0, (0.0, 9.0), max_steps=20,
                controller=PIDController(per_sample=True),
            )  # fmt: skip

    @pytest.mark.parametrize("adjoint", [BacksolveAdjoint(max_steps=2), InterpolatedAdjoint(max_steps=2)], ids=repr)
    def test_in_the_backward_pass(self, adjoint):
        y0 = torch.ones(2, 2, dtype=F64, requires_grad=True)
        adjoint = type(adjoint)(max_steps=2, fallback=False)
        solution = solve((0.0, 5.0), y0, lambda t, y: torch.sin(3 * y), adjoint=adjoint, rtol=1e-8, atol=1e-8)
        with pytest.raises(SolverError, match=r"used up max_steps"):
            solution.value[-1].sum().backward()


@PER_SAMPLE
@pytest.mark.parametrize("solver", [Tsit5(), Kvaerno3(), Kvaerno5(), ImplicitEuler()], ids=repr)
def test_the_component_that_breaks_is_named(solver, per_sample):
    def field(t, y):
        here = torch.tensor([[0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)
        return torch.where(here & (t.reshape(-1, 1) > 0.5), math.nan, -y)

    controller = PIDController(per_sample=per_sample)
    with pytest.raises(SolverError, match=r"Sample 1 met a NaN .* in y\[2\]"):
        solve_ode(field, torch.ones(3, 4), (0.0, 1.0), solver=solver, controller=controller, rtol=1e-3, atol=1e-3)


@PER_SAMPLE
@pytest.mark.parametrize("tolerance", [{"rtol": 0.0, "atol": 1e-12}, {"rtol": 1e-9, "atol": 1e-12}], ids=["0", "1e-9"])
def test_tolerances_that_the_solution_outgrows(per_sample, tolerance):
    """From zero, where they can be kept; one sample stays where they can."""
    y0, rate = torch.zeros(2, 2), torch.tensor([[1e-6, 1e-6], [1e-6, 1.0]])

    def field(t, y):
        return rate * torch.cos(t.reshape(-1, 1))

    options = {"controller": PIDController(per_sample=per_sample), **tolerance}
    with pytest.raises(SolverError, match=r"Sample 1 needed a step below the resolution .* in y\[1\].*float64"):
        solve_ode(field, y0, (0.0, math.pi), **options)
    solution = solve_ode(field, y0, (0.0, math.pi), throw=False, **options)
    assert solution.stats.status.tolist() == [Status.CONVERGED, Status.STEP_UNDERFLOW]
    # It is noticed at once: 1e-12 is twice the resolution of 4.2e-6.
    assert 4e-6 < float(solution.reached[1]) < 9e-6
    assert float(solution.value[-1, 0].abs().max()) < 1e-11
    assert bool(solution.value[-1, 1].isnan().all())
    # In float64 there is nothing to it.
    rate = rate.double()
    assert solve_ode(field, y0.double(), (0.0, math.pi), **options).converged.all()


class TestKnobs:
    @pytest.mark.parametrize(
        "options, message",
        [
            ({"rtol": 1e-9, "atol": 1e-12}, "ask for more than torch.float32 resolves"),
            ({"rtol": 0.0, "atol": 1e-10}, "loosen them or compute in float64"),
            ({"rtol": 0.0, "atol": 0.0}, "nor both zero"),
            ({"rtol": -1e-3}, "must not be negative"),
            ({"atol": math.inf}, "rtol and atol"),
            ({"rtol": math.nan}, "rtol and atol"),
            ({"max_steps": 0}, "max_steps must be an integer of at least 1"),
            ({"max_steps": 2.5}, "max_steps must be an integer of at least 1; got 2.5"),
            ({"solver": RK4()}, "RK4 has no error estimate .*controller=ConstantController"),
            ({"throw": "maybe"}, "throw must be True, False or 'warn'"),
            ({"quadrature": ("x",)}, r"quadrature: the state has no part \['x'\]"),
        ],
    )
    def test_values(self, options, message):
        with pytest.raises(ValueError, match=message):
            solve((0.0, 1.0), **options)

    def test_a_state_without_numbers(self):
        with pytest.raises(StateError, match=r"samples are empty \(shape \(2, 0\)\)"):
            solve((0.0, 1.0), torch.ones(2, 0))

    def test_a_quadrature_that_is_misspelt(self):
        y0 = {"position": torch.ones(2, 1), "energy": torch.ones(2)}
        with pytest.raises(ValueError, match=r"Did you mean \"?'?\['energy'\]"):
            solve((0.0, 1.0), y0, lambda t, y: y, quadrature=("enrgy",))
        with pytest.raises(ValueError, match="some part of the state must be left"):
            solve((0.0, 1.0), y0, lambda t, y: y, quadrature=("energy", "position"))

    def test_small_states_may_ask_for_more(self):
        """What float32 resolves is relative to the state."""
        solution = solve((0.0, 1.0), torch.full((2, 3), 1e-6), rtol=0.0, atol=1e-10)
        assert solution.converged.all()

    @pytest.mark.parametrize(
        "options, message",
        [
            ({"rtol": torch.tensor([1e-3, 1e-4])}, "rtol must be a number"),
            ({"solver": "tsit5"}, r"solver must be one of .*Did you mean 'Tsit5'"),
            ({"solver": Dopri5}, r"write solver=Dopri5\(\)"),
            ({"solver": "tsit5"}, r"Dopri8\(\), Euler\(\), Heun\(\), ImplicitEuler\(\), Kvaerno3"),
            ({"rtol": "x"}, "rtol must be a number; got 'x'"),
            ({"atol": None}, "atol must be a number; got None"),
            ({"events": decay}, r"events must be an Event .*Event\(decay\)"),
            ({"quadrature": "loss"}, r"quadrature must be a sequence .*\('loss',\)"),
            ({"controller": "pid"}, "controller must be one of"),
            ({"adjoint": "backsolve"}, r"adjoint must be one of .*Did you mean 'BacksolveAdjoint'"),
            ({"args": [1.0]}, "args must be a tuple"),
            ({"events": "floor"}, "events must be one of"),
            ({"tolerance": 1e-3}, "unexpected keyword argument"),
        ],
    )
    def test_types(self, options, message):
        with pytest.raises(TypeError, match=message):
            solve((0.0, 1.0), **options)

    @pytest.mark.parametrize(
        "make, message",
        [
            (lambda: PIDController(saftey=0.9), r"PIDController has no option 'saftey'. Did you mean 'safety'\?"),
            (lambda: ConstantController(dt0=0.1), r"Did you mean 'dt'\?"),
            (lambda: CheckpointAdjoint(segment=3), r"Did you mean 'segments'\?"),
            (lambda: BacksolveAdjoint(rtoll=1e-3), r"Did you mean 'rtol'\?"),
            (lambda: Tsit5(order=5), r"Tsit5 has no option 'order'"),
        ],
    )
    def test_unknown_options(self, make, message):
        with pytest.raises(TypeError, match=message):
            make()

    @pytest.mark.parametrize(
        "make, message",
        [
            (lambda: ConstantController(dt=0.0), "dt"),
            (lambda: ConstantController(), "dt"),
            (lambda: PIDController(min_step=2.0, max_step=1.0), "min_step <= max_step"),
            (lambda: PIDController(factor_min=1.5), "factor_min < 1"),
            (lambda: PIDController(safety=0.0), "safety"),
            (lambda: PIDController(dt0=-0.1), "dt0 must be positive"),
            (lambda: PIDController(p=-1.0, i=0.5), "positive sum"),
            (lambda: PIDController(step_t=(math.nan,)), "step_t: every time must be finite"),
        ],
    )
    def test_controllers(self, make, message):
        with pytest.raises(ValueError, match=message):
            make()
