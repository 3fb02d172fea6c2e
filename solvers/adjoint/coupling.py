"""Samples that a function couples, as batch normalisation does: noticed, and solved as one system."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..linear import GMRES, LinearOperator, LinearSolver
from ..solution import Solution, Stats
from ..transforms import any_true
from ..tree import norms


def coupled(apply: Callable[[Tensor], Tensor], like: Tensor) -> bool:
    """Whether the linear map `apply` carries anything from one row of its argument (rows, n) to another.

    Each pair of rows is told apart by some bit of their numbers, so 2 log2(rows) applications find any coupling.
    """
    rows, size = like.shape
    # No constant, which a mean over the features would hide.
    probe = torch.arange(1, size + 1, dtype=like.dtype, device=like.device).cos().expand(rows, size)
    number = torch.arange(rows, device=like.device).unsqueeze(1)
    for bit in range((rows - 1).bit_length()):
        chosen = (number >> bit) % 2 == 1
        for some in (chosen, ~chosen):
            product = apply(torch.where(some, probe, 0.0))
            # A NaN row makes NaNs of zeros, which is no coupling.
            if any_true(~some & (product != 0) & torch.isfinite(product)):
                return True
    return False


def doubtful(operator: LinearOperator, right: Tensor, found: Solution[Tensor], resolution: float) -> bool:
    """Whether the rows' true residual, in one application to all of them, is not what the solver says it is.

    A solver works row by row, scales them, and freezes those that are done, so the residual that it reports is not
    the true one where rows are coupled. `resolution` is the relative rounding of the operator.
    """
    if len(right) == 1:
        return False
    size = norms(right)
    true = norms(right - operator.matvec(found.value))
    rounding = (100 * torch.finfo(right.dtype).eps + 4 * resolution) * (size + norms(found.value))
    return not bool((true <= 2 * found.stats.residual * size + rounding).all())


def solve_jointly(
    operator: LinearOperator, right: Tensor, found: Solution[Tensor], solver: LinearSolver
) -> Solution[Tensor]:
    """Solve coupled rows as one system; `found` is what was tried before, and counts into the statistics."""
    batch, size = right.shape

    def whole(v: Tensor) -> Tensor:
        return operator.matvec(v.reshape(batch, size)).reshape(1, batch * size)

    joint = LinearOperator(whole, None, batch=1, size=batch * size, dtype=operator.dtype, device=operator.device)
    solution = (solver if isinstance(solver, GMRES) else GMRES()).solve(joint, right.reshape(1, -1))
    stats = solution.stats
    return Solution(
        solution.value.reshape(batch, size),
        Stats(
            found.stats.steps + stats.steps,
            found.stats.evaluations + stats.evaluations,
            stats.residual.expand(batch),
            stats.status.expand(batch),
        ),
    )
