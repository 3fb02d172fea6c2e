"""Exponential families against closed forms, and the backward map against the forward one."""

import math

import pytest
import torch

from restpoint.solvers.inference import exponential as families

D = torch.float64


def rows(*values):
    return torch.tensor(values, dtype=D)


CASES = {
    "Bernoulli": (families.Bernoulli(), rows([0.3, -2.0], [9.0, 0.0])),
    "Categorical": (families.Categorical(), rows([0.3, -2.0, 1.0], [7.0, 0.0, -8.0])),
    "Poisson": (families.Poisson(), rows([0.3, -4.0], [5.0, 0.0])),
    "Gaussian": (families.Gaussian(), rows([0.3, -2.0], [4.0, -0.1], [0.0, -20.0])),
    "Gamma": (families.Gamma(), rows([0.5, -2.0], [-0.95, -0.1], [200.0, -3.0])),
    "Dirichlet": (families.Dirichlet(), rows([0.5, 2.0, -0.5], [30.0, 80.0, 3.0], [-0.9, -0.8, -0.5])),
}
everywhere = pytest.mark.parametrize("family, theta", CASES.values(), ids=CASES)


@everywhere
def test_backward_map_inverts_the_forward_map(family, theta):
    mean = family.mean(theta)
    torch.testing.assert_close(family.canonical(mean), theta, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(family.mean(family.canonical(mean)), mean, rtol=1e-11, atol=1e-11)


@everywhere
def test_hessian_is_the_jacobian_of_the_mean_and_its_inverse_of_the_canonical(family, theta):
    covariance = family.covariance(theta)
    forward = torch.autograd.functional.jacobian(family.mean, theta).diagonal(dim1=0, dim2=2).movedim(2, 0)
    torch.testing.assert_close(covariance, forward, rtol=1e-10, atol=1e-12)
    mean = family.mean(theta)
    backward = torch.autograd.functional.jacobian(family.canonical, mean).diagonal(dim1=0, dim2=2).movedim(2, 0)
    product = covariance @ backward
    torch.testing.assert_close(product, torch.eye(theta.shape[1], dtype=D).expand_as(product), rtol=1e-6, atol=1e-6)
    assert (torch.linalg.eigvalsh(covariance) > 0).all()


@everywhere
def test_derivatives(family, theta):
    theta = theta[:1].clone().requires_grad_()
    mean = family.mean(theta).detach().requires_grad_()
    for f, x in ((family.mean, theta), (family.canonical, mean), (family.covariance, theta)):
        assert torch.autograd.gradcheck(f, x, fast_mode=True)
        assert torch.autograd.gradgradcheck(f, x, fast_mode=True)


def test_means_in_closed_form():
    bernoulli, categorical, poisson, gaussian, gamma, dirichlet = CASES.values()
    torch.testing.assert_close(bernoulli[0].mean(bernoulli[1]), bernoulli[1].sigmoid())
    full = torch.nn.functional.pad(categorical[1], (0, 1)).softmax(1)
    torch.testing.assert_close(categorical[0].mean(categorical[1]), full[:, :-1])
    torch.testing.assert_close(poisson[0].mean(poisson[1]), poisson[1].exp())
    variance = -0.5 / gaussian[1][:, 1]
    mean = gaussian[1][:, 0] * variance
    torch.testing.assert_close(gaussian[0].mean(gaussian[1]), torch.stack([mean, mean**2 + variance], 1))
    reference = torch.distributions.Gamma(gamma[1][:, 0] + 1, -gamma[1][:, 1])
    torch.testing.assert_close(gamma[0].mean(gamma[1])[:, 1], reference.mean)
    alpha = dirichlet[1] + 1
    expected = torch.digamma(alpha) - torch.digamma(alpha.sum(1, keepdim=True))
    torch.testing.assert_close(dirichlet[0].mean(dirichlet[1]), expected)


@pytest.mark.parametrize(
    "name, build",
    [
        ("Gaussian", lambda t: torch.distributions.Normal(-t[:, 0] / (2 * t[:, 1]), (-0.5 / t[:, 1]).sqrt())),
        ("Gamma", lambda t: torch.distributions.Gamma(t[:, 0] + 1, -t[:, 1])),
        ("Dirichlet", lambda t: torch.distributions.Dirichlet(t + 1)),
        ("Poisson", lambda t: torch.distributions.Independent(torch.distributions.Poisson(t.exp()), 1)),
    ],
)
def test_divergence_as_torch_has_it(name, build):
    family, theta = CASES[name]
    other = theta.roll(1, 0)
    expected = torch.distributions.kl_divergence(build(theta), build(other))
    torch.testing.assert_close(family.kl(theta, other), expected, rtol=1e-9, atol=1e-9)


def test_maximum_likelihood():
    """The canonical parameters of the average statistic maximise the likelihood."""
    torch.manual_seed(3)
    x = torch.distributions.Gamma(torch.tensor(2.5, dtype=D), torch.tensor(1.5, dtype=D)).sample((4000,))
    theta = families.Gamma().canonical(torch.stack([x.log().mean(), x.mean()])[None])
    assert theta[0, 0] + 1 == pytest.approx(2.5, rel=0.1)
    assert -theta[0, 1] == pytest.approx(1.5, rel=0.1)


@everywhere
def test_float32(family, theta):
    mean = family.mean(theta).float()
    theta = family.canonical(mean)
    assert theta.dtype == torch.float32
    torch.testing.assert_close(family.mean(theta), mean, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    "name, mean",
    [
        ("Bernoulli", [0.5, 1.0]),
        ("Categorical", [0.5, 0.2, 0.3]),
        ("Poisson", [1.0, 0.0]),
        ("Gaussian", [2.0, 4.0]),
        ("Gamma", [1.0, 2.0]),
        ("Dirichlet", [-0.1, -0.1, -0.1]),
        ("Poisson", [math.nan, 1.0]),
    ],
)
def test_means_of_no_distribution(name, mean):
    family, theta = CASES[name]
    good = family.mean(theta)[:1]
    with pytest.raises(ValueError, match=f"{name}: row 1 of mean, .* is not in the interior"):
        family.canonical(torch.cat([good, rows(mean)]))


@pytest.mark.parametrize("name, theta", [("Gaussian", [1.0, 0.5]), ("Gamma", [-1.5, -1.0]), ("Dirichlet", [-1.5] * 3)])
def test_outside_of_the_domain(name, theta):
    with pytest.raises(ValueError, match=f"{name}: row 0 of canonical, .* is not in the interior"):
        CASES[name][0].mean(rows(theta))
    with pytest.raises(ValueError, match=r"canonical: expected shape \(batch, n\), got \(2,\)"):
        CASES[name][0].mean(torch.ones(2))
