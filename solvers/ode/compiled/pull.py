"""Cotangents pulled back through one accepted step, in operations on tensors alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..method import Rhs
from .attempt import Chunk, Plan


class Pulled(NamedTuple):
    """Cotangents on the way from the end of a solve to its start.

    Attributes:
        left: how many steps of this chunk are to come.
        t: of a shift of all times so far, float64 of shape ().
        h: of the length of the last step, likewise.
        y: of the state (batch, n).
        carry: of what is handed over with it.
        shared: of the tensors that all steps share, as far as they are used.
    """

    left: Tensor
    t: Tensor
    h: Tensor
    y: Tensor
    carry: tuple[Tensor, ...]
    shared: tuple[Tensor, ...]

    def flat(self) -> list[Tensor]:
        """All tensors."""
        return [*self[:4], *self.carry, *self.shared]

    @staticmethod
    def of(tensors: Sequence[Tensor], plan: Plan, shared: int) -> Pulled:
        """The inverse of `flat`."""
        middle = 4 + plan.carries
        return Pulled(*tensors[:4], tuple(tensors[4:middle]), tuple(tensors[middle : middle + shared]))  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class Pullback:
    """What the backward loop of one compiled solve does.

    Attributes:
        plan: that of the forward loop.
        rhs: the right-hand side, on tensors some of which are `shared`.
        shared: those whose cotangents are wanted and that a step uses.
        timed: whether those of the times are wanted.
    """

    plan: Plan
    rhs: Rhs
    shared: tuple[Tensor, ...]
    timed: bool

    def step(self, after: Pulled, chunk: Chunk, dense_bars: Tensor, last: Tensor) -> Pulled:
        """The cotangents before a step from those after it.

        Args:
            after: the latter.
            chunk: with the step in row `after.left - 1`.
            dense_bars: cotangents (slots + 1, p + 1, batch, n) of dense outputs, the last ones zero.
            last: whether the last step of the chunk is that of the solve.
        """
        plan, row = self.plan, (after.left - 1).unsqueeze(0)
        t, h, slot, y, *carry = (x.index_select(0, row).squeeze(0) for x in [*chunk[:4], *chunk.carry])
        with torch.enable_grad():
            y = y.detach().requires_grad_()
            carry = [part.detach().requires_grad_() for part in carry]
            times = [t.detach().requires_grad_(), h.detach().requires_grad_()] if self.timed else [t, h]
            step, dense = plan.step(self.rhs, times[0], y, times[1], tuple(carry))
            pairs = list(zip((step.y, *step.carry), (after.y, *after.carry)))
            if dense is not None:
                index = torch.where(slot < 0, len(dense_bars) - 1, slot).unsqueeze(0)
                pairs.append((dense, dense_bars.index_select(0, index).squeeze(0)))
            pairs = [(x, bar) for x, bar in pairs if x.requires_grad]
            wanted = [y, *carry, *(times if self.timed else []), *self.shared]
            found = torch.autograd.grad(
                [x for x, _ in pairs], wanted, [bar for _, bar in pairs], allow_unused=True, materialize_grads=True
            )
        y_bar, rest = found[0], list(found[1:])
        carry_bars, rest = rest[: plan.carries], rest[plan.carries :]
        t_bar, h_bar = after.t, after.h
        if self.timed:
            final = last & (after.left == len(chunk.t) - 1) if last.dtype == torch.bool else after.left == last
            t_bar, h_bar = t_bar + rest[0], torch.where(final, rest[1], h_bar)
            rest = rest[2:]
        return Pulled(
            left=after.left - 1,
            t=t_bar,
            h=h_bar,
            y=y_bar,
            carry=tuple(carry_bars),
            shared=tuple(total + bar for total, bar in zip(after.shared, rest)),
        )
