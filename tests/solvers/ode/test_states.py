"""States of any structure, integrals carried beside them, and the gradients of everything that a solve depends on."""

import pytest
import torch
from torch.autograd import gradcheck

from restpoint.solvers import StateError
from restpoint.solvers.ode import (
    BacksolveAdjoint,
    CheckpointAdjoint,
    ConstantController,
    DirectAdjoint,
    InterpolatedAdjoint,
    Kvaerno3,
    Midpoint,
    PIDController,
    Reversible,
    ReversibleAdjoint,
    Tsit5,
    solve_ode,
)

F64 = torch.float64
PER_SAMPLE = pytest.mark.parametrize("per_sample", [False, True])


class TestStructures:
    ANGLE = torch.linspace(0.5, 2.0, 3, dtype=F64)

    def check(self, solution, real, imag):
        factor = torch.exp(1j * self.ANGLE)
        torch.testing.assert_close(real, factor.real, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(imag, factor.imag, rtol=1e-4, atol=1e-4)

    @PER_SAMPLE
    @pytest.mark.parametrize("solver", [Tsit5(), Kvaerno3()], ids=lambda s: type(s).__name__)
    @pytest.mark.parametrize("kind", ["complex", "tuple", "list", "dict", "nested", "matrix"])
    def test_a_rotation_by_any_name(self, kind, solver, per_sample):
        w, one, zero = self.ANGLE, torch.ones(3, dtype=F64), torch.zeros(3, dtype=F64)
        field, y0, parts = {
            "complex": (lambda t, y: 1j * w * y, one + 0j, lambda v: (v.real, v.imag)),
            "tuple": (lambda t, y: (-w * y[1], w * y[0]), (one, zero), lambda v: v),
            "list": (lambda t, y: [-w * y[1], w * y[0]], [one, zero], lambda v: v),
            "dict": (lambda t, y: {"b": w * y["a"], "a": -w * y["b"]}, {"a": one, "b": zero}, lambda v: v.values()),
            "nested": (
                lambda t, y: {"p": (-w * y["q"][0][0], {}), "q": [[w * y["p"][0]]]},
                {"p": (one, {}), "q": [[zero]]},
                lambda v: (v["p"][0], v["q"][0][0]),
            ),
            "matrix": (
                lambda t, y: w[:, None, None] * torch.stack([-y[:, 1], y[:, 0]], 1),
                torch.stack([one, zero], 1).unsqueeze(-1),
                lambda v: v.squeeze(-1).unbind(-1),
            ),
        }[kind]
        control = PIDController(per_sample=per_sample)
        solution = solve_ode(
            field, y0, (0.0, 0.4, 1.0), solver=solver, controller=control, rtol=1e-5, atol=1e-6, dense=True
        )
        assert type(solution.value) is type(y0)
        real, imag = parts(solution.value)
        self.check(solution, real[-1], imag[-1])
        between = solution.interpolation(torch.tensor([1.0], dtype=F64))
        real, imag = parts(between)
        self.check(solution, real[0], imag[0])

    def test_types_are_kept(self):
        y0 = {"a": torch.ones(2, 1), "b": torch.ones(2, 3, dtype=F64), "c": torch.ones(2, dtype=torch.complex64)}
        seen = []

        def field(t, y):
            seen.append({key: part.dtype for key, part in y.items()} | {"t": t.dtype})
            return {key: -part for key, part in y.items()}

        value = solve_ode(field, y0, (0.0, 1.0)).value
        assert {key: part.dtype for key, part in value.items()} == {key: part.dtype for key, part in y0.items()}
        assert all(found == {key: part.dtype for key, part in y0.items()} | {"t": F64} for found in seen)

    def test_a_complex_state_and_a_real_derivative(self):
        with pytest.raises(StateError, match="expected dtype torch.complex128 as in the initial value, got"):
            solve_ode(lambda t, y: y.real, torch.ones(2, dtype=torch.complex128), (0.0, 1.0))

    def test_gradients_of_a_complex_state(self):
        """Those that torch itself gives for exp(rate t) y0."""
        y0 = torch.tensor([1.0 + 0.5j, -0.3 + 2j], dtype=torch.complex128, requires_grad=True)
        rate = torch.tensor([0.3 + 1j, -0.5 + 2j], dtype=torch.complex128, requires_grad=True)

        def loss(end):
            return (end.real**2 + 3 * end.imag + end.real * end.imag).sum()

        exact = torch.autograd.grad(loss(torch.exp(rate * 0.8) * y0), [y0, rate])
        for adjoint in (DirectAdjoint(), CheckpointAdjoint(), BacksolveAdjoint(), InterpolatedAdjoint()):
            end = solve_ode(lambda t, y: rate * y, y0, (0.0, 0.8), adjoint=adjoint, rtol=1e-9, atol=1e-9).value[-1]
            torch.testing.assert_close(torch.autograd.grad(loss(end), [y0, rate]), exact, rtol=1e-6, atol=1e-7)


class TestQuadratures:
    """The integral of cos(40 t) y^2 along y' = -y."""

    def field(self, t, y):
        return {"x": -y["x"], "total": torch.cos(40 * t.reshape(-1)) * y["x"][:, 0] ** 2}

    Y0 = {"x": torch.ones(2, 1, dtype=F64), "total": torch.zeros(2, dtype=F64)}

    @PER_SAMPLE
    @pytest.mark.parametrize("solver", [Tsit5(), Kvaerno3()], ids=lambda s: type(s).__name__)
    def test_take_no_part_in_step_control(self, solver, per_sample):
        control = PIDController(per_sample=per_sample)
        options = {"solver": solver, "controller": control, "rtol": 1e-4, "atol": 1e-4}
        alone = solve_ode(lambda t, x: -x, self.Y0["x"], (0.0, 1.0), **options)
        beside = solve_ode(self.field, self.Y0, (0.0, 1.0), quadrature=("total",), **options)
        watched = solve_ode(self.field, self.Y0, (0.0, 1.0), **options)
        assert beside.stats.accepted.tolist() == alone.stats.accepted.tolist()
        torch.testing.assert_close(beside.value["x"], alone.value, rtol=1e-12, atol=1e-12)
        assert (watched.stats.accepted > 1.5 * alone.stats.accepted).all()

    def test_by_index_and_with_gradients(self):
        rate = torch.tensor(1.5, dtype=F64, requires_grad=True)
        value = solve_ode(
            lambda t, y: (-rate * y[0], y[0] ** 2), (torch.ones(2, dtype=F64), torch.zeros(2, dtype=F64)), (0.0, 2.0),
            quadrature=(1,), rtol=1e-8, atol=1e-8,
        ).value[1][-1]  # fmt: skip
        exact = (1 - torch.exp(-4 * rate)) / (2 * rate)
        torch.testing.assert_close(value, exact.expand(2), rtol=1e-6, atol=0)
        torch.testing.assert_close(
            torch.autograd.grad(value[0], rate)[0], torch.autograd.grad(exact, rate)[0], rtol=1e-6, atol=0
        )


TIGHT = {"rtol": 1e-9, "atol": 1e-9}
GRADIENTS = [
    pytest.param(Tsit5(), DirectAdjoint(), id="direct"),
    pytest.param(Tsit5(), CheckpointAdjoint(), id="checkpoint"),
    pytest.param(Tsit5(), CheckpointAdjoint(segments=2), id="segments"),
    pytest.param(Tsit5(), CheckpointAdjoint(recursive=True), id="recursive"),
    pytest.param(Tsit5(), BacksolveAdjoint(**TIGHT), id="backsolve"),
    pytest.param(Tsit5(), InterpolatedAdjoint(**TIGHT), id="interpolated"),
    pytest.param(Reversible(Midpoint()), ReversibleAdjoint(), id="reversible"),
    pytest.param(Kvaerno3(), CheckpointAdjoint(), id="implicit"),
]


@pytest.mark.parametrize("times", ["shared", "per sample", "own times"])
@pytest.mark.parametrize("solver, adjoint", GRADIENTS)
def test_gradients_of_all_inputs_against_finite_differences(solver, adjoint, times):
    """Of y0, an argument, a parameter closed over, and all output times, of which the last ends the solve."""
    y0 = torch.randn(2, 2, dtype=F64, requires_grad=True)
    scale = torch.rand(2, 1, dtype=F64, requires_grad=True)
    weight = torch.randn(2, 2, dtype=F64, requires_grad=True)
    t = torch.tensor([0.1, 0.37, 0.8], dtype=F64)
    if times == "own times":
        t = t * torch.tensor([[1.0], [-0.7]], dtype=F64)
    t.requires_grad_()
    exact = isinstance(adjoint, (DirectAdjoint, CheckpointAdjoint, ReversibleAdjoint))
    # The continuous adjoints' gradients are those of the true solution, so that the steps had better be short.
    control = ConstantController(dt=0.2 if exact else 0.1, per_sample=times == "per sample")

    def run(y0, scale, weight, t):
        def field(t, y, scale):
            return torch.tanh(y @ weight) * scale + torch.sin(3 * t.reshape(-1, 1))

        value = solve_ode(field, y0, t, (scale,), solver=solver, controller=control, adjoint=adjoint).value
        return value[1:]

    slack = {"atol": 1e-5, "rtol": 1e-3} if exact else {"atol": 2e-4, "rtol": 2e-3}
    assert gradcheck(run, (y0, scale, weight, t), fast_mode=True, **slack)
