"""Per-sample square matrices, known by what they do to a vector."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

Map = Callable[[Tensor], Tensor]


class LinearOperator:
    """A batch of square matrices A, one a sample, given as the map v -> A v.

    The map takes and returns (batch, n), is linear, and sample i of its output depends on sample i of its input
    alone. Applications are counted by the solvers, not here.

    Args:
        matvec: v -> A v; None where only the transpose can be applied.
        rmatvec: v -> A^T v; None where only A can be applied.
        batch: number of samples.
        size: n.
        dtype: real floating-point type of the vectors that the maps take and return.
        device: their device.
        dense: the matrices (batch, n, n) themselves, where they are known.
        assemble_with: "matvec" or "rmatvec": which of the two maps `dense()` uses where both are there. The default
            suits an operator whose matvec is a jvp and whose rmatvec is a vjp, which is the cheaper. `T` swaps it.

    Raises:
        ValueError: neither map is given; batch or size below one; a dtype that is not real floating-point; `dense`
            of another shape; an unknown `assemble_with`.
    """

    def __init__(
        self,
        matvec: Map | None,
        rmatvec: Map | None = None,
        *,
        batch: int,
        size: int,
        dtype: torch.dtype,
        device: torch.device | str,
        dense: Float[Tensor, "batch n n"] | None = None,
        assemble_with: str = "rmatvec",
    ) -> None:
        if matvec is None and rmatvec is None:
            raise ValueError("LinearOperator needs matvec, rmatvec or both; got neither.")
        if batch < 1 or size < 1:
            raise ValueError(f"LinearOperator: batch and size must be at least 1; got batch={batch}, size={size}.")
        if not dtype.is_floating_point:
            raise ValueError(f"LinearOperator: dtype must be real floating-point; got {dtype}.")
        if dense is not None and tuple(dense.shape) != (batch, size, size):
            raise ValueError(f"LinearOperator: dense must have shape {(batch, size, size)}; got {tuple(dense.shape)}.")
        if assemble_with not in ("matvec", "rmatvec"):
            raise ValueError(f"LinearOperator: assemble_with must be 'matvec' or 'rmatvec'; got {assemble_with!r}.")
        self._matvec, self._rmatvec, self._dense = matvec, rmatvec, dense
        self.batch, self.size, self.dtype = batch, size, dtype
        # "cuda" is not equal to the "cuda:0" of a tensor on it.
        self.device = torch.empty(0, device=device).device
        self.assemble_with = assemble_with

    @classmethod
    def from_matrix(cls, matrix: Float[Tensor, "*batch n n"], batch: int | None = None) -> LinearOperator:
        """The operator of given matrices.

        Args:
            matrix: (batch, n, n), or (n, n) for one matrix shared by `batch` samples.
            batch: number of samples; needed for (n, n), and must agree otherwise.

        Raises:
            ValueError: a matrix that is not square or has another number of dimensions; a batch that is missing or
                differs.
        """
        if matrix.ndim not in (2, 3) or matrix.shape[-1] != matrix.shape[-2]:
            raise ValueError(f"matrix must have shape (batch, n, n) or (n, n); got {tuple(matrix.shape)}.")
        if matrix.ndim == 2:
            if batch is None:
                raise ValueError("a matrix of shape (n, n) is shared by all samples: say by how many (batch=...).")
            matrix = matrix.expand(batch, *matrix.shape)
        elif batch is not None and batch != len(matrix):
            raise ValueError(f"matrix holds a batch of {len(matrix)}, expected {batch}.")
        return cls(
            # A vector from the left makes bmm a product of a row with a row-major matrix, several times faster on a
            # CPU than the same product written with columns.
            lambda v: torch.bmm(v.unsqueeze(1), matrix.mT).squeeze(1),
            lambda v: torch.bmm(v.unsqueeze(1), matrix).squeeze(1),
            batch=len(matrix),
            size=matrix.shape[-1],
            dtype=matrix.dtype,
            device=matrix.device,
            dense=matrix,
        )

    def matvec(self, v: Float[Tensor, "batch n"]) -> Float[Tensor, "batch n"]:
        """A v.

        Raises:
            NotImplementedError: this operator was made without a matvec.
        """
        if self._matvec is None:
            raise NotImplementedError(
                "this LinearOperator has no matvec: it was made from rmatvec alone (or is the T of one without)."
            )
        return self._matvec(v)

    def rmatvec(self, v: Float[Tensor, "batch n"]) -> Float[Tensor, "batch n"]:
        """A^T v.

        Raises:
            NotImplementedError: this operator was made without an rmatvec.
        """
        if self._rmatvec is None:
            raise NotImplementedError(
                "this LinearOperator has no rmatvec: pass rmatvec=... (v -> A^T v) to its constructor."
            )
        return self._rmatvec(v)

    @property
    def T(self) -> LinearOperator:
        """The transpose of every sample's matrix."""
        return LinearOperator(
            self._rmatvec,
            self._matvec,
            batch=self.batch,
            size=self.size,
            dtype=self.dtype,
            device=self.device,
            dense=None if self._dense is None else self._dense.mT,
            assemble_with="matvec" if self.assemble_with == "rmatvec" else "rmatvec",
        )

    @property
    def forward(self) -> bool:
        """Whether A can be applied."""
        return self._matvec is not None

    @property
    def backward(self) -> bool:
        """Whether A^T can be applied."""
        return self._rmatvec is not None

    @property
    def assembled(self) -> bool:
        """Whether `dense()` is at hand and costs no application."""
        return self._dense is not None

    def dense(self) -> Float[Tensor, "batch n n"]:
        """The matrices: those given, or assembled by n applications to the vectors of the standard basis."""
        if self._dense is not None:
            return self._dense
        transposed = self._matvec is None or (self._rmatvec is not None and self.assemble_with == "rmatvec")
        apply = self.rmatvec if transposed else self.matvec
        basis = torch.eye(self.size, dtype=self.dtype, device=self.device)
        lines = torch.stack([apply(e.expand(self.batch, self.size).contiguous()) for e in basis], dim=1)
        return lines if transposed else lines.mT

    def __repr__(self) -> str:
        maps = [name for name, f in (("matvec", self._matvec), ("rmatvec", self._rmatvec)) if f is not None]
        known = ", dense" if self.assembled else ""
        return (
            f"LinearOperator({', '.join(maps)}{known}, batch={self.batch}, size={self.size}, dtype={self.dtype}, "
            f"device='{self.device}')"
        )
