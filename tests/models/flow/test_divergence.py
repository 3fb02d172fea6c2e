"""Divergences are traces: exact ones exactly, estimates in the mean over all their noise."""

import itertools

import pytest
import torch
from torch import nn

from restpoint.models.flow import ExactTrace, Hutchinson, HutchPlusPlus

ALL = [ExactTrace(), Hutchinson(), Hutchinson("gaussian"), HutchPlusPlus(rank=2), HutchPlusPlus(rank=9)]


def network(n=4, hidden=8):
    return nn.Sequential(nn.Linear(n, hidden), nn.Tanh(), nn.Linear(hidden, n)).double()


def jacobians(f, y):
    return torch.func.vmap(torch.func.jacrev(f))(y)


def points(batch=3, n=4):
    return torch.randn(batch, n, dtype=torch.float64)


def all_signs(batch, n):
    """Every vector of signs, (2^n, batch, n)."""
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=n)), dtype=torch.float64)
    return signs.unsqueeze(1).expand(-1, batch, -1)


@pytest.mark.parametrize("mode", ["no_grad", "recorded", "recorded from a constant"])
def test_the_exact_trace_is_that_of_the_jacobian(mode):
    f, y = network(), points()
    jacobian = jacobians(f, y)
    with torch.set_grad_enabled(mode != "no_grad"):
        found = ExactTrace()(f, y.clone().requires_grad_(mode == "recorded"), ())
    torch.testing.assert_close(found.derivative, f(y))
    torch.testing.assert_close(found.divergence, jacobian.diagonal(dim1=1, dim2=2).sum(1))
    torch.testing.assert_close(found.squares, jacobian.square().sum((1, 2)))
    assert found.divergence.requires_grad == (mode != "no_grad")


@pytest.mark.parametrize("divergence", [Hutchinson(), HutchPlusPlus(rank=2), HutchPlusPlus(rank=1, samples=2)])
def test_estimates_are_unbiased(divergence):
    f, y = network(), points()
    exact = ExactTrace()(f, y, ())
    noise = divergence.draw(f, y)
    found = []
    for signs in all_signs(*y.shape):
        if isinstance(divergence, Hutchinson):
            here = (signs,)
        else:  # the subspace stays, and every sample of the complement is one of the vectors in turn
            basis = noise[0]
            vectors = signs.unsqueeze(1).expand(-1, divergence.samples, -1)
            here = (basis, vectors - vectors @ basis.mT @ basis)
        found.append(divergence(f, y, here))
    torch.testing.assert_close(sum(e.divergence for e in found) / len(found), exact.divergence)
    torch.testing.assert_close(sum(e.squares for e in found) / len(found), exact.squares)


def test_gaussian_noise_is_unbiased_too():
    f, y = network(), points(1).expand(20_000, -1)
    divergence = Hutchinson("gaussian")
    found = divergence(f, y, divergence.draw(f, y)).divergence
    exact = ExactTrace()(f, y[:1], ()).divergence
    assert abs(found.mean() - exact) < 4 * found.std() / len(found) ** 0.5


@pytest.mark.parametrize("rank", [4, 7])
def test_hutch_plus_plus_is_exact_where_its_rank_is_that_of_the_space(rank):
    f, y = network(), points()
    divergence = HutchPlusPlus(rank=rank)
    found, exact = divergence(f, y, divergence.draw(f, y)), ExactTrace()(f, y, ())
    torch.testing.assert_close(found.divergence, exact.divergence)
    torch.testing.assert_close(found.squares, exact.squares)


@pytest.mark.parametrize("rank", [2, 3])
def test_hutch_plus_plus_is_exact_elsewhere_where_the_field_reads_few_directions(rank):
    f, y = network(n=6, hidden=2), points(n=6)
    divergence = HutchPlusPlus(rank=rank)
    noise = divergence.draw(f, y)
    elsewhere = points(n=6)
    found, exact = divergence(f, elsewhere, noise), ExactTrace()(f, elsewhere, ())
    torch.testing.assert_close(found.divergence, exact.divergence)


def test_hutch_plus_plus_varies_less_where_few_directions_matter():
    matrix = torch.diag(torch.tensor([5.0, 4.0, 0.1, 0.1, 0.1, 0.1], dtype=torch.float64))
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    matrix = rotation @ matrix @ rotation.T
    y = points(500, 6)
    spread = []
    for divergence in (Hutchinson(), HutchPlusPlus(rank=3)):
        found = divergence(lambda y: y @ matrix.T, y, divergence.draw(lambda y: y @ matrix.T, y)).divergence
        assert abs(found.mean() - 9.4) < 5 * found.std() / 500**0.5 + 1e-9
        spread.append(found.std())
    assert spread[1] < spread[0] / 10


@pytest.mark.parametrize("divergence", ALL, ids=str)
def test_what_is_found_can_be_differentiated(divergence):
    f, y = network(), points(2)
    noise = divergence.draw(f, y)
    assert all(not part.requires_grad for part in noise)

    def both(y, *parameters):
        names = [name for name, _ in f.named_parameters()]
        found = divergence(
            lambda y: torch.func.functional_call(f, dict(zip(names, parameters, strict=True)), (y,)), y, noise
        )
        return found.divergence, found.squares

    assert torch.autograd.gradcheck(both, (y.requires_grad_(), *f.parameters()), fast_mode=True)


@pytest.mark.parametrize("divergence", ALL, ids=str)
def test_within_transforms(divergence):
    f, y = network(), points(2)
    noise = divergence.draw(f, y)
    y.requires_grad_()
    (expected,) = torch.autograd.grad(divergence(f, y, noise).divergence.sum(), y)
    found = torch.func.grad(lambda y: divergence(f, y, noise).divergence.sum())(y.detach())
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("divergence", ALL, ids=str)
def test_images_and_fields_without_derivative(divergence):
    y = torch.randn(2, 1, 3, 3, dtype=torch.float64)
    for f in (lambda y: 3 * y, lambda y: torch.ones_like(y)):
        found = divergence(f, y, divergence.draw(f, y))
        assert found.derivative.shape == y.shape
        expected = 27.0 if f(y)[0, 0, 0, 0] != 1 else 0.0
        if divergence in (ExactTrace(), Hutchinson(), HutchPlusPlus(rank=9)) or not expected:
            torch.testing.assert_close(found.divergence, torch.full((2,), expected, dtype=torch.float64))


def test_wrong_knobs_say_so():
    with pytest.raises(ValueError, match="'rademacher' or 'gaussian'; got 'uniform'"):
        Hutchinson("uniform")
    with pytest.raises(ValueError, match="at least 1; got 0, 1"):
        HutchPlusPlus(rank=0)
    with pytest.raises(TypeError, match="Did you mean 'rank'"):
        HutchPlusPlus(ranks=3)
