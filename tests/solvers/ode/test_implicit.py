"""The implicit methods: their tableaus, their orders, stiff problems, Newton's method and its failures."""

import itertools
import math

import numpy as np
import pytest
import torch

from restpoint.solvers import SolverError
from restpoint.solvers.linear import GMRES
from restpoint.solvers.ode import (
    ConstantController,
    ImplicitEuler,
    Kvaerno3,
    Kvaerno5,
    PIDController,
    StageNewton,
    solve_ode,
)

METHODS = [ImplicitEuler, Kvaerno3, Kvaerno5]
ORDERS = {ImplicitEuler: 1, Kvaerno3: 3, Kvaerno5: 5}
F64 = torch.float64


def van_der_pol(t, y, mu=1000.0):
    position, speed = y.unbind(-1)
    return torch.stack([speed, mu * (1 - position**2) * speed - position], -1)


def robertson(t, y, rates=None):
    k1, k2, k3 = (0.04, 1e4, 3e7) if rates is None else rates
    a, b, c = y.unbind(-1)
    return torch.stack([-k1 * a + k2 * b * c, k1 * a - k2 * b * c - k3 * b * b, k3 * b * b], -1)


def pendulum(t, y):
    return torch.stack([y[:, 1], -torch.sin(y[:, 0]) + 0.3 * torch.cos(2 * t)], 1)


class TestTableaus:
    @pytest.mark.parametrize(
        "method, order, embedded, interpolant", [(ImplicitEuler, 1, 2, 1), (Kvaerno3, 3, 2, 3), (Kvaerno5, 5, 4, 4)]
    )
    def test_order_conditions(self, method, order, embedded, interpolant):
        tableau = method.tableau
        assert tableau.order == order == method().order
        assert tableau.embedded_order == embedded
        assert method().error_order == min(order, embedded) + 1
        assert tableau.interpolant_order == interpolant

    @pytest.mark.parametrize("method", METHODS)
    def test_shape(self, method):
        tableau = method.tableau
        assert tableau.fsal
        assert not tableau.explicit
        assert len({row[-1] for row in tableau.a[1:]}) == 1
        assert all(len(row) == i + 1 for i, row in enumerate(tableau.a))

    @pytest.mark.parametrize("method", METHODS)
    def test_a_stable_and_damping_at_infinity(self, method):
        growth = stability(method.tableau.a, method.tableau.b)
        assert max(abs(growth(1j * y)) for y in np.geomspace(1e-3, 1e6, 2000)) <= 1 + 1e-12
        assert abs(growth(-1e9)) < 1e-6

    @pytest.mark.parametrize("method", [Kvaerno3, Kvaerno5])
    def test_embedded_method_is_a_stable(self, method):
        tableau = method.tableau
        growth = stability(tableau.a, tuple(b - e for b, e in zip(tableau.b, tableau.error)))
        assert max(abs(growth(1j * y)) for y in np.geomspace(1e-3, 1e6, 2000)) <= 1 + 1e-12


def stability(a, b):
    stages = len(b)
    matrix = np.array([list(row) + [0.0] * (stages - len(row)) for row in a])
    return lambda z: 1 + z * np.array(b) @ np.linalg.solve(np.eye(stages) - z * matrix, np.ones(stages))


@pytest.mark.parametrize("method", METHODS)
def test_observed_order(method):
    y0 = torch.tensor([[1.0, 0.5]], dtype=F64)
    exact = solve_ode(pendulum, y0, (0.0, 2.0), solver=Kvaerno5(), rtol=1e-13, atol=1e-13).value[-1]
    errors = []
    for dt in (0.2, 0.1, 0.05):
        found = solve_ode(
            pendulum, y0, (0.0, 2.0), solver=method(), controller=ConstantController(dt=dt), rtol=1e-12, atol=1e-12
        )
        errors.append(float((found.value[-1] - exact).norm()))
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(ORDERS[method], abs=0.3)


@pytest.mark.parametrize("method, order", [(Kvaerno3, 4), (Kvaerno5, 5)])
def test_dense_output_converges(method, order):
    y0 = torch.tensor([[1.0, 0.5]], dtype=F64)
    errors = []
    for dt in (0.2, 0.1):
        # One step: the interpolant's own error, of one order more than its conditions.
        t = torch.linspace(0, dt, 9, dtype=F64)
        exact = solve_ode(pendulum, y0, t, solver=Kvaerno5(), rtol=1e-13, atol=1e-13, controller=steps_at(t))
        found = solve_ode(
            pendulum, y0, t, solver=method(), controller=ConstantController(dt=dt), rtol=1e-13, atol=1e-13
        )
        errors.append(float((found.value - exact.value).abs().max()))
    assert math.log2(errors[0] / errors[1]) > order - 0.4


def steps_at(t):
    return PIDController(step_t=tuple(t.tolist()))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("end", [1.5, -1.0])
def test_linear_system(method, end):
    matrix = torch.tensor([[-0.5, 2.0], [-2.0, -0.3]], dtype=F64)
    y0 = torch.tensor([[1.0, 0.2], [-0.3, 2.0]], dtype=F64)
    t = torch.linspace(0, end, 7, dtype=F64)
    solution = solve_ode(lambda t, y: y @ matrix, y0, t, solver=method(), rtol=1e-4, atol=1e-6)
    exact = torch.stack([y0 @ torch.matrix_exp(matrix * x) for x in t])
    # What is controlled is each step's error, and a method of order one takes many steps.
    close = 0.05 if method is ImplicitEuler else 1e-3
    torch.testing.assert_close(solution.value, exact, rtol=close, atol=close)
    assert solution.converged.all()


class TestStiff:
    """Steps are compared with those that diffrax 0.7 takes with Kvaerno5 and its default controller."""

    def test_van_der_pol_start(self):
        y0 = torch.tensor([[2.0, 0.0]], dtype=F64)
        solution = solve_ode(van_der_pol, y0, (0.0, 1.0), solver=Kvaerno5(), rtol=1e-6, atol=1e-8)
        expected = torch.tensor([[1.99933337050630, -6.67037123e-4]], dtype=F64)
        torch.testing.assert_close(solution.value[-1], expected, rtol=1e-6, atol=1e-8)
        assert int(solution.stats.steps) <= 19

    def test_van_der_pol_to_the_second_jump(self):
        y0 = torch.tensor([[2.0, 0.0]], dtype=F64)
        solution = solve_ode(van_der_pol, y0, (0.0, 2000.0), solver=Kvaerno5(), rtol=1e-6, atol=1e-8)
        expected = torch.tensor([[1.706167732170483, -8.928097010247975e-4]], dtype=F64)
        torch.testing.assert_close(solution.value[-1], expected, rtol=1e-5, atol=1e-7)
        assert int(solution.stats.steps) <= 600

    def test_robertson(self):
        y0 = torch.tensor([[1.0, 0.0, 0.0]], dtype=F64)
        solution = solve_ode(robertson, y0, (0.0, 1e5), solver=Kvaerno5(), rtol=1e-6, atol=1e-8)
        expected = torch.tensor([[1.78659211e-2, 7.27475147e-8, 9.82134006e-1]], dtype=F64)
        torch.testing.assert_close(solution.value[-1], expected, rtol=1e-5, atol=1e-9)
        assert int(solution.stats.steps) <= 100
        assert float(solution.value[-1].sum()) == pytest.approx(1, abs=1e-10)

    @pytest.mark.parametrize("method", [ImplicitEuler, Kvaerno3])
    def test_lower_orders(self, method):
        y0 = torch.tensor([[2.0, 0.0]], dtype=F64)
        solution = solve_ode(van_der_pol, y0, (0.0, 10.0), solver=method(), rtol=1e-3, atol=1e-5)
        reference = solve_ode(van_der_pol, y0, (0.0, 10.0), solver=Kvaerno5(), rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(solution.value[-1], reference.value[-1], rtol=1e-3, atol=1e-5)
        assert int(solution.stats.steps) < 60

    def test_error_estimate_of_implicit_euler_ignores_what_is_damped(self):
        # Off the slow solution the unfiltered estimate would be 1e4 times as large as the state.
        def field(t, y):
            return -1e6 * (y - torch.cos(t))

        y0 = torch.tensor([[1.01]], dtype=F64)
        solution = solve_ode(field, y0, (0.0, 1.0), solver=ImplicitEuler(), rtol=1e-2, atol=1e-2)
        assert float(solution.value[-1]) == pytest.approx(math.cos(1), abs=1e-2)
        assert int(solution.stats.steps) < 40

    def test_a_step_per_sample(self):
        mu = torch.tensor([[1.0], [30.0], [1000.0]], dtype=F64)

        def field(t, y, mu):
            return van_der_pol(t, y, mu.squeeze(-1))

        y0 = torch.tensor([[2.0, 0.0]], dtype=F64).expand(3, 2)
        t = torch.linspace(0, 20, 5, dtype=F64)
        together = solve_ode(field, y0, t, (mu,), solver=Kvaerno5(), controller=PIDController(per_sample=True))
        assert len(set(together.stats.accepted.tolist())) == 3
        for i in range(3):
            alone = solve_ode(
                field, y0[:1], t, (mu[i : i + 1],), solver=Kvaerno5(), controller=PIDController(per_sample=True)
            )
            torch.testing.assert_close(together.value[:, i : i + 1], alone.value, rtol=1e-12, atol=1e-12)
            assert int(together.stats.accepted[i]) == int(alone.stats.accepted)


class TestNewton:
    def test_krylov_agrees_with_dense(self):
        n = 40
        y0 = torch.rand(2, n, dtype=F64)

        def heat(t, y):
            padded = torch.nn.functional.pad(y, (1, 1))
            return 400 * (padded[:, 2:] - 2 * y + padded[:, :-2]) + y * (1 - y)

        values = []
        for newton in (StageNewton(), StageNewton(dense_size=0)):
            solution = solve_ode(heat, y0, (0.0, 0.1), solver=Kvaerno3(newton=newton), rtol=1e-5, atol=1e-7)
            values.append(solution.value[-1])
            assert int(solution.stats.steps.max()) < 150
        torch.testing.assert_close(*values, rtol=1e-5, atol=1e-7)

    def test_jacobian_survives_a_rejection(self):
        calls = []

        def field(t, y):
            calls.append(torch.is_grad_enabled())
            return -50 * (y - torch.cos(50 * t))

        y0 = torch.zeros(1, 1, dtype=F64)
        with torch.no_grad():
            solution = solve_ode(field, y0, (0.0, 0.3), solver=Kvaerno3(), controller=PIDController(dt0=0.2), rtol=1e-3)
        assert int(solution.stats.rejected) > 0
        # One recorded evaluation a step, whether it was tried once or several times.
        assert sum(calls) == int(solution.stats.accepted)

    def test_divergence_shortens_the_step(self):
        def field(t, y):
            return 1e3 * torch.sin(100 * y) - 1e3 * y

        y0 = torch.tensor([[0.3], [-0.7]], dtype=F64)
        solution = solve_ode(field, y0, (0.0, 0.05), solver=Kvaerno5(), controller=PIDController(dt0=0.05))
        reference = solve_ode(field, y0, (0.0, 0.05), rtol=1e-9, atol=1e-9)
        assert int(solution.stats.rejected.max()) > 0
        torch.testing.assert_close(solution.value[-1], reference.value[-1], rtol=1e-4, atol=1e-4)

    def test_divergence_with_steps_of_constant_length(self):
        y0 = torch.tensor([[0.3]], dtype=F64)
        with pytest.raises(SolverError, match="sample 0|Sample 0"):
            solve_ode(
                lambda t, y: 1e4 * torch.sin(1e3 * y) + 1e5 * torch.cos(1e6 * t),
                y0,
                (0.0, 1.0),
                solver=Kvaerno5(),
                controller=ConstantController(dt=0.1),
            )

    @pytest.mark.parametrize("per_sample", [False, True])
    def test_a_field_that_breaks_leaves_the_others(self, per_sample):
        ends = torch.tensor([[0.5], [math.inf]], dtype=F64)

        def field(t, y, ends):
            return torch.where(t.reshape(-1, 1) < ends, -y, math.nan)

        y0 = torch.ones(2, 1, dtype=F64)
        solution = solve_ode(
            field,
            y0,
            (0.0, 1.0),
            (ends,),
            solver=Kvaerno5(),
            controller=PIDController(per_sample=per_sample),
            throw=False,
        )
        assert solution.converged.tolist() == [False, True]
        assert float(solution.value[-1, 1]) == pytest.approx(math.exp(-1), rel=1e-4)
        assert float(solution.reached[0]) == pytest.approx(0.5, abs=0.02)

    def test_no_explosion_goes_unnoticed(self):
        with pytest.raises(SolverError, match="t = 0.99"):
            solve_ode(lambda t, y: y**2, torch.ones(1, 1, dtype=F64), (0.0, 3.0), solver=Kvaerno5())

    @pytest.mark.parametrize(
        "knobs", [{"kappa": 0.0}, {"kappa": 1.0}, {"max_steps": 1}, {"dense_size": -1}, {"rtol": -1.0}]
    )
    def test_knobs_out_of_range(self, knobs):
        with pytest.raises(ValueError, match=next(iter(knobs))):
            StageNewton(**knobs)

    def test_wrong_knobs(self):
        with pytest.raises(TypeError, match="newton"):
            Kvaerno5(newton=GMRES())
        with pytest.raises(TypeError, match="kappa"):
            StageNewton(kapa=0.1)
        with pytest.raises(TypeError, match="krylov"):
            StageNewton(krylov=None)


class TestStates:
    def test_float32(self):
        def field(t, y):
            return -500 * (y - torch.cos(t))

        y0 = torch.tensor([[0.0], [2.0]])
        solution = solve_ode(field, y0, (0.0, 1.0), solver=Kvaerno5())
        exact = solve_ode(field, y0.double(), (0.0, 1.0), solver=Kvaerno5(), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(solution.value[-1].double(), exact.value[-1], rtol=1e-5, atol=1e-5)
        assert solution.value.dtype == torch.float32

    def test_complex(self):
        rate = torch.tensor(-3 + 20j, dtype=torch.complex128)
        y0 = torch.tensor([[1 + 1j], [0.5 + 0j]], dtype=torch.complex128)
        solution = solve_ode(lambda t, y: rate * y, y0, (0.0, 1.0), solver=Kvaerno5(), rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(solution.value[-1], y0 * torch.exp(rate), rtol=1e-5, atol=1e-6)

    def test_dict_with_a_quadrature(self):
        y0 = {"y": torch.ones(2, 1, dtype=F64), "integral": torch.zeros(2, dtype=F64)}

        def field(t, state):
            return {"y": -1e3 * (state["y"] - torch.cos(t)), "integral": state["y"].squeeze(1)}

        solution = solve_ode(field, y0, (0.0, 1.0), solver=Kvaerno5(), rtol=1e-7, atol=1e-9, quadrature=("integral",))
        torch.testing.assert_close(
            solution.value["integral"][-1], torch.full((2,), math.sin(1), dtype=F64), rtol=0, atol=2e-3
        )

    def test_jump(self):
        def field(t, y):
            return -100 * (y - torch.where(t < 0.5, 0.0, 1.0))

        y0 = torch.ones(1, 1, dtype=F64)
        solution = solve_ode(field, y0, (0.0, 1.0), solver=Kvaerno5(), controller=PIDController(jump_t=(0.5,)))
        assert float(solution.value[-1]) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("dense_size", [64, 0])
@pytest.mark.parametrize("per_sample", [False, True])
def test_inference_mode_changes_nothing(per_sample, dense_size):
    def field(t, y, rate):
        return -rate * (y - torch.tanh(y.flip(1)) * torch.cos(t).reshape(-1, 1))

    def solve():
        y0, rate = torch.tensor([[0.3, -1.0], [2.0, 0.5]], dtype=F64), torch.tensor([[50.0], [200.0]], dtype=F64)
        solver = Kvaerno3(newton=StageNewton(dense_size=dense_size))
        controller = PIDController(per_sample=per_sample)
        return solve_ode(field, y0, (0.0, 0.5), (rate,), solver=solver, controller=controller, rtol=1e-4)

    with torch.no_grad():
        expected = solve()
    with torch.inference_mode():
        found = solve()
    torch.testing.assert_close(found.value, expected.value, rtol=0, atol=0)
    assert found.stats.evaluations.tolist() == expected.stats.evaluations.tolist()
