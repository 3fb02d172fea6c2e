"""A short memory of rows, and the small matrices of their inner products."""

from __future__ import annotations

import torch
from torch import Tensor

from ..transforms import inside_transform, recording_tangents


class Ring:
    """The last `capacity` matrices (rows, n); a new one takes the slot of the oldest.

    Where nothing records what happens, they lie in one buffer (capacity, rows, n) that is written in place, and
    inner products and combinations are batched matrix products, which need no temporaries. Under autograd's tape
    and torch.func they are a tuple, and every operation makes new tensors. Either way `put` returns the ring to use
    from then on, and the old one is not to be used any more.

    Args:
        capacity: how many to keep.
    """

    def __init__(self, capacity: int, buffer: Tensor | None = None, rows: tuple[Tensor, ...] = (), count: int = 0):
        self.capacity, self.buffer, self.rows, self.count = capacity, buffer, rows, count

    def __len__(self) -> int:
        return min(self.count, self.capacity)

    @property
    def slot(self) -> int:
        """Where the next one goes."""
        return self.count % self.capacity

    def room(self, like: Tensor) -> Tensor | None:
        """The slot where the next one goes, to be written and then `put`; None where there is no such place yet."""
        # An operation that writes where it is told to has no forward-mode derivative.
        if self.buffer is None or self.buffer.dtype != like.dtype or not _in_place(like) or recording_tangents():
            return None
        return self.buffer[self.slot]

    def put(self, row: Tensor) -> Ring:
        """The ring with `row` (rows, n) in place of the oldest."""
        if self.rows or not _in_place(row):
            # A buffer comes from an earlier solution, and this solve is recorded.
            rows = self.rows if self.buffer is None else self.buffer[: len(self)].unbind()
            rows = (*rows[: self.slot], row, *rows[self.slot + 1 :])
            return Ring(self.capacity, None, rows, self.count + 1)
        buffer = row.new_empty(self.capacity, *row.shape) if self.buffer is None else self.buffer
        place = buffer[self.slot]
        if place.data_ptr() != row.data_ptr():
            place.copy_(row)
        return Ring(self.capacity, buffer, (), self.count + 1)

    def dots(self, v: Tensor) -> Tensor:
        """Inner products with `v` (rows, n) by slot: (rows, len), in float32 or better."""
        if self.buffer is not None:
            return torch.bmm(v.unsqueeze(1), self.buffer[: len(self)].permute(1, 2, 0)).squeeze(1)
        return torch.stack([dot(row, v) for row in self.rows], dim=1)

    def combine(self, weights: Tensor) -> Tensor:
        """The sum over slots of weights (rows, len) times what lies there: (rows, n)."""
        if self.buffer is not None:
            vectors = self.buffer[: len(self)].transpose(0, 1)
            return torch.bmm(weights.to(self.buffer.dtype).unsqueeze(1), vectors).squeeze(1)
        columns = weights.to(self.rows[0].dtype).split(1, dim=1)
        total = self.rows[0] * columns[0]
        for row, column in zip(self.rows[1:], columns[1:], strict=True):
            total = torch.addcmul(total, row, column)
        return total

    def select(self, rows: Tensor) -> Ring:
        """The ring of some rows."""
        buffer = None if self.buffer is None else self.buffer.index_select(1, rows)
        return Ring(self.capacity, buffer, tuple(row.index_select(0, rows) for row in self.rows), self.count)

    def detach(self) -> Ring:
        """The same as a constant."""
        return Ring(self.capacity, self.buffer, tuple(row.detach() for row in self.rows), self.count)

    def salvage(self) -> Ring:
        """A copy with zeros for what is not finite."""
        buffer = None if self.buffer is None else self.buffer[: len(self)].nan_to_num(0.0, 0.0, 0.0)
        if buffer is not None and len(self) < self.capacity:
            buffer = torch.cat([buffer, buffer.new_zeros(self.capacity - len(self), *buffer.shape[1:])])
        rows = tuple(row.nan_to_num(0.0, 0.0, 0.0) for row in self.rows)
        return Ring(self.capacity, buffer, rows, self.count)

    def to(self, dtype: torch.dtype) -> Ring:
        """The same in another type."""
        buffer = None if self.buffer is None else self.buffer.to(dtype)
        return Ring(self.capacity, buffer, tuple(row.to(dtype) for row in self.rows), self.count)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of rows (rows,), in float32 or better."""
    if a.dtype in (torch.float16, torch.bfloat16):
        a, b = a.float(), b.float()
    return torch.linalg.vecdot(a, b)


def bordered(matrix: Tensor | None, slot: int, row: Tensor, column: Tensor) -> Tensor:
    """`matrix` (rows, h, h) by slot, with row and column `slot` replaced, and enlarged by one where `slot` is new.

    Args:
        matrix: None stands for an empty one.
        slot: index of the new row and column, at most h.
        row: (rows, h') with h' the new size.
        column: the same; row and column agree at `slot`.
    """
    size = row.shape[1]
    if matrix is None:
        return row.unsqueeze(2)
    if matrix.shape[1] < size:
        upper = torch.cat([matrix, column[:, :-1].unsqueeze(2)], dim=2)
        return torch.cat([upper, row.unsqueeze(1)], dim=1)
    if _in_place(row):
        matrix = matrix.clone()
        matrix[:, slot, :] = row
        matrix[:, :, slot] = column
        return matrix
    here = torch.zeros(size, dtype=torch.bool, device=row.device)
    here[slot] = True
    matrix = torch.where(here.unsqueeze(0), column.unsqueeze(2), matrix)
    return torch.where(here.unsqueeze(1), row.unsqueeze(1), matrix)


def _in_place(row: Tensor) -> bool:
    exact = row.dtype in (torch.float32, torch.float64)
    return exact and not torch.is_grad_enabled() and not inside_transform()
