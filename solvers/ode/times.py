"""The times at which a solution is asked for, checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from ..transforms import plain


class TimeError(ValueError, TypeError):
    """Times that no solve can run along; the message says what and where."""


@dataclasses.dataclass(frozen=True)
class Times:
    """Output times, strictly monotone.

    Attributes:
        given: as the user gave them, with their derivatives: (T,), or (batch, T).
        values: their values in float64, (T,) or (batch, T), without derivatives.
        listed: the same as Python floats for times that the batch shares, else None.
    """

    given: Tensor
    values: Tensor
    listed: list[float] | None

    @property
    def per_sample(self) -> bool:
        """Whether every sample has its own times."""
        return self.listed is None

    @property
    def count(self) -> int:
        """T."""
        return self.values.shape[-1]


def read_times(t: object, batch: int, device: torch.device) -> Times:
    """Check `t`, a tensor (T,) or (batch, T) or a sequence of numbers such as (t0, t1).

    Raises:
        TimeError: fewer than two times; not a floating-point tensor; the wrong shape or device; a time that is not
            finite; times that are equal or not monotone. The message names the first such place.
    """
    if not isinstance(t, Tensor):
        if not isinstance(t, Sequence) or not all(isinstance(x, (int, float)) for x in t):
            raise TimeError(f"t: expected a tensor of times or a sequence of numbers such as (t0, t1), got {t!r}.")
        t = torch.tensor([float(x) for x in t], dtype=torch.float64, device=device)
    if not t.dtype.is_floating_point:
        raise TimeError(f"t: expected a floating-point dtype, got {t.dtype}.")
    if t.device != device:
        raise TimeError(f"t: expected device {device} as the initial value's, got {t.device}.")
    if t.ndim not in (1, 2) or (t.ndim == 2 and t.shape[0] != batch) or t.shape[-1] < 2:
        raise TimeError(f"t: expected shape (T,) or (batch, T) = ({batch}, T) with T >= 2, got {tuple(t.shape)}.")
    raw = plain(t.detach())
    if raw.shape != t.shape:
        raise TimeError("t: times that vmap maps over are not supported; give them as one tensor (batch, T).")
    values = raw.double()
    _check_values(values.reshape(-1, values.shape[-1]).cpu(), values.ndim == 2)
    if values.ndim == 1:
        return Times(t, values, values.tolist())
    return Times(t, values, None)


def _check_values(rows: Tensor, per_sample: bool) -> None:
    """Finite and strictly monotone, row by row."""

    def place(row: int, column: int) -> str:
        return f"t[{row}, {column}]" if per_sample else f"t[{column}]"

    bad = (~rows.isfinite()).nonzero()
    if len(bad):
        row, column = bad[0].tolist()
        raise TimeError(f"t: every time must be finite; {place(row, column)} is {rows[row, column].item()}.")
    steps = rows.diff(dim=1)
    bad = (steps * steps[:, :1].sign() <= 0).nonzero()
    if len(bad):
        row, column = bad[0].tolist()
        left, right = rows[row, column].item(), rows[row, column + 1].item()
        what = "are equal" if left == right else "turn back"
        raise TimeError(
            f"t: times must be strictly increasing or strictly decreasing; {place(row, column)} = {left:.9g} and "
            f"{place(row, column + 1)} = {right:.9g} {what}."
        )
