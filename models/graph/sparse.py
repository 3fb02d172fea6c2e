"""Sparse matrices whose entries are learnt: products, and a softmax along the rows."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Pattern:
    """Which entries of a matrix there are, in the order of its rows and within them of its columns.

    Attributes:
        row, column: of each entry.
        shape: rows and columns of the matrix.
    """

    row: Int[Tensor, " entries"]
    column: Int[Tensor, " entries"]
    shape: tuple[int, int]

    @staticmethod
    def of(row: Tensor, column: Tensor, shape: tuple[int, int]) -> Pattern:
        """The pattern of these entries in any order; an entry given twice counts once.

        Args:
            row, column: of each entry, integers (given,).
            shape: of the matrix.

        Raises:
            ValueError: the indices are no integers, of different lengths, or beyond the shape.
        """
        for name, index, size in (("row", row, shape[0]), ("column", column, shape[1])):
            if index.ndim != 1 or index.dtype.is_floating_point or index.dtype == torch.bool:
                raise ValueError(f"{name}: expected one list of integers; got {tuple(index.shape)} of {index.dtype}.")
            outside = ((index < 0) | (index >= size)).nonzero().flatten()
            if len(outside):
                first = int(outside[0])
                raise ValueError(f"{name}: entry {first} is {int(index[first])}; there are {size}, 0 to {size - 1}.")
        if len(row) != len(column):
            raise ValueError(f"row and column must be equally long; got {len(row)} and {len(column)}.")
        place = torch.unique(row.long() * shape[1] + column.long(), sorted=True)
        return Pattern(place // shape[1], place % shape[1], shape)

    def __len__(self) -> int:
        return len(self.row)

    @functools.cached_property
    def starts(self) -> Int[Tensor, " bounds"]:
        """Where each row's entries begin, and after the last row where all end."""
        return _starts(self.row, self.shape[0])

    @functools.cached_property
    def transposed(self) -> tuple[Pattern, Int[Tensor, " entries"]]:
        """The transposed pattern, and the place in this one of each of its entries."""
        order = torch.argsort(self.column * self.shape[0] + self.row)
        return Pattern(self.column[order], self.row[order], self.shape[::-1]), order

    def to(self, device: torch.device | str) -> Pattern:
        """On this device."""
        return Pattern(self.row.to(device), self.column.to(device), self.shape)

    def matmul(self, values: Tensor, x: Tensor) -> Float[Tensor, "rows width"]:
        """The product of the matrix with these entries and x, differentiable in both, to any order.

        Args:
            values: (entries,).
            x: (columns, width).

        Raises:
            ValueError: the entries or the rows of x are too few or too many.
        """
        if values.shape != self.row.shape:
            raise ValueError(f"expected {len(self)} values, one an entry; got {tuple(values.shape)}.")
        if x.ndim != 2 or len(x) != self.shape[1]:
            raise ValueError(f"expected a matrix of {self.shape[1]} rows; got {tuple(x.shape)}.")
        return _Product.apply(values, x, self)

    def sum_rows(self, values: Float[Tensor, "entries *rest"]) -> Float[Tensor, "rows *rest"]:
        """Of values at the entries, the sum along every row."""
        return values.new_zeros(self.shape[0], *values.shape[1:]).index_add(0, self.row, values)

    def softmax(self, scores: Float[Tensor, "entries heads"]) -> Float[Tensor, "entries heads"]:
        """Positive values whose sum along every row that has an entry is one, head by head."""
        index = self.row.unsqueeze(1).expand_as(scores)
        largest = scores.new_full((self.shape[0], scores.shape[1]), -torch.inf)
        largest = largest.scatter_reduce(0, index, scores.detach(), "amax")
        powers = (scores - largest[self.row]).exp()
        return powers / self.sum_rows(powers)[self.row]


class _Product(torch.autograd.Function):
    """A sparse matrix times a dense one; both its derivatives are made of products again."""

    @staticmethod
    def forward(values: Tensor, x: Tensor, pattern: Pattern) -> Tensor:
        return _matrix(values, pattern) @ x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        values, x, ctx.pattern = inputs
        ctx.save_for_backward(values, x)
        ctx.save_for_forward(values, x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        values, x = ctx.saved_tensors
        pattern: Pattern = ctx.pattern
        of_values = of_x = None
        if ctx.needs_input_grad[0]:
            of_values = _Sampled.apply(gradient, x, pattern)
        if ctx.needs_input_grad[1]:
            back, order = pattern.transposed
            of_x = _Product.apply(values[order], gradient, back)
        return of_values, of_x, None

    @staticmethod
    def jvp(ctx: Any, values_t: Tensor | None, x_t: Tensor | None, _: None) -> Tensor | None:
        values, x = ctx.saved_tensors
        parts = [] if values_t is None else [_Product.apply(values_t, x, ctx.pattern)]
        parts += [] if x_t is None else [_Product.apply(values, x_t, ctx.pattern)]
        return sum(parts) if parts else None


class _Sampled(torch.autograd.Function):
    """The entries that a pattern has of the product of one dense matrix and another's transpose."""

    @staticmethod
    def forward(left: Tensor, right: Tensor, pattern: Pattern) -> Tensor:
        zeros = _matrix(left.new_zeros(len(pattern)), pattern)
        return torch.sparse.sampled_addmm(zeros, left, right.T, beta=0.0).values()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        left, right, ctx.pattern = inputs
        ctx.save_for_backward(left, right)
        ctx.save_for_forward(left, right)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        left, right = ctx.saved_tensors
        back, order = ctx.pattern.transposed
        of_left = _Product.apply(gradient, right, ctx.pattern) if ctx.needs_input_grad[0] else None
        of_right = _Product.apply(gradient[order], left, back) if ctx.needs_input_grad[1] else None
        return of_left, of_right, None

    @staticmethod
    def jvp(ctx: Any, left_t: Tensor | None, right_t: Tensor | None, _: None) -> Tensor | None:
        left, right = ctx.saved_tensors
        parts = [] if left_t is None else [_Sampled.apply(left_t, right, ctx.pattern)]
        parts += [] if right_t is None else [_Sampled.apply(left, right_t, ctx.pattern)]
        return sum(parts) if parts else None


def _matrix(values: Tensor, pattern: Pattern) -> Tensor:
    _announce()
    return torch.sparse_csr_tensor(pattern.starts, pattern.column, values, pattern.shape, check_invariants=False)


def _starts(row: Tensor, rows: int) -> Tensor:
    counts = torch.bincount(row, minlength=rows)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


@functools.cache
def _announce() -> None:
    """Let torch say, where nobody is bothered, that its sparse tensors are young; it says so once a process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        index = torch.zeros(1, dtype=torch.int64)
        torch.sparse_csr_tensor(torch.tensor([0, 1]), index, torch.ones(1), (1, 1), check_invariants=False)
