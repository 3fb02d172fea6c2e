"""Spectral radius and Jacobian penalty against Jacobians that are known."""

import math

import pytest
import torch

from restpoint.solvers.diagnose import jacobian_penalty, spectral_radius

torch_double = torch.float64


def linear(matrices):
    """f whose Jacobian at sample i is matrices[i]."""
    return lambda z: torch.bmm(z.unsqueeze(1), matrices.mT).squeeze(1)


def rotation(angle, scale):
    c, s = math.cos(angle), math.sin(angle)
    return scale * torch.tensor([[c, -s], [s, c]], dtype=torch_double)


def test_a_rotation_has_its_radius_and_not_the_rayleigh_quotient():
    matrices = torch.stack([rotation(math.pi / 2, 0.9), rotation(1.0, 0.9), rotation(2.3, 0.5)])
    radius = spectral_radius(linear(matrices), torch.zeros(3, 2, dtype=torch_double))
    torch.testing.assert_close(radius, torch.tensor([0.9, 0.9, 0.5], dtype=torch_double), atol=1e-12, rtol=0)


def test_a_rotation_in_skewed_coordinates():
    # The growth of one product oscillates between 0.9 / 10 and 0.9 * 10.
    skew = torch.tensor([[1.0, 0.0], [0.0, 10.0]], dtype=torch_double)
    angles = torch.linspace(0.4, 2.8, 7).tolist()
    matrices = torch.stack([skew @ rotation(a, 0.9) @ torch.linalg.inv(skew) for a in angles])
    radius = spectral_radius(linear(matrices), torch.zeros(7, 2, dtype=torch_double))
    torch.testing.assert_close(radius, torch.full((7,), 0.9, dtype=torch_double), atol=0, rtol=2e-2)


def test_random_matrices():
    matrices = torch.randn(8, 50, 50, dtype=torch_double) / 50**0.5
    exact = torch.linalg.eigvals(matrices).abs().amax(dim=1)
    radius = spectral_radius(linear(matrices), torch.zeros(8, 50, dtype=torch_double), steps=200)
    torch.testing.assert_close(radius, exact, atol=0, rtol=0.02)


def test_where_nothing_comes_back_the_radius_is_zero():
    nilpotent = torch.triu(torch.ones(2, 4, 4, dtype=torch_double), diagonal=1)
    assert spectral_radius(linear(nilpotent), torch.zeros(2, 4, dtype=torch_double)).tolist() == [0, 0]
    assert spectral_radius(lambda z, x: x, torch.zeros(2, 4), (torch.ones(2, 4),)).tolist() == [0, 0]


def test_a_state_of_several_tensors():
    # The pair (a, b) -> (-0.8 b, 0.8 a): a rotation across the leaves of the tree.
    state = {"a": torch.zeros(3, 2, 2), "b": torch.zeros(3, 2, 2)}
    radius = spectral_radius(lambda z, s: {"a": -s * z["b"], "b": s * z["a"]}, state, (torch.tensor(0.8),))
    torch.testing.assert_close(radius, torch.full((3,), 0.8))


def test_a_broken_sample_leaves_the_others_alone():
    z = torch.zeros(3, 2, dtype=torch_double)
    z[1] = float("nan")
    radius = spectral_radius(lambda z: 0.3 * torch.sin(z), z)
    assert radius[[0, 2]].tolist() == pytest.approx([0.3, 0.3])
    assert radius[1].isnan()


def test_coupled_samples_have_no_radius_of_their_own():
    with pytest.raises(ValueError, match="couples the samples"):
        spectral_radius(lambda z: z - z.mean(dim=0), torch.randn(4, 2))


def test_too_few_steps():
    with pytest.raises(ValueError, match="steps must be at least 2; got 1"):
        spectral_radius(torch.tanh, torch.zeros(1, 2), steps=1)


def test_the_penalty_of_a_diagonal_jacobian_is_exact():
    diagonals = torch.tensor([[0.5, 0.1, 0.2], [1.0, 2.0, 3.0]], dtype=torch_double)
    penalty = jacobian_penalty(lambda z, d: d * z, torch.randn(2, 3, dtype=torch_double), (diagonals,))
    torch.testing.assert_close(penalty, diagonals.square().mean(dim=1))


def test_the_penalty_is_unbiased():
    matrices = torch.randn(2, 6, 6, dtype=torch_double)
    exact = matrices.square().sum(dim=(1, 2)) / 6
    estimate = jacobian_penalty(linear(matrices), torch.zeros(2, 6, dtype=torch_double), samples=3000)
    torch.testing.assert_close(estimate, exact, atol=0, rtol=0.04)


def cell(z, x, w):
    return torch.tanh(z @ w.T + x)


def test_the_penalty_can_be_trained():
    w = torch.randn(4, 4, dtype=torch_double, requires_grad=True)
    x = torch.randn(3, 4, dtype=torch_double, requires_grad=True)
    z = torch.randn(3, 4, dtype=torch_double)

    def penalty(x, w):
        return jacobian_penalty(cell, z, (x, w), samples=2, generator=torch.Generator().manual_seed(0))

    assert torch.autograd.gradcheck(penalty, (x, w))


def test_the_penalty_follows_the_state_where_that_requires_grad():
    w, x = torch.randn(4, 4, dtype=torch_double), torch.zeros(3, 4, dtype=torch_double)
    z = torch.randn(3, 4, dtype=torch_double, requires_grad=True)

    def penalty(z):
        return jacobian_penalty(cell, z, (x, w), generator=torch.Generator().manual_seed(0))

    assert torch.autograd.gradcheck(penalty, (z,))
    # A path to z around f is no part of df/dz: here it would double the Jacobian.
    beside = jacobian_penalty(cell, z, (z @ w.T, w), generator=torch.Generator().manual_seed(0))
    fixed = jacobian_penalty(cell, z, ((z @ w.T).detach(), w), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(beside, fixed)


def test_the_penalty_under_torch_func():
    w, x = torch.randn(4, 4, dtype=torch_double), torch.randn(3, 4, dtype=torch_double)
    z = torch.randn(3, 4, dtype=torch_double)

    def total(w):
        return jacobian_penalty(cell, z, (x, w), generator=torch.Generator().manual_seed(0)).sum()

    leaf = w.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(total)(w), torch.autograd.grad(total(leaf), leaf)[0])


def test_the_penalty_without_grad_and_without_dependence():
    with torch.no_grad():
        assert not jacobian_penalty(cell, torch.zeros(2, 3), (torch.ones(2, 3), torch.eye(3))).requires_grad
    assert jacobian_penalty(lambda z, x: x, torch.zeros(2, 3), (torch.ones(2, 3),)).tolist() == [0, 0]
    with pytest.raises(ValueError, match="samples must be at least 1; got 0"):
        jacobian_penalty(torch.tanh, torch.zeros(1, 2), samples=0)
