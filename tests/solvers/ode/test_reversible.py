"""The reversible methods: order, inverse and stability; and the adjoint that reconstructs states with them."""

import gc
import itertools
import math

import pytest
import torch

from restpoint.solvers import SolverError
from restpoint.solvers.ode import (
    RK4,
    AsynchronousLeapfrog,
    Bosh3,
    CheckpointAdjoint,
    ConstantController,
    DirectAdjoint,
    Dopri8,
    Event,
    Heun,
    Leapfrog,
    Midpoint,
    PIDController,
    Reversible,
    ReversibleAdjoint,
    ReversibleHeun,
    SemiImplicitEuler,
    Tsit5,
    Yoshida4,
    solve_ode,
)
from restpoint.solvers.ode.method import Rhs
from restpoint.solvers.solution import AdjointWarning
from restpoint.solvers.tree import flatten

F64 = torch.float64
ADAPTIVE = [
    ReversibleHeun(),
    AsynchronousLeapfrog(),
    Reversible(Heun()),
    Reversible(Tsit5()),
    Reversible(Bosh3(), 0.99),
]
FIXED = [Reversible(Midpoint()), Reversible(RK4())]
SYMPLECTIC = [SemiImplicitEuler(), Leapfrog(), Yoshida4()]
WEIGHT = torch.tensor([[0.4, -0.7, 0.2], [0.1, 0.5, -0.3], [-0.6, 0.2, 0.3]], dtype=F64)


def name(solver):
    return f"{type(solver).__name__}-{type(solver.base).__name__}" if isinstance(solver, Reversible) else repr(solver)


def pendulum(t, y):
    return torch.stack([y[:, 1], -torch.sin(y[:, 0]) + 0.3 * torch.cos(2 * t)], 1)


def field(t, y, scale, weight=WEIGHT):
    return torch.tanh(y @ weight.T) * scale - 0.1 * y + torch.sin(3 * t).reshape(-1, 1)


def inputs():
    y0 = torch.tensor([[0.3, -1.0, 0.6], [1.1, 0.2, -0.4]], dtype=F64, requires_grad=True)
    scale = torch.tensor([[0.8], [2.3]], dtype=F64, requires_grad=True)
    return y0, scale, WEIGHT.clone().requires_grad_()


@pytest.mark.parametrize("solver", [*ADAPTIVE, *FIXED, AsynchronousLeapfrog(damping=0.9)], ids=name)
def test_observed_order(solver):
    y0 = torch.tensor([[1.0, 0.5]], dtype=F64)
    exact = solve_ode(pendulum, y0, (0.0, 2.0), solver=Dopri8(), rtol=1e-12, atol=1e-12).value[-1]
    errors = []
    for dt in (0.1, 0.05, 0.025):
        found = solve_ode(pendulum, y0, (0.0, 2.0), solver=solver, controller=ConstantController(dt=dt))
        errors.append(float((found.value[-1] - exact).norm()))
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) > solver.order - 0.35


@pytest.mark.parametrize("solver", ADAPTIVE, ids=name)
@pytest.mark.parametrize("per_sample", [False, True])
def test_adaptive_steps_and_dense_output(solver, per_sample):
    matrix = torch.tensor([[-0.1, 2.0], [-2.0, -0.1]], dtype=F64)
    y0 = torch.tensor([[1.0, 0.2], [-0.3, 4.0]], dtype=F64)
    t = torch.linspace(0, 1.5, 7, dtype=F64)
    solution = solve_ode(
        lambda t, y: y @ matrix,
        y0,
        t,
        solver=solver,
        controller=PIDController(per_sample=per_sample),
        rtol=1e-5,
        atol=1e-6,
    )
    exact = torch.stack([y0 @ torch.matrix_exp(matrix * x) for x in t])
    torch.testing.assert_close(solution.value, exact, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("solver", [*ADAPTIVE, *FIXED, *SYMPLECTIC], ids=name)
@pytest.mark.parametrize("per_sample", [False, True])
def test_undone_steps_lead_back(solver, per_sample):
    if isinstance(solver, tuple(map(type, SYMPLECTIC))):
        state = (torch.tensor([[0.4], [1.0]], dtype=F64), torch.tensor([[-0.8], [0.1]], dtype=F64))
        rhs = Rhs(lambda t, s: (s[1], -torch.sin(s[0])), (), flatten(state)[1], 2)
    else:
        state = torch.tensor([[0.4, -0.8], [1.0, 0.1]], dtype=F64)
        rhs = Rhs(lambda t, y: torch.tanh(y.flip(1)) - 0.1 * y, (), flatten(state)[1], 2)
    start, steps, h = flatten(state)[0], 100, 0.05
    times = [i * h for i in range(steps)]
    if per_sample:
        h = torch.tensor([h, -2 * h], dtype=F64)
        times = [i * h for i in range(steps)]
    with torch.no_grad():
        first = carry = solver.init(rhs, times[0], start)
        y, memory = start, None
        for t in times:
            step = solver.step(rhs, t, y, h, carry, memory)
            y, carry, memory = step.y, step.carry, step.memory
        assert float((y - start).norm()) > 0.1
        memory = None
        for t in reversed(times):
            y, carry, memory = solver.undo(rhs, t, y, h, carry, memory)
    torch.testing.assert_close(y, start, rtol=0, atol=1e-10)
    for found, expected in zip(carry, first):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_coupling_makes_stable():
    """On y' = -y the undamped methods' errors grow, and those of coupled states do not."""
    y0 = torch.ones(1, 1, dtype=F64)

    def size(solver):
        found = solve_ode(lambda t, y: -y, y0, (0.0, 60.0), solver=solver, controller=ConstantController(dt=0.2))
        return float(found.value[-1].abs())

    with torch.no_grad():
        assert size(Reversible(RK4(), coupling=0.8)) < 1e-6
        assert size(ReversibleHeun()) > 1
        assert size(AsynchronousLeapfrog()) > 1


class TestAdjoint:
    @pytest.mark.parametrize("timed", [False, True])
    @pytest.mark.parametrize("per_sample", [False, True])
    @pytest.mark.parametrize("solver", ADAPTIVE + FIXED, ids=name)
    def test_equals_the_taped_gradient(self, solver, per_sample, timed):
        """Steps without outputs inside are undone and pulled back together, the others one after the other."""
        y0, scale, weight = inputs()
        t = torch.linspace(0, 1.5, 5, dtype=F64, requires_grad=timed)
        wanted = [y0, scale, weight, t] if timed else [y0, scale, weight]
        controller = (
            ConstantController(dt=0.1, per_sample=per_sample)
            if solver.error_order is None
            else PIDController(per_sample=per_sample, jump_t=(0.7,))
        )
        gradients = []
        for adjoint in (DirectAdjoint(), ReversibleAdjoint()):
            solution = solve_ode(
                lambda t, y, s: field(t, y, s, weight),
                y0,
                t,
                (scale,),
                solver=solver,
                controller=controller,
                adjoint=adjoint,
                rtol=1e-3,
                atol=1e-3,
            )
            gradients.append(torch.autograd.grad((solution.value**3).sum(), wanted))
        for got, expected in zip(*gradients):
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("solver", [ReversibleHeun(), AsynchronousLeapfrog(), Reversible(RK4())], ids=name)
    def test_evaluates_as_often_backwards(self, solver):
        y0, scale, _ = inputs()
        controller = ConstantController(dt=0.05)
        solution = solve_ode(
            field, y0, (0.0, 1.0), (scale,), solver=solver, controller=controller, adjoint=ReversibleAdjoint()
        )
        solution.value[-1].sum().backward()
        forward, backward = (int(x.evaluations[0]) for x in (solution.stats, solution.adjoint_stats))
        assert backward <= forward + 10

    @pytest.mark.parametrize("per_sample", [False, True])
    def test_through_a_terminal_event(self, per_sample):
        y0, scale, weight = inputs()
        event = Event(lambda t, y, s: y[:, 0] - 1.25)
        gradients = []
        for adjoint in (DirectAdjoint(), ReversibleAdjoint()):
            solution = solve_ode(
                lambda t, y, s: field(t, y, s, weight),
                y0,
                (0.0, 2.0),
                (scale,),
                solver=Reversible(Bosh3()),
                controller=PIDController(per_sample=per_sample),
                adjoint=adjoint,
                events=event,
                rtol=1e-3,
                atol=1e-3,
            )
            loss = (solution.value[-1] ** 3).sum() + solution.event.t.nan_to_num().sum()
            gradients.append(torch.autograd.grad(loss, [y0, scale, weight]))
        # One sample ends long before the other, and is replaced by a copy of that.
        first, second = solution.event.t.tolist()
        assert second < 0.6 * first
        for got, expected in zip(*gradients):
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)

    def test_gradcheck_and_second_derivatives(self):
        y0, scale, _ = inputs()

        def solve(y0, scale):
            return solve_ode(
                field,
                y0,
                (0.0, 0.5),
                (scale,),
                solver=Reversible(Midpoint()),
                controller=ConstantController(dt=0.2),
                adjoint=ReversibleAdjoint(),
            ).value

        assert torch.autograd.gradcheck(solve, (y0, scale), fast_mode=True)
        assert torch.autograd.gradgradcheck(solve, (y0, scale), fast_mode=True)

    def test_within_torch_func(self):
        y0, scale, _ = inputs()

        def loss(scale):
            solution = solve_ode(
                field,
                y0.detach(),
                (0.0, 0.5),
                (scale,),
                solver=ReversibleHeun(),
                controller=ConstantController(dt=0.1),
                adjoint=ReversibleAdjoint(),
            )
            return (solution.value[-1] ** 2).sum()

        (expected,) = torch.autograd.grad(loss(scale), scale)
        torch.testing.assert_close(torch.func.grad(loss)(scale.detach()), expected, rtol=1e-10, atol=1e-12)

    def test_keeps_as_much_for_many_steps_as_for_few(self):
        y0, scale, _ = inputs()

        def kept(dt):
            solution = solve_ode(
                field,
                y0,
                (0.0, 1.0),
                (scale,),
                solver=Reversible(Midpoint()),
                controller=ConstantController(dt=dt),
                adjoint=ReversibleAdjoint(),
            )
            gc.collect()
            tensors = [x for x in gc.get_objects() if type(x) is torch.Tensor and x.shape == y0.shape]
            return len(tensors), solution

        few, many = kept(0.25), kept(0.01)
        # The first solution and what it keeps is still there when the second one is counted.
        assert many[0] <= 2 * few[0]

    def test_warns_where_the_reconstruction_drifts(self):
        y0, scale, _ = inputs()
        solution = solve_ode(
            field,
            y0,
            (0.0, 2.0),
            (scale,),
            solver=Reversible(Heun(), coupling=0.5),
            controller=ConstantController(dt=0.02),
            adjoint=ReversibleAdjoint(),
        )
        with pytest.warns(AdjointWarning, match="drifted"):
            solution.value[-1].sum().backward()

    def test_drift_is_a_knob(self):
        y0, scale, _ = inputs()
        knobs = {"solver": ReversibleHeun(), "controller": ConstantController(dt=0.1)}
        strict = solve_ode(field, y0, (0.0, 1.0), (scale,), adjoint=ReversibleAdjoint(drift=1e-30), **knobs)
        with pytest.warns(AdjointWarning, match="drifted"):
            strict.value[-1].sum().backward()

    def test_refuses_other_methods(self):
        y0, scale, _ = inputs()
        with pytest.raises(ValueError, match=r"needs a reversible method, got solver=Tsit5\(\)"):
            solve_ode(field, y0, (0.0, 1.0), (scale,), adjoint=ReversibleAdjoint())

    @pytest.mark.parametrize("per_sample", [False, True])
    def test_falls_back_where_no_step_is_stable(self, per_sample):
        def oscillator(t, y, mu):
            x, v = y.unbind(1)
            return torch.stack([v, mu * (1 - x**2) * v - x], 1)

        def gradient(solver, adjoint, record=True):
            mu = torch.tensor([1.0, 50.0], dtype=F64, requires_grad=True)
            y0 = torch.tensor([[2.0, 0.0]] * 2, dtype=F64)
            with torch.set_grad_enabled(record):
                found = solve_ode(
                    oscillator, y0, (0.0, 5.0), args=(mu,), solver=solver, adjoint=adjoint,
                    controller=PIDController(per_sample=per_sample),
                ).value[-1]  # fmt: skip
            return found.detach(), torch.autograd.grad(found.sum(), mu)[0] if record else None

        expected = gradient(Tsit5(), CheckpointAdjoint())
        for record in (True, False):
            with pytest.warns(AdjointWarning, match=r"drifted apart.*sample 1 before t.*Falling back to Tsit5"):
                found = gradient(Reversible(Tsit5()), ReversibleAdjoint(), record)
            assert torch.equal(found[0], expected[0])
            assert not record or torch.equal(found[1], expected[1])

    def test_a_broken_sample_leaves_the_gradient_of_the_others(self):
        y0, scale, _ = inputs()
        ends = torch.tensor([[0.2], [9.0]], dtype=F64)

        def breaks(t, y, scale):
            return torch.where(t.reshape(-1, 1) < ends, field(t, y, scale), torch.nan)

        knobs = {
            "solver": Reversible(Bosh3()),
            "controller": PIDController(per_sample=True),
            "adjoint": ReversibleAdjoint(),
        }
        solution = solve_ode(breaks, y0, (0.0, 0.4), (scale,), throw=False, **knobs)
        assert solution.converged.tolist() == [False, True]
        (gradient,) = torch.autograd.grad(solution.value[-1, 1].sum(), y0)
        alone = solve_ode(field, y0[1:], (0.0, 0.4), (scale[1:],), **knobs)
        (expected,) = torch.autograd.grad(alone.value[-1].sum(), y0)
        torch.testing.assert_close(gradient[1], expected[1], rtol=1e-9, atol=1e-10)
        with pytest.raises(SolverError, match="Sample 0"):
            solve_ode(breaks, y0, (0.0, 0.4), (scale,), **knobs)


class TestKnobs:
    @pytest.mark.parametrize("coupling", [0.0, 1.1])
    def test_coupling(self, coupling):
        with pytest.raises(ValueError, match="coupling"):
            Reversible(coupling=coupling)

    def test_base(self):
        with pytest.raises(TypeError, match="base"):
            Reversible(ReversibleHeun())

    @pytest.mark.parametrize("damping", [0.5, 1.2])
    def test_damping(self, damping):
        with pytest.raises(ValueError, match="damping"):
            AsynchronousLeapfrog(damping=damping)

    def test_unknown_option(self):
        with pytest.raises(TypeError, match="coupling"):
            Reversible(couplng=0.9)
