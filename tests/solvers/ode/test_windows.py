"""Small states, whose steps are pulled back many at once: the same gradients as step by step."""

import math

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

from restpoint.solvers import SolverError
from restpoint.solvers.ode import (
    RK4,
    Bosh3,
    CheckpointAdjoint,
    ConstantController,
    DirectAdjoint,
    Dopri8,
    Event,
    PIDController,
    Tsit5,
    adjoint_checkpoint,
    solve_ode,
    windows,
)

F64 = torch.float64
TIMES = ["shared", "per sample", "own times"]


class Field(nn.Module):
    """Of few numbers; counts its evaluations. Uses parameters, an argument per sample and a tensor made before."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 2, dtype=F64))
        self.base = torch.randn(2, dtype=F64, requires_grad=True)
        self.calls = 0

    def forward(self, t, y, scale):
        self.calls += 1
        return self.change(t, torch.tanh(y @ self.weight) * scale + torch.sin(3 * t).reshape(-1, 1) * self.base)

    def change(self, t, out):
        return out


class Problem:
    def __init__(self, field=None, times="shared", dtype=F64):
        self.field = field or Field()
        self.y0 = torch.randn(3, 2, dtype=dtype, requires_grad=True)
        self.scale = torch.rand(3, 1, dtype=dtype).add(0.5).requires_grad_()
        self.t = torch.linspace(0, 2, 5, dtype=dtype)
        if times == "own times":
            self.t = self.t * torch.tensor([[0.7], [1.0], [-1.2]], dtype=dtype)
        self.per_sample = times == "per sample"

    def solve(self, adjoint, dense=False, controller=None, **options):
        control = controller or PIDController(per_sample=self.per_sample)
        options = {"rtol": 1e-5, "atol": 1e-5} | options
        return solve_ode(
            self.field, self.y0, self.t, (self.scale,), adjoint=adjoint, controller=control, dense=dense, **options
        )

    def gradients(self, adjoint, dense=False, **options):
        solution = self.solve(adjoint, dense, **options)
        loss = (solution.value**3).nansum()
        if dense:
            loss = loss + solution.interpolation(torch.tensor([0.1, 0.45, 0.46], dtype=F64)).pow(2).sum()
        calls = self.field.calls
        found = torch.autograd.grad(loss, [self.y0, self.scale, self.field.weight, self.field.base])
        return found, self.field.calls - calls, int(solution.stats.accepted.max())

    def check(self, at_once, slack=1e-10, **options):
        """The gradient is that of the recorded steps, and was found with as few calls as it should take."""
        found, calls, steps = self.gradients(CheckpointAdjoint(), **options)
        expected, _, _ = self.gradients(DirectAdjoint(), **options)
        torch.testing.assert_close(found, expected, rtol=slack, atol=slack)
        stages = options.get("solver", Tsit5()).tableau.stages
        assert (calls < steps * stages / 2) is at_once


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("times", ["shared", "per sample"])
@pytest.mark.parametrize("solver", [Bosh3(), Tsit5(), Dopri8(), RK4()], ids=lambda s: type(s).__name__)
def test_gradients(solver, times, dense):
    tolerance = 1e-5 if isinstance(solver, Bosh3) else 1e-8
    options = {"solver": solver, "dense": dense, "rtol": tolerance, "atol": tolerance}
    if isinstance(solver, RK4):
        options["controller"] = ConstantController(dt=0.03, per_sample=times == "per sample")
    Problem(times=times).check(True, **options)


def test_gradients_with_times_of_their_own():
    Problem(times="own times").check(True, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("limit", [8 * 2**20, 500], ids=["all kept", "some kept"])
@pytest.mark.parametrize("times", TIMES)
def test_many_windows(times, limit, monkeypatch):
    monkeypatch.setattr(windows, "_WINDOW", 5 * 48)
    monkeypatch.setattr(adjoint_checkpoint, "_TAPED", limit)
    problem = Problem(times=times)
    found, _, steps = problem.gradients(CheckpointAdjoint(), rtol=1e-9, atol=1e-9)
    assert steps > 20
    torch.testing.assert_close(
        found, problem.gradients(DirectAdjoint(), rtol=1e-9, atol=1e-9)[0], rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("times", ["shared", "per sample"])
def test_jumps_and_backwards_in_time(times):
    problem = Problem(times=times)
    problem.t = -problem.t
    control = PIDController(jump_t=(-0.71,), step_t=(-1.3,), per_sample=problem.per_sample)
    problem.check(True, controller=control, rtol=1e-8, atol=1e-8)


def test_float32():
    class Single(Field):
        def __init__(self):
            super().__init__()
            self.float()
            self.base = self.base.detach().float().requires_grad_()

    Problem(Single(), dtype=torch.float32).check(True, slack=1e-4, rtol=1e-4, atol=1e-4, solver=Bosh3())


class TestStepByStep:
    """What cannot be done at once is done step by step, and the gradient is none the worse."""

    def test_samples_that_depend_on_each_other(self):
        class Coupled(Field):
            def change(self, t, out):
                return out - 0.1 * out.mean(0)

        Problem(Coupled()).check(False)
        # With steps of their own such samples have no common time, and no two solves meet.
        with pytest.raises(SolverError, match="gave other values"):
            Problem(Coupled(), "per sample").gradients(CheckpointAdjoint())

    def test_samples_that_depend_on_each_other_towards_the_end(self):
        class Coupled(Field):
            def change(self, t, out):
                return out - torch.relu(t - 1.9) * out.mean(0)

        Problem(Coupled()).check(False)

    @pytest.mark.parametrize("look", [float, bool, lambda t: t.numpy(), lambda t: t.item()])
    def test_control_flow_that_looks_at_the_time(self, look):
        class Looking(Field):
            def change(self, t, out):
                return out if look(t.detach()) else out * 1.0

        Problem(Looking()).check(False)

    def test_a_function_that_cannot_be_mapped(self):
        class Double(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return 2 * x

            @staticmethod
            def backward(ctx, bar):
                return 2 * bar

        class Custom(Field):
            def change(self, t, out):
                return Double.apply(out)

        Problem(Custom()).check(False)

    def test_derivatives_inside(self):
        class Energy(Field):
            def change(self, t, out):
                with torch.enable_grad():
                    x = out if out.requires_grad else out.detach().requires_grad_()
                    return torch.autograd.grad((x**2 * self.base).sum(), x, create_graph=True)[0]

        Problem(Energy()).check(False)

    def test_a_sample_that_breaks(self):
        problem = Problem()
        problem.y0 = torch.tensor([[1.0, 1.0], [3.0, 3.0], [1.1, 0.9]], dtype=F64, requires_grad=True)

        class Breaking(Field):
            def forward(self, t, y, scale):
                self.calls += 1
                return torch.where(y > 5, math.nan, y + 0 * scale + 0 * self.weight.sum() + 0 * self.base)

        problem.field = Breaking()
        problem.t = torch.tensor([0.0, 0.7, 1.3], dtype=F64)
        solution = problem.solve(CheckpointAdjoint(), throw=False)
        assert solution.converged.tolist() == [True, False, True]
        (found,) = torch.autograd.grad(solution.value[-1, ::2].sum(), problem.y0)
        assert (found[1] == 0).all()
        torch.testing.assert_close(found[::2], torch.full((2, 2), math.exp(1.3), dtype=F64), rtol=1e-4, atol=0)

    def test_an_event(self):
        problem = Problem()
        event = Event(lambda t, y, scale: t - torch.tensor([0.5, 1.0, 3.0], dtype=F64))
        found, expected = (problem.gradients(a, events=event)[0] for a in (CheckpointAdjoint(), DirectAdjoint()))
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)

    def test_larger_states(self, monkeypatch):
        monkeypatch.setattr(windows, "_COLUMNS", 1)
        _, calls, _ = Problem().gradients(CheckpointAdjoint())
        assert calls == 0


class TestWhatStays:
    def test_second_derivatives(self):
        problem = Problem()
        results = []
        for adjoint in (CheckpointAdjoint(), DirectAdjoint()):
            loss = (problem.solve(adjoint).value ** 3).sum()
            (first,) = torch.autograd.grad(loss, problem.field.weight, create_graph=True)
            results.append(torch.autograd.grad(first.pow(2).sum(), [problem.y0, problem.field.base]))
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)

    def test_backward_twice(self):
        problem = Problem()
        loss = problem.solve(CheckpointAdjoint()).value.sum()
        first, second = (torch.autograd.grad(loss, problem.y0, retain_graph=True)[0] for _ in range(2))
        torch.testing.assert_close(first, second, rtol=0, atol=0)

    def test_a_field_that_changes_is_noticed(self):
        class Restless(Field):
            def change(self, t, out):
                return out * (1 + 0.01 * self.calls)

        problem = Problem(Restless())
        solution = problem.solve(CheckpointAdjoint(), solver=RK4(), controller=ConstantController(dt=0.1))
        with pytest.raises(SolverError, match="gave other values"):
            solution.value.sum().backward()

    def test_a_tensor_that_was_not_used_at_the_start_is_noticed(self):
        hidden = [torch.tensor(1.0, dtype=F64, requires_grad=True)]

        def later(out):
            return out * hidden[0]

        class Opaque:
            __slots__ = ("call",)

        opaque = Opaque()
        opaque.call = later

        class Late(Field):
            def change(self, t, out):
                return opaque.call(out) if self.calls > 20 else out

        solution = Problem(Late()).solve(CheckpointAdjoint())
        with pytest.raises(SolverError, match=r"Between t = .* did not use at the start"):
            solution.value.sum().backward()

    def test_statistics(self):
        problem = Problem()
        solution = problem.solve(CheckpointAdjoint())
        solution.value.sum().backward()
        stats = solution.adjoint_stats
        assert (stats.accepted == solution.stats.accepted).all()
        assert (stats.evaluations >= 6 * stats.accepted).all()


def test_a_field_that_is_checkpointed_itself():
    """Its evaluations are repeated in the backward pass, outside of the mapping over steps."""
    net, y0 = nn.Linear(2, 2, dtype=F64), torch.randn(3, 2, dtype=F64, requires_grad=True)

    def checkpointed(t, y):
        return torch.utils.checkpoint.checkpoint(net, y, use_reentrant=False)

    def gradients(field):
        value = solve_ode(field, y0, (0.0, 0.5, 1.0), rtol=1e-4, atol=1e-4).value
        return torch.autograd.grad(value[1:].square().sum(), [y0, *net.parameters()])

    torch.testing.assert_close(gradients(checkpointed), gradients(lambda t, y: net(y)), rtol=1e-10, atol=1e-12)
