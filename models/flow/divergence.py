"""The divergence of a field: exactly, or by estimators whose noise is fixed within a solve."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ...solvers.options import options, suggest
from ...solvers.transforms import inside_transform

Derivative = Callable[[Tensor], Tensor]
Noise = tuple[Tensor, ...]


class Expansion(NamedTuple):
    """A field and its divergence at one place.

    Attributes:
        derivative: the field, (batch, *shape).
        divergence: the trace of its Jacobian, (batch,), exact or estimated.
        squares: the sum of the squared entries of its Jacobian, (batch,), likewise.
    """

    derivative: Tensor
    divergence: Tensor
    squares: Tensor


@options
class Divergence(abc.ABC):
    """A way to get the trace of a field's Jacobian. Subclasses are frozen option classes that hold knobs only."""

    def draw(self, f: Derivative, y: Float[Tensor, "batch *shape"]) -> Noise:
        """What stays fixed within a solve that starts at y: tensors with the batch in front."""
        return ()

    @abc.abstractmethod
    def __call__(self, f: Derivative, y: Float[Tensor, "batch *shape"], noise: Noise) -> Expansion:
        """The field f, a function of the state at one time, its divergence, and its Jacobian's squared norm, at y."""


@options
class ExactTrace(Divergence):
    """The trace by n products with the transposed Jacobian, n the size of a sample. For few dimensions.

    Source: Grathwohl et al. 2019, section 3, without their estimator.
    """

    def __call__(self, f: Derivative, y: Float[Tensor, "batch *shape"], noise: Noise) -> Expansion:
        """The field, the exact trace and the exact squared Frobenius norm."""
        out, pull = _recorded(f, y)
        flat = out.flatten(1)
        trace = squares = torch.zeros_like(flat[:, 0])
        for i in range(flat.shape[1]):
            unit = torch.zeros_like(flat)
            unit[:, i] = 1.0
            row = pull(unit.view_as(out)).flatten(1)
            trace, squares = trace + row[:, i], squares + row.square().sum(1)
        return Expansion(out, trace, squares)


@options
class Hutchinson(Divergence):
    """The estimate e^T J e with random e of mean zero and covariance one: unbiased, for one product with J^T.

    Attributes:
        noise: "rademacher" (signs, of the least variance) or "gaussian".

    Raises:
        ValueError: another noise.

    Source: Hutchinson 1989; Grathwohl et al. 2019, equation 8 (one e a solve).
    """

    noise: str = "rademacher"

    def __post_init__(self) -> None:
        """Check the knob."""
        _check_noise(self.noise)

    def draw(self, f: Derivative, y: Float[Tensor, "batch *shape"]) -> Noise:
        """e (batch, *shape)."""
        return (_random(self.noise, y),)

    def __call__(self, f: Derivative, y: Float[Tensor, "batch *shape"], noise: Noise) -> Expansion:
        """The field, and unbiased estimates of the trace and of the squared Frobenius norm."""
        (vector,) = noise
        out, pull = _recorded(f, y)
        product = pull(vector).flatten(1)
        return Expansion(out, (product * vector.flatten(1)).sum(1), product.square().sum(1))


@options
class HutchPlusPlus(Divergence):
    """The trace on a subspace exactly, and Hutchinson's estimate on its complement: unbiased, with less variance.

    The subspace is spanned by the products of J^T at the start of the solve with `rank` normal vectors, and is fixed
    within the solve, as the noise is. So the estimate is a smooth function of state and time whose derivative is exact,
    no factorisation is needed on the way, and it is exact where the rows of J span no more than `rank` dimensions and
    the same ones throughout, as where the field begins with a narrow linear layer, or where `rank` is n.

    Attributes:
        rank: dimensions of the subspace; at most n are used.
        samples: vectors of Hutchinson's estimate on the complement.
        noise: of these vectors, "rademacher" or "gaussian".

    Raises:
        ValueError: another noise, or a rank or number of samples below one.

    Source: Meyer, Musco, Musco and Woodruff 2021, algorithm 1, with the subspace taken at the start.
    """

    rank: int = 4
    samples: int = 1
    noise: str = "rademacher"

    def __post_init__(self) -> None:
        """Check the knobs."""
        _check_noise(self.noise)
        if self.rank < 1 or self.samples < 1:
            raise ValueError(f"HutchPlusPlus: rank and samples must be at least 1; got {self.rank}, {self.samples}.")

    def draw(self, f: Derivative, y: Float[Tensor, "batch *shape"]) -> Noise:
        """Orthonormal rows (batch, rank, n), and random ones orthogonal to them (batch, samples, n)."""
        y = y.detach()
        size = y[0].numel()
        rank = min(self.rank, size)
        if rank == size:
            basis = torch.eye(size, dtype=y.dtype, device=y.device).expand(len(y), -1, -1)
            return basis, y.new_zeros(len(y), 0, size)
        with torch.no_grad():
            _, pull = _recorded(f, y)
            # Normal vectors always: of a few random signs two are often equal.
            sketch = torch.stack([pull(torch.randn_like(y)).flatten(1) for _ in range(rank)], dim=2)
        # Columns beyond the rank of J are rounding errors, or zero, and have to span something.
        scale = torch.linalg.vector_norm(sketch, dim=(1, 2), keepdim=True)
        floor = scale * torch.finfo(y.dtype).eps + torch.finfo(y.dtype).tiny
        basis = torch.linalg.qr(sketch + floor * torch.randn_like(sketch))[0].mT
        vectors = torch.stack([_random(self.noise, y).flatten(1) for _ in range(self.samples)], dim=1)
        return basis, vectors - vectors @ basis.mT @ basis

    def __call__(self, f: Derivative, y: Float[Tensor, "batch *shape"], noise: Noise) -> Expansion:
        """The field, and unbiased estimates of the trace and of the squared Frobenius norm."""
        basis, vectors = noise
        out, pull = _recorded(f, y)
        trace = squares = torch.zeros_like(out.flatten(1)[:, 0])
        for group, weight in ((basis, 1.0), (vectors, 1.0 / max(vectors.shape[1], 1))):
            for vector in group.unbind(1):
                product = pull(vector.reshape(out.shape)).flatten(1)
                trace = trace + weight * (product * vector).sum(1)
                squares = squares + weight * product.square().sum(1)
        return Expansion(out, trace, squares)


def _check_noise(noise: str) -> None:
    if noise not in ("rademacher", "gaussian"):
        raise ValueError(f"noise must be 'rademacher' or 'gaussian'; got {noise!r}.")


def _random(noise: str, like: Tensor) -> Tensor:
    if noise == "gaussian":
        return torch.randn_like(like)
    return torch.empty_like(like).bernoulli_(0.5).mul_(2).sub_(1)


def _recorded(f: Derivative, y: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """f(y), and products with its transposed Jacobian, differentiable again if the caller records.

    Raises:
        RuntimeError: in inference mode, in which nothing can be recorded.
    """
    if inside_transform():
        out, pullback, *_ = torch.func.vjp(f, y)
        return out, lambda cotangent: pullback(cotangent)[0]
    record = torch.is_grad_enabled()
    with torch.enable_grad():
        if not (record and y.requires_grad):
            y = y.detach().requires_grad_()
        out = f(y)

    def pull(cotangent: Tensor) -> Tensor:
        if not out.requires_grad:
            return torch.zeros_like(y)
        (product,) = torch.autograd.grad(
            out, y, cotangent, create_graph=record, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return product

    return (out if record else out.detach()), pull


# By name, because a card holds an architecture's arguments as words and numbers.
DIVERGENCES: dict[str, Divergence] = {
    "exact": ExactTrace(),
    "rademacher": Hutchinson("rademacher"),
    "gaussian": Hutchinson("gaussian"),
    "hutch++": HutchPlusPlus(),
}


def named_divergence(divergence: str | Divergence, model: str) -> Divergence:
    """A divergence that may be given by its name, for `model`, which the message names.

    Raises:
        ValueError: an unknown name.
    """
    if not isinstance(divergence, str):
        return divergence
    if divergence not in DIVERGENCES:
        raise ValueError(
            f"{model}: divergence must be one of {', '.join(map(repr, DIVERGENCES))}; got {divergence!r}."
            f"{suggest(divergence, list(DIVERGENCES))}"
        )
    return DIVERGENCES[divergence]
