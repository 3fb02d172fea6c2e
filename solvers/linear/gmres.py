"""GMRES with restarts, batched."""

from __future__ import annotations

import torch
from torch import Tensor

from ..options import options
from ..transforms import any_true, inside_transform
from .restart import Cycle, iterate_in_cycles
from .solver import IterativeSolver, Result, System, check_count


@options
class GMRES(IterativeSolver):
    """GMRES(m): the least residual in a Krylov space of at most m dimensions, then again from there.

    For any nonsingular matrix. One application of the operator a step and one more a cycle, which checks the true
    residual. A step costs four products with the basis, so choose BiCGSTAB where vectors are so long or so many
    that `restart` of them do not fit in memory, and CG where the matrix is symmetric positive definite. With a small
    `restart` an indefinite or strongly rotating matrix can stagnate (status STAGNATED); n steps without a
    restart always suffice.

    The basis is orthogonalised by classical Gram-Schmidt done twice, which is as good as Householder's reflections
    and takes two products of matrices where modified Gram-Schmidt takes a loop over vectors; the small least-squares
    problem is solved by plane reflections in float64. A preconditioner is applied from the right, so that the residual
    remains that of A x = b.

    Args:
        rtol: tolerance relative to |b|; None takes 1e-10 in float64 and 1e-5 otherwise.
        atol: absolute tolerance.
        max_steps: budget of steps of every sample, over all cycles.
        restart: steps in a cycle; the basis holds restart + 1 vectors a sample.

    Raises:
        ValueError: a negative tolerance; restart or max_steps below one.

    Source: Saad and Schultz 1986, algorithm 4; Giraud, Langou and Rozloznik 2005 on Gram-Schmidt done twice.
    """

    restart: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "restart", self.restart)

    def _run(self, system: System) -> Result:
        return iterate_in_cycles(system, self._cycle, self._tolerance(system), self.max_steps)

    def _cycle(
        self, system: System, tolerance: Tensor, r: Tensor, norm: Tensor, active: Tensor, budget: Tensor
    ) -> Cycle:
        # Below this, relative to the rest of its column, a pivot is rounding noise.
        noise = 16 * torch.finfo(r.dtype).eps
        tiny = torch.finfo(r.dtype).tiny
        length = min(self.restart, self.max_steps, r.shape[1])
        precondition = system.precondition or (lambda v: v)
        basis = Basis(length + 1)
        # Samples that are done get zero vectors: cheap to mask, and no operator can make a NaN of them.
        v = basis.append(r, active / norm.clamp_min(tiny))
        columns, reflections = [], []
        last = torch.ones_like(norm, dtype=torch.float64).unsqueeze(1)
        relative = tolerance / norm
        steps = torch.zeros_like(norm, dtype=torch.int64)
        started = active
        for step in range(length):
            h, w = basis.orthogonalise(system.apply(precondition(v)))
            height = torch.linalg.vector_norm(w, dim=1)
            column = torch.cat([h, height.unsqueeze(1)], dim=1).double()
            columns.append(column)
            # The product Q of all reflections so far is kept by rows. Its last row is the only one that the next
            # reflection changes and the only one needed to find it, and starts with the relative residual.
            d = torch.linalg.vecdot(last, column[:, :-1])
            tall = column[:, -1]
            diagonal = torch.hypot(d, tall)
            cosine, sine = (d / diagonal).unsqueeze(1), (tall / diagonal).unsqueeze(1)
            reflections.append(torch.cat([last * cosine, sine], dim=1))
            last = torch.cat([last * sine, -cosine], dim=1)
            steps = steps + active
            # A height of rounding noise: the Krylov space is exhausted, and exact unless the matrix is singular.
            above = height > noise * torch.linalg.vector_norm(h, dim=1)
            active = active & (last[:, 0] > relative) & above & (steps < budget)
            if step + 1 == length or not any_true(active):
                break
            v = basis.append(w, active / height.clamp_min(tiny))
        y = _least_squares(columns, reflections, norm, steps, noise)
        update = precondition(basis.combine(y.to(r.dtype)))
        ended = started & ~active & (steps < budget)
        return Cycle(update, steps, steps, ended, torch.zeros_like(ended))


def _least_squares(
    columns: list[Tensor], reflections: list[Tensor], norm: Tensor, steps: Tensor, noise: float
) -> Tensor:
    """The minimisers y (batch, k) of | |r| e1 - H y |, every sample with its own number of leading columns.

    Args:
        columns: those of the Hessenberg matrix H, column j (batch, j + 2).
        reflections: rows of the orthogonal Q that makes H triangular, row j (batch, j + 2).
        norm: |r| (batch,).
        steps: how many columns count (batch,).
        noise: a diagonal entry below `noise` times its column is that of a singular matrix; the column is left out.
    """
    k = len(columns)
    # Both lists, end to end, are the staircase of a (k, k + 1) matrix: one gather fills it, with zeros from a leading
    # column of them.
    row = torch.arange(k, device=norm.device)
    line = torch.arange(k + 1, device=norm.device)
    place = ((row * (row + 3) // 2 + 1).unsqueeze(1) + line) * (line <= row.unsqueeze(1) + 1)
    zero = torch.zeros_like(columns[0][:, :1])
    flat = torch.stack([torch.cat([zero, *columns], dim=1), torch.cat([zero, *reflections], dim=1)])
    hessenberg, q = flat.index_select(2, place.flatten()).unflatten(2, (k, k + 1)).unbind()
    triangle = torch.bmm(q, hessenberg.mT)
    diagonal = triangle.diagonal(dim1=1, dim2=2)
    used = (row < steps.unsqueeze(1)) & (diagonal.abs() > noise * torch.linalg.vector_norm(hessenberg, dim=2))
    both = used.unsqueeze(1) & used.unsqueeze(2)
    triangle = torch.where(both, triangle, torch.eye(k, dtype=triangle.dtype, device=triangle.device))
    right = (q[:, :, 0] * norm.unsqueeze(1)).masked_fill(~used, 0.0)
    return torch.linalg.solve_triangular(triangle, right.unsqueeze(2), upper=True).squeeze(2)


class Basis:
    """Orthonormal vectors of every sample, stored in one preallocated tensor (capacity, batch, n).

    Inside a functorch transform, where writing into a tensor of another level is not allowed, they are stacked anew
    for every product.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._rows: list[Tensor] = []
        self._functional = inside_transform()
        self._store: Tensor | None = None

    @property
    def vectors(self) -> Tensor:
        """(batch, count, n)."""
        if self._functional or self._store is None:
            return torch.stack(self._rows, dim=1)
        return self._store[: len(self._rows)].transpose(0, 1)

    def append(self, w: Tensor, factor: Tensor) -> Tensor:
        """Add w (batch, n) times factor (batch,), and return the product."""
        v = torch.mul(w, factor.unsqueeze(1), out=self._free(w))
        self._rows.append(v)
        return v

    def orthogonalise(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficients h (batch, count) and what remains of w (batch, n): w = h vectors + rest."""
        vectors, free = self.vectors, self._free(w)
        out = None if free is None else free.unsqueeze(1)
        # Rows from the left: bmm on a CPU is an order of magnitude slower for the same products written as columns.
        row = w.unsqueeze(1)
        first = torch.bmm(row, vectors.mT)
        row = torch.baddbmm(row, first, vectors, alpha=-1, out=out)
        second = torch.bmm(row, vectors.mT)
        row = torch.baddbmm(row, second, vectors, alpha=-1, out=out)
        return (first + second).squeeze(1), row.squeeze(1)

    def _free(self, like: Tensor) -> Tensor | None:
        """Where the next vector will be, and may be worked on until then; None if that must be new memory."""
        if self._functional:
            return None
        if self._store is None:
            self._store = like.new_empty(self._capacity, *like.shape)
        return self._store[len(self._rows)]

    def combine(self, y: Tensor) -> Tensor:
        """Sum of y_j times vector j, for y (batch, k) with k <= count: (batch, n)."""
        return torch.bmm(y.unsqueeze(1), self.vectors[:, : y.shape[1]]).squeeze(1)
