"""Exponential families: canonical parameters to mean parameters and back."""

from __future__ import annotations

import abc
import math

import torch
from jaxtyping import Float
from torch import Tensor

from ..adjoint import ImplicitAdjoint
from ..fixed_point import root
from . import checks
from .distribution import gradient


class ExponentialFamily(abc.ABC):
    """Densities exp(<theta, T(x)> - A(theta)) with respect to a base measure, in a minimal parametrisation.

    A is convex; its derivative maps the canonical parameters theta one to one to the mean parameters E[T(x)], and its
    second derivative is the covariance of T(x). Everything is differentiable, and a row is a distribution of its own.
    """

    @abc.abstractmethod
    def log_partition(self, canonical: Float[Tensor, "batch n"]) -> Float[Tensor, " batch"]:
        """A(theta); infinite or NaN outside of the domain."""

    @abc.abstractmethod
    def _outside(self, mean: Tensor) -> Tensor:
        """Mask (batch,) of what is in no interior of the mean parameters."""

    @abc.abstractmethod
    def _start(self, mean: Tensor) -> Tensor:
        """Canonical parameters near those of a mean, inside of the domain."""

    def _free(self, canonical: Tensor) -> Tensor:
        """Coordinates without bounds, in which Newton's method cannot leave the domain."""
        return canonical

    def _bind(self, free: Tensor) -> Tensor:
        """The inverse of `_free`."""
        return free

    def mean(self, canonical: Float[Tensor, "..."]) -> Float[Tensor, "batch n"]:
        """Mean parameters E[T(x)] of canonical ones, (batch, n) both: the derivative of the log-partition.

        Raises:
            TypeError, ValueError: not a real matrix; a row outside of the domain.
        """
        canonical = checks.potentials(canonical, "canonical", ("batch", "n"))
        outside = ~torch.isfinite(self.log_partition(canonical.detach()))
        _refuse(outside, canonical, "canonical", self)
        return self._mean(canonical)

    def _mean(self, canonical: Tensor) -> Tensor:
        return gradient(self.log_partition, (canonical,))[0]

    def covariance(self, canonical: Float[Tensor, "..."]) -> Float[Tensor, "batch n n"]:
        """Covariance of T(x): the second derivative of the log-partition.

        Raises:
            TypeError, ValueError: as `mean`.
        """
        self.mean(canonical)
        rows = [
            gradient(lambda t, i=i: self._mean_recorded(t)[:, i], (canonical,))[0] for i in range(canonical.shape[1])
        ]
        return torch.stack(rows, 1)

    def _mean_recorded(self, canonical: Tensor) -> Tensor:
        with torch.enable_grad():
            return self._mean(canonical)

    def canonical(self, mean: Float[Tensor, "..."], *, max_steps: int = 50) -> Float[Tensor, "batch n"]:
        """Canonical parameters of given mean parameters, by Newton's method: the inverse of `mean`.

        This is also the maximum-likelihood estimate where `mean` is the average of T over a sample. Differentiable, to
        second order, by the implicit function theorem.

        Args:
            mean: (batch, n), in the interior of what means can be.
            max_steps: of Newton's method.

        Raises:
            TypeError, ValueError: not a real matrix; a row that is the mean of no distribution of the family.
            SolverError: Newton's method did not converge in some row.
        """
        mean = checks.potentials(mean, "mean", ("batch", "n"))
        _refuse(~torch.isfinite(mean).all(1) | self._outside(mean.detach()), mean, "mean", self)
        tolerance = torch.finfo(mean.dtype).eps ** 0.75
        solution = root(
            lambda free, target: self._mean(self._bind(free)) - target, self._free(self._start(mean.detach())), (mean,),
            adjoint=ImplicitAdjoint(order=2), rtol=tolerance, atol=tolerance, max_steps=max_steps, throw=True,
        )  # fmt: skip
        return self._bind(solution.value)

    def kl(self, canonical: Float[Tensor, "..."], other: Float[Tensor, "..."]) -> Float[Tensor, " batch"]:
        """Kullback-Leibler divergence of `other` from `canonical`: the Bregman divergence of the log-partition.

        Raises:
            TypeError, ValueError: as `mean`, for both.
        """
        mean = self.mean(canonical)
        self.mean(other)
        return self.log_partition(other) - self.log_partition(canonical) - ((other - canonical) * mean).sum(1)


def _refuse(wrong: Tensor, given: Tensor, name: str, family: ExponentialFamily) -> None:
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"{type(family).__name__}: row {row} of {name}, {given[row].tolist()}, is not in the interior of what "
            f"{name} parameters can be."
        )


class Bernoulli(ExponentialFamily):
    """n independent coins, T(x) = x: log-odds to probabilities."""

    def log_partition(self, canonical: Float[Tensor, "batch n"]) -> Float[Tensor, " batch"]:
        """Sum of softplus."""
        return torch.nn.functional.softplus(canonical, threshold=40.0).sum(1)

    def _outside(self, mean: Tensor) -> Tensor:
        return ((mean <= 0) | (mean >= 1)).any(1)

    def _start(self, mean: Tensor) -> Tensor:
        return mean.logit()


class Categorical(ExponentialFamily):
    """One of n + 1 outcomes, T(x) the indicators of the first n: log-ratios to the last outcome, to probabilities."""

    def log_partition(self, canonical: Float[Tensor, "batch n"]) -> Float[Tensor, " batch"]:
        """Logsumexp with the zero of the last outcome."""
        return torch.nn.functional.pad(canonical, (0, 1)).logsumexp(1)

    def _outside(self, mean: Tensor) -> Tensor:
        return (mean <= 0).any(1) | (mean.sum(1) >= 1)

    def _start(self, mean: Tensor) -> Tensor:
        return mean.log() - (1 - mean.sum(1, keepdim=True)).log()


class Poisson(ExponentialFamily):
    """n independent counts, T(x) = x: logarithms of rates to rates."""

    def log_partition(self, canonical: Float[Tensor, "batch n"]) -> Float[Tensor, " batch"]:
        """Sum of the rates."""
        return canonical.exp().sum(1)

    def _outside(self, mean: Tensor) -> Tensor:
        return (mean <= 0).any(1)

    def _start(self, mean: Tensor) -> Tensor:
        return mean.log()


class Gaussian(ExponentialFamily):
    """One real number, T(x) = (x, x^2): (mean / variance, -1 / (2 variance)) to the first two moments."""

    def log_partition(self, canonical: Float[Tensor, "batch n"]) -> Float[Tensor, " batch"]:
        """With the constant log(2 pi) / 2."""
        first, second = canonical.unbind(1)
        return -(first**2) / (4 * second) - 0.5 * (-second / math.pi).log()

    def _outside(self, mean: Tensor) -> Tensor:
        return mean[:, 1] <= mean[:, 0] ** 2

    def _start(self, mean: Tensor) -> Tensor:
        variance = mean[:, 1] - mean[:, 0] ** 2
        return torch.stack([mean[:, 0] / variance, -0.5 / variance], 1)

    def _free(self, canonical: Tensor) -> Tensor:
        return torch.stack([canonical[:, 0], (-canonical[:, 1]).log()], 1)

    def _bind(self, free: Tensor) -> Tensor:
        return torch.stack([free[:, 0], -free[:, 1].exp()], 1)


class Gamma(ExponentialFamily):
    """One positive number, T(x) = (log x, x): (shape - 1, -rate) to the means of logarithm and value."""

    def log_partition(self, canonical: Float[Tensor, "batch n"]) -> Float[Tensor, " batch"]:
        """Log of the gamma function of the shape, less shape times log-rate."""
        shape, rate = canonical[:, 0] + 1, -canonical[:, 1]
        value = torch.lgamma(shape) - shape * rate.log()
        return torch.where(shape > 0, value, torch.nan)

    def _outside(self, mean: Tensor) -> Tensor:
        return ~(mean[:, 0] < mean[:, 1].log())

    def _start(self, mean: Tensor) -> Tensor:
        # Minka 2002, within a few percent of the shape.
        gap = mean[:, 1].log() - mean[:, 0]
        shape = (3 - gap + ((gap - 3) ** 2 + 24 * gap).sqrt()) / (12 * gap)
        return torch.stack([shape - 1, -shape / mean[:, 1]], 1)

    def _free(self, canonical: Tensor) -> Tensor:
        return torch.stack([canonical[:, 0] + 1, -canonical[:, 1]], 1).log()

    def _bind(self, free: Tensor) -> Tensor:
        shape, rate = free.exp().unbind(1)
        return torch.stack([shape - 1, -rate], 1)


class Dirichlet(ExponentialFamily):
    """A point of the simplex, T(x) = log x: concentrations less one, to the means of the logarithms.

    Source of the start: Minka 2000, Estimating a Dirichlet distribution.
    """

    def log_partition(self, canonical: Float[Tensor, "batch n"]) -> Float[Tensor, " batch"]:
        """Log of the multivariate beta function."""
        concentration = canonical + 1
        value = torch.lgamma(concentration).sum(1) - torch.lgamma(concentration.sum(1))
        return torch.where((concentration > 0).all(1), value, torch.nan)

    def _outside(self, mean: Tensor) -> Tensor:
        # Jensen: the geometric means of coordinates that sum to one sum to less.
        return ~(mean.exp().sum(1) < 1)

    def _start(self, mean: Tensor) -> Tensor:
        concentration = torch.ones_like(mean)
        for _ in range(20):
            level = mean + torch.digamma(concentration.sum(1, keepdim=True))
            concentration = torch.where(level >= -2.22, level.exp() + 0.5, -1 / (level + 0.5772156649))
        return concentration - 1

    def _free(self, canonical: Tensor) -> Tensor:
        return (canonical + 1).log()

    def _bind(self, free: Tensor) -> Tensor:
        return free.exp() - 1
