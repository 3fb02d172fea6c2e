"""The certificate: its numbers against dense linear algebra, its bound against measured errors, its verdicts."""

import math

import pytest
import torch

from restpoint.solvers import GMRES, ImplicitAdjoint, Newton, fixed_point
from restpoint.solvers.diagnose import certificate

DOUBLE = torch.float64
MODES = pytest.mark.parametrize("dense_size", [0, 256], ids=["matrix-free", "dense"])


def cell(z, x, w):
    return torch.tanh(z @ w.T + x)


def problem(batch, n, radius, dtype=DOUBLE):
    w = radius * torch.randn(n, n, dtype=dtype) / n**0.5
    return torch.randn(batch, n, dtype=dtype), w


def solve(f, z0, args):
    adjoint = ImplicitAdjoint(GMRES(rtol=1e-13))
    return fixed_point(f, z0, args, solver=Newton(), adjoint=adjoint, rtol=1e-14, max_steps=60).value


def jacobians(z, x, w):
    slope = 1 - torch.tanh(z @ w.T + x).square()
    return torch.eye(z.shape[1], dtype=z.dtype) - slope.unsqueeze(2) * w


@MODES
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_singular_values_are_those_of_the_decomposition(dense_size, dtype):
    x, w = problem(4, 60, 0.9, dtype)
    z = torch.randn(4, 60, dtype=dtype)
    values = torch.linalg.svdvals(jacobians(z, x, w))
    found = certificate(cell, z, (x, w), dense_size=dense_size)
    torch.testing.assert_close(found.smallest_singular_value, values[:, -1], atol=0, rtol=2e-3)
    torch.testing.assert_close(found.condition, values[:, 0] / values[:, -1], atol=0, rtol=1e-2)


@MODES
def test_an_ill_conditioned_jacobian(dense_size):
    # Singular values from 1 to 1e-4, in a function that is not normal.
    n = 40
    left, right = torch.linalg.qr(torch.randn(2, n, n, dtype=DOUBLE))[0]
    matrix = left * torch.logspace(-4, 0, n, dtype=DOUBLE) @ right
    found = certificate(lambda x: x @ matrix.T, torch.zeros(2, n, dtype=DOUBLE), root=True, dense_size=dense_size)
    torch.testing.assert_close(found.condition, torch.full((2,), 1e4, dtype=DOUBLE), atol=0, rtol=1e-2)
    torch.testing.assert_close(found.smallest_singular_value, torch.full((2,), 1e-4, dtype=DOUBLE), atol=0, rtol=1e-2)
    assert found.trusted.all()


@MODES
def test_a_singular_jacobian_fails_the_third_condition(dense_size):
    n = 40
    basis = torch.linalg.qr(torch.randn(n, n, dtype=DOUBLE))[0]
    values = torch.linspace(0.5, 1, n, dtype=DOUBLE)
    good, bad = basis * values @ basis.T, basis * torch.cat([values[:-1], values[:1] * 0]) @ basis.T
    matrices = torch.stack([good, bad, good])
    x = torch.randn(3, n, dtype=DOUBLE)
    right = torch.bmm(matrices, x.unsqueeze(2)).squeeze(2)
    found = certificate(
        lambda x, m, b: torch.bmm(x.unsqueeze(1), m.mT).squeeze(1) - b, x, (matrices, right), root=True,
        dense_size=dense_size,
    )  # fmt: skip
    assert found.regular.tolist() == [True, False, True]
    assert found.trusted.tolist() == [True, False, True]
    assert found.smallest_singular_value[1] < 1e-6
    assert found.condition[0] == pytest.approx(2, rel=1e-2)
    assert "condition 3 fails" in found.verdict(1)


@MODES
def test_the_unit_circle(dense_size):
    """x^2 + theta^2 = 1: at x = 0 there is no dx/dtheta, and close to it no digit of it is left."""
    x = torch.tensor([[0.8], [0.0], [1.0], [1e-9]], dtype=DOUBLE)
    theta = torch.tensor([[0.6], [1.0], [0.0], [1.0]], dtype=DOUBLE)
    found = certificate(lambda x, t: x**2 + t**2 - 1, x, (theta,), root=True, dense_size=dense_size)
    assert found.trusted.tolist() == [True, False, True, False]
    assert found.solved.all()
    assert found.smooth.all()
    assert not found.regular[1]
    assert found.condition[1] == math.inf
    assert found.smallest_singular_value.tolist() == pytest.approx([1.6, 0, 2, 2e-9])
    assert found.verdict(1) == "condition 3 fails (Jacobian singular or nearly so)"


@MODES
@pytest.mark.parametrize("kind", ["linear", "square"])
def test_the_bound_holds_for_measured_gradients(dense_size, kind):
    batch, n = 30, 12
    x, w = problem(batch, n, 1.0)
    z = solve(cell, torch.zeros_like(x), (x, w))
    # Off the rest point by lengths from 1e-9 to 1 in every direction.
    lengths = torch.logspace(-9, 0, batch, dtype=DOUBLE).unsqueeze(1)
    off = z + lengths * torch.nn.functional.normalize(torch.randn_like(z), dim=1)
    direction = torch.randn_like(z)

    def loss(z):
        return (z * direction).sum() if kind == "linear" else (z - direction).square().sum()

    def gradient(z, x, w):
        z = z.clone().requires_grad_()
        (v,) = torch.autograd.grad(loss(z), z)
        u = torch.linalg.solve(jacobians(z, x, w).mT, v.unsqueeze(2)).squeeze(2)
        return (1 - torch.tanh(z @ w.T + x).square()) * u

    exact = gradient(z, x, w)
    measured = (gradient(off, x, w) - exact).norm(dim=1) / exact.norm(dim=1)
    found = certificate(cell, off, (x, w), loss=loss if kind == "square" else None, dense_size=dense_size)
    assert (measured <= found.gradient_error).all()
    distance = (off - z).norm(dim=1)
    assert (distance <= found.distance * (1 + 1e-6) + 1e-12).all()
    # It bounds without giving everything away: where it is finite it is mostly right to two orders of magnitude.
    finite = found.gradient_error < math.inf
    assert 15 < finite.sum() < batch
    assert (found.gradient_error / measured)[finite].median() < 100


def test_the_bound_holds_for_shared_parameters():
    n = 12
    x, w = problem(8, n, 0.8)
    w.requires_grad_()

    def f(z, x):
        return torch.tanh(z @ w.T + x)

    z = solve(f, torch.zeros_like(x), (x,)).detach()
    off = z + 1e-5 * torch.randn_like(z)

    def gradient(z):
        u = torch.linalg.solve(jacobians(z, x, w).mT, torch.ones_like(z).unsqueeze(2)).squeeze(2).detach()
        return torch.autograd.grad((f(z, x) * u).sum(), w)[0]

    error = (gradient(off) - gradient(z)).norm() / gradient(z).norm()
    found = certificate(f, off, (x,))
    assert error > 1e-7
    assert error <= found.gradient_error.max()
    assert found.trusted.all()


def test_derivatives_by_arguments_that_vary_count():
    """f = z / 2 + theta z / 10 + 0.08 is linear in z, so A does not change, but df/dtheta = z / 10 does."""

    def f(z, theta):
        return 0.5 * z + 0.1 * theta * z + 0.08

    def g(z, theta):
        return 0.6 * z + 0.08 + 0 * theta + theta - 1

    theta = torch.ones(1, 1, dtype=DOUBLE)
    z = torch.full((1, 1), 0.2 + 1e-4, dtype=DOUBLE)
    assert certificate(g, z, (theta,)).gradient_error < 1e-12
    assert certificate(f, z, (theta,)).gradient_error >= 1e-4 / 0.2


def test_a_residual_fails_the_first_condition():
    x, w = problem(3, 10, 0.5)
    z = solve(cell, torch.zeros_like(x), (x, w))
    z[1] += 1
    found = certificate(cell, z, (x, w))
    assert found.trusted.tolist() == [True, False, True]
    assert found.solved.tolist() == [True, False, True]
    assert found.distance[1] > 1
    residual = (cell(z, x, w) - z).norm(dim=1) / cell(z, x, w).norm(dim=1)
    torch.testing.assert_close(found.residual, residual)


@MODES
def test_a_kink_at_the_rest_point_is_noticed(dense_size):
    """z = relu(z / 2 + x): at x = 0 the rest point is the kink itself."""
    x = torch.tensor([[1.0, 1.0], [0.0, 1.0], [-1.0, 2.0], [1e-9, 1.0]], dtype=DOUBLE)

    def f(z, x):
        return torch.relu(z / 2 + x)

    found = certificate(f, 2 * x.clamp_min(0), (x,), dense_size=dense_size)
    assert found.smooth.tolist() == [True, False, True, True]
    assert found.trusted.tolist() == [True, False, True, True]
    assert found.verdict(1) == "condition 2 fails (kink)"
    assert found.solved.all()
    assert found.regular.all()
    # A residual that reaches over the kink beside the last sample's rest point.
    nearby = certificate(f, 2 * x.clamp_min(0) + 1e-6, (x,), dense_size=dense_size)
    assert nearby.smooth.tolist() == [True, False, True, False]


@pytest.mark.parametrize("function", [torch.abs, torch.relu, lambda z: z.clamp(-1, 0), torch.nn.functional.hardtanh])
def test_a_kink_of_one_unit_among_many(function):
    n = 200
    shift = torch.full((1, n), 0.7, dtype=DOUBLE)
    shift[0, 17] = -1.0 if function is torch.nn.functional.hardtanh else 0.0

    def f(z, s):
        return 0.3 * function(z + s) - 0.3 * function(s)

    found = certificate(f, torch.zeros(1, n, dtype=DOUBLE), (shift,), dense_size=0)
    assert not found.smooth


@pytest.mark.parametrize("function", [torch.tanh, torch.sin, torch.nn.functional.softplus, torch.nn.functional.elu])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_curvature_is_no_kink(function, dtype):
    z = torch.randn(20, 30, dtype=dtype)
    x = z - 0.5 * function(3 * z) + 10 ** torch.linspace(-8, -2, 20, dtype=dtype).unsqueeze(1)
    assert certificate(lambda z, x: 0.5 * function(3 * z) + x, z, (x,)).smooth.all()


def test_a_derivative_that_is_not_finite_fails_the_second_condition():
    x = torch.tensor([[0.0], [1.0]], dtype=DOUBLE)
    found = certificate(lambda z, x: torch.sqrt(z) * x, x.clone(), (x,))
    assert found.smooth.tolist() == [False, True]
    assert found.trusted.tolist() == [False, True]


def test_a_broken_sample_leaves_the_others_alone():
    x, w = problem(3, 10, 0.5)
    z = solve(cell, torch.zeros_like(x), (x, w))
    alone = certificate(cell, z[[0, 2]], (x[[0, 2]], w))
    z[1, 3] = float("nan")
    for dense_size in (0, 256):
        found = certificate(cell, z, (x, w), dense_size=dense_size)
        assert found.trusted.tolist() == [True, False, True]
        torch.testing.assert_close(found.condition[[0, 2]], alone.condition, atol=0, rtol=1e-2)
        assert "condition 1 fails (residual), condition 2 fails (kink), condition 3 fails" in found.verdict(1)


def test_a_state_of_several_tensors_is_the_same_problem():
    x, w = problem(3, 8, 0.7)
    z = solve(cell, torch.zeros_like(x), (x, w)) + 1e-6

    def split(state, x, w):
        a, b = cell(torch.cat([state["a"].flatten(1), state["b"]], dim=1), x, w).split([4, 4], dim=1)
        return {"a": a.reshape(-1, 2, 2), "b": b}

    whole = certificate(cell, z, (x, w))
    parts = certificate(split, {"a": z[:, :4].reshape(-1, 2, 2), "b": z[:, 4:]}, (x, w))
    torch.testing.assert_close(parts.condition, whole.condition)
    torch.testing.assert_close(parts.residual, whole.residual)
    torch.testing.assert_close(parts.distance, whole.distance, atol=0, rtol=1e-3)


def test_nothing_that_was_given_is_touched():
    x, w = problem(3, 8, 0.7)
    x.requires_grad_()
    w.requires_grad_()
    z = solve(cell, torch.zeros(3, 8, dtype=DOUBLE), (x, w))
    with torch.no_grad():
        found = certificate(lambda z, x: cell(z, x, w), z, (x,))
    assert x.grad is None
    assert w.grad is None
    assert not found.gradient_error.requires_grad
    assert found.trusted.all()


def test_the_table_names_samples_and_conditions():
    x = torch.tensor([[0.8], [0.0]], dtype=DOUBLE)
    theta = torch.tensor([[0.6], [1.0]], dtype=DOUBLE)
    lines = str(certificate(lambda x, t: x**2 + t**2 - 1, x, (theta,), root=True)).splitlines()
    assert lines[0].split()[:2] == ["sample", "residual"]
    assert lines[1].startswith("0 ")
    assert lines[1].endswith("trusted")
    assert lines[2].startswith("1 ")
    assert lines[2].endswith("condition 3 fails (Jacobian singular or nearly so)")
    assert lines[-1] == "1 of 2 trusted"
    many = certificate(lambda z: z / 2, torch.zeros(30, 1, dtype=DOUBLE))
    assert "and 10 samples with smaller errors" in str(many)


def test_coupled_samples_are_refused():
    with pytest.raises(ValueError, match="couples the samples"):
        certificate(lambda z: 0.1 * (z - z.mean(dim=0)), torch.randn(4, 2))


def test_bad_options():
    with pytest.raises(ValueError, match="must not be negative; got -1"):
        certificate(torch.tanh, torch.zeros(1, 1), probes=-1)
