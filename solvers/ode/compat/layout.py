"""States as torchdiffeq has them, a tensor or a tuple of tensors without a batch, as one matrix, and back."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...transforms import plain

Norm = Callable[[Any], Any]
State = Tensor | tuple[Tensor, ...]


class Layout:
    """How a state lies in a real matrix (rows, n): a real tensor of two dimensions as it is, all else in one row.

    Attributes:
        shapes: of the tensors.
        single: whether the state is a tensor and no tuple.
        dtype: of all tensors together, real or complex.
        real: the matrix's dtype.
        device: the matrix's device.
        matrix: its shape.
    """

    def __init__(self, state: State, broadcasts: bool = False) -> None:
        """`broadcasts` says whether derivatives may broadcast to the shape of a tensor state."""
        self._broadcasts = broadcasts
        self.single = isinstance(state, Tensor)
        tensors = (state,) if isinstance(state, Tensor) else state
        self.shapes = tuple(tensor.shape for tensor in tensors)
        self.dtype = tensors[0].dtype
        for tensor in tensors[1:]:
            self.dtype = torch.promote_types(self.dtype, tensor.dtype)
        self.real, self.device = self.dtype.to_real(), tensors[0].device
        self.sizes = [shape.numel() for shape in self.shapes]
        self.starts = [sum(self.sizes[:i]) for i in range(len(self.sizes))]
        self._whole = self.shapes[0]
        as_is = self.single and len(self._whole) == 2 and self.dtype is self.real
        width = sum(self.sizes) * (2 if self.dtype.is_complex else 1)
        self.matrix = tuple(self._whole) if as_is else (1, width)

    def pack(self, state: Any) -> Tensor:
        """The matrix of a state or of a derivative.

        Raises:
            RuntimeError: a tensor of another shape.
        """
        if not self.single:
            return self.join([tensor.reshape(-1) for tensor in state])
        if state.shape != self._whole:
            if not self._broadcasts:
                raise RuntimeError(f"func returned shape {tuple(state.shape)}, expected y0's, {tuple(self._whole)}.")
            state = state.expand(self._whole)
        if state.dtype is self.real:
            matrix: Tensor = state.reshape(self.matrix)
            return matrix
        return self.join([state.reshape(-1)])

    def join(self, parts: list[Tensor]) -> Tensor:
        """The matrix of flat parts."""
        flat = (torch.cat(parts) if len(parts) > 1 else parts[0]).to(self.dtype)
        return (torch.view_as_real(flat) if flat.is_complex() else flat).reshape(self.matrix)

    def elements(self, matrices: Tensor) -> Tensor:
        """The entries of matrices (..., rows, n), complex where the state is."""
        if not self.dtype.is_complex:
            return matrices
        return torch.view_as_complex(matrices.reshape(*matrices.shape[:-1], -1, 2))

    def unpack(self, matrix: Tensor) -> State:
        """The state of a matrix (rows, n)."""
        if self.dtype is self.real and self.single:
            return matrix.view(self._whole)
        return self.split(self.elements(matrix).flatten())

    def split(self, elements: Tensor) -> State:
        """The state of `elements` (..., entries); dimensions in front are kept, as those of output times."""
        lead = elements.shape[:-1]
        if self.single:
            return elements.reshape(lead + self._whole)
        return tuple(
            elements.narrow(-1, start, size).reshape(lead + shape)
            for start, size, shape in zip(self.starts, self.sizes, self.shapes)
        )


class ErrorNorm:
    """How large an error is in units of the tolerance atol + rtol |y|.

    The norm is the root mean square; over a tuple the largest one of its tensors; or one that the caller gave.
    """

    def __init__(
        self, layout: Layout, rtol: Any, atol: Any, norm: Norm | None = None, controlled: int | None = None
    ) -> None:
        """`rtol` and `atol` are numbers or matrices (rows, entries); only the first `controlled` tensors count."""
        self.layout, self.rtol, self.atol, self.norm, self._controlled = layout, rtol, atol, norm, controlled
        roots = [1 / math.sqrt(max(size, 1)) for size in layout.sizes[:controlled]]
        self._roots = torch.tensor(roots, dtype=layout.real, device=layout.device)

    def size(self, matrix: Tensor) -> Tensor:
        """Magnitudes of a matrix's entries."""
        return self.layout.elements(matrix).abs()

    def ratio(self, error: Tensor, size: Tensor) -> float:
        """Of a matrix `error` at magnitudes `size`; one synchronisation."""
        scaled = self.layout.elements(error) / (size * self.rtol + self.atol)
        if self.norm is not None:
            return _number(self.norm(self.layout.split(scaled.flatten())))
        if self.layout.single:
            return _number(torch.linalg.vector_norm(scaled)) / math.sqrt(max(scaled.numel(), 1))
        norms = [torch.linalg.vector_norm(part) for part in scaled[0].split(self.layout.sizes)[: self._controlled]]
        return _number((torch.stack(norms) * self._roots).max())


def _number(value: Any) -> float:
    if not isinstance(value, Tensor):
        return abs(float(value))
    value = plain(value).abs()
    return float(value.max() if value.ndim else value)
