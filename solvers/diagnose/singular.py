"""Extreme singular values of a batch of operators, and solves with them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..linear import GMRES, LinearOperator
from ..tree import norms

Map = Callable[[Tensor], Tensor]
AGREEMENT = 1e-3
"""A largest singular value is taken when a further Krylov dimension changes it by no more than this share."""


def extreme_singular_values(
    apply: Map, transpose: Map, start: Tensor, steps: int, settle: bool = True
) -> tuple[Tensor, Tensor]:
    """An upper bound on the smallest and a lower bound on the largest singular value (batch,) of a batch of maps.

    Golub-Kahan bidiagonalisation with full reorthogonalisation: A^T U = V B^T, so the singular values of B lie between
    those of A. The largest is mostly right after a few steps; a sample that is not finite is NaN.

    Args:
        apply: v -> A v, (batch, n) to (batch, n).
        transpose: u -> A^T u.
        start: first vectors u (batch, n).
        steps: the largest dimension of the Krylov spaces.
        settle: end when one more dimension changes the largest value of no sample.

    Source: Golub and Kahan 1965; Golub and Van Loan 2013, section 10.4.
    """
    tiny = torch.finfo(start.dtype).tiny

    def normalise(v: Tensor) -> tuple[Tensor, Tensor]:
        length = norms(v)
        return v / length.clamp_min(tiny).unsqueeze(1), length

    def orthogonalise(v: Tensor, basis: list[Tensor]) -> Tensor:
        q = torch.stack(basis, dim=1)
        for _ in range(2):
            v = v - torch.bmm(torch.bmm(q, v.unsqueeze(2)).mT, q).squeeze(1)
        return v

    u, _ = normalise(start)
    v, alpha = normalise(transpose(u))
    left, right, alphas, betas = [u], [v], [alpha], []
    smallest = largest = alpha
    for _ in range(min(steps, start.shape[1]) - 1):
        u, beta = normalise(orthogonalise(apply(v), left))
        left.append(u)
        v, alpha = normalise(orthogonalise(transpose(u), right))
        right.append(v)
        betas.append(beta)
        alphas.append(alpha)
        small = torch.diag_embed(torch.stack(alphas, dim=1)) + torch.diag_embed(torch.stack(betas, dim=1), offset=-1)
        finite = torch.isfinite(small).all(dim=(1, 2))
        values = torch.linalg.svdvals(torch.where(finite[:, None, None], small, 0.0))
        values = torch.where(finite.unsqueeze(1), values, math.nan)
        settled = (values[:, 0] - largest).abs() <= AGREEMENT * values[:, 0]
        smallest, largest = values[:, -1], values[:, 0]
        if settle and len(alphas) > 3 and bool((settled | ~finite).all()):
            break
    return smallest, largest


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """The extreme singular values of a batch of A, and solves.

    Attributes:
        smallest: (batch,); an upper bound where `certain` does not hold.
        largest: (batch,).
        certain: (batch,) whether all linear systems that `smallest` rests on were solved.
        solve: (b, transposed) -> A^{-1} b or A^{-T} b, (batch, n) both; not finite where A is singular.
    """

    smallest: Tensor
    largest: Tensor
    certain: Tensor
    solve: Callable[[Tensor, bool], Tensor]

    @property
    def condition(self) -> Tensor:
        """largest / smallest (batch,); infinite where A is singular or not certain."""
        ratio = self.largest / self.smallest
        singular = ~self.certain | (self.smallest == 0)
        return torch.where(singular & ~torch.isnan(self.largest), math.inf, ratio)


def dense_spectrum(operator: LinearOperator) -> Spectrum:
    """By assembling A: n products with A^T, and a singular value decomposition."""
    matrix = operator.dense()
    finite = torch.isfinite(matrix).all(dim=(1, 2))
    sound = torch.where(finite[:, None, None], matrix, 0.0)
    values = torch.where(finite.unsqueeze(1), torch.linalg.svdvals(sound), math.nan)

    def solve(b: Tensor, transposed: bool) -> Tensor:
        x = torch.linalg.solve_ex(sound.mT if transposed else sound, b.to(sound.dtype).unsqueeze(2))[0].squeeze(2)
        return torch.where(finite.unsqueeze(1), x, math.nan)

    return Spectrum(values[:, -1], values[:, 0], finite, solve)


def krylov_spectrum(operator: LinearOperator, steps: int, generator: torch.Generator | None) -> Spectrum:
    """Without assembling A: bidiagonalisation of A, and of A^{-1} applied by GMRES.

    That of A alone would need as many steps as its condition number to see the smallest value; that of its inverse
    sees it first. Only where the systems cannot be solved, the upper bound by the former has to do, which also shows
    a value of zero apart from the others.
    """
    shape = (operator.batch, operator.size)
    start = torch.randn(shape, generator=generator, dtype=operator.dtype, device=operator.device)
    _, largest = extreme_singular_values(operator.matvec, operator.rmatvec, start, steps)
    solver = GMRES(rtol=1e-9 if operator.dtype == torch.float64 else 1e-5, restart=50, max_steps=500)
    certain = torch.isfinite(largest)

    def solve(b: Tensor, transposed: bool) -> Tensor:
        nonlocal certain
        # A sample that has failed once is not tried again.
        wanted = certain & torch.isfinite(b).all(dim=1)
        right = torch.where(wanted.unsqueeze(1), b.to(operator.dtype), 0.0)
        solution = solver.solve(operator.T if transposed else operator, right)
        certain = certain & (solution.stats.residual <= math.sqrt(torch.finfo(right.dtype).eps))
        return torch.where((certain & wanted).unsqueeze(1), solution.value, math.nan)

    inverse = extreme_singular_values(lambda v: solve(v, False), lambda v: solve(v, True), start, steps)[1]
    smallest = 1 / inverse
    if not bool(certain.all()):
        bound, _ = extreme_singular_values(operator.matvec, operator.rmatvec, start, 2 * steps, settle=False)
        smallest = torch.where(certain, smallest, bound)
    return Spectrum(smallest, largest, certain, solve)
