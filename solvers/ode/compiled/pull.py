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
        last: which number of `left` is that of the solve's last step; 0 if it lies in another chunk.
        t: of a shift of all times so far, float64 of shape ().
        h: of the length of the last step, likewise.
        y: of the state (batch, n).
        carry: of what is handed over with it.
        shared: of the tensors that all steps share, as far as they are used.
    """

    left: Tensor
    last: Tensor
    t: Tensor
    h: Tensor
    y: Tensor
    carry: tuple[Tensor, ...]
    shared: tuple[Tensor, ...]

    def flat(self) -> list[Tensor]:
        """In few tensors: counts, times, state, carry and the shared ones."""
        states = [part.contiguous() for part in (self.y, *self.carry, *self.shared)]
        return [torch.stack(self[:2]), torch.stack(self[2:4]), *states]

    @staticmethod
    def of(tensors: Sequence[Tensor], plan: Plan, shared: int) -> Pulled:
        """The inverse of `flat`."""
        middle = 3 + plan.carries
        rest = tuple(tensors[3:middle]), tuple(tensors[middle : middle + shared])
        return Pulled._make((*tensors[0].unbind(), *tensors[1].unbind(), tensors[2], *rest))


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

    def step(self, after: Pulled, chunk: Chunk, dense_bars: Sequence[Tensor]) -> Pulled:
        """The cotangents before a step from those after it.

        Args:
            after: the latter; if no steps are left, what comes out means nothing.
            chunk: with the step in row `after.left - 1`.
            dense_bars: cotangents (slots + 1, p + 1, batch, n) of dense outputs, the last ones zero; if there are any.
        """
        plan, row = self.plan, (after.left - 1).clamp(min=0).unsqueeze(0)
        entry, y, *carry = (x.index_select(0, row).squeeze(0) for x in [chunk.log, chunk.y, *chunk.carry])
        t, h, slot = entry.unbind()
        with torch.enable_grad():
            y = y.detach().requires_grad_()
            carry = [part.detach().requires_grad_() for part in carry]
            times = [t.detach().requires_grad_(), h.detach().requires_grad_()] if self.timed else [t, h]
            step, dense = plan.step(self.rhs, times[0], y, times[1], tuple(carry))
            pairs = list(zip((step.y, *step.carry), (after.y, *after.carry)))
            if dense is not None:
                index = torch.where(slot < 0, len(dense_bars[0]) - 1, slot.long()).unsqueeze(0)
                pairs.append((dense, dense_bars[0].index_select(0, index).squeeze(0)))
            pairs = [(x, bar) for x, bar in pairs if x.requires_grad]
            wanted = [y, *carry, *(times if self.timed else []), *self.shared]
            found = torch.autograd.grad(
                [x for x, _ in pairs], wanted, [bar for _, bar in pairs], allow_unused=True, materialize_grads=True
            )
        y_bar, rest = found[0], found[1:]
        carry_bars, rest = rest[: plan.carries], rest[plan.carries :]
        t_bar, h_bar = after.t, after.h
        if self.timed:
            t_bar, h_bar = t_bar + rest[0], torch.where(after.left == after.last, rest[1], h_bar)
            rest = rest[2:]
        return Pulled(
            left=after.left - 1,
            last=after.last,
            t=t_bar,
            h=h_bar,
            # What merely passes through must not be the same tensor.
            y=y_bar.clone(),
            carry=tuple(bar.clone() for bar in carry_bars),
            shared=tuple(total + bar for total, bar in zip(after.shared, rest)),
        )

    def flat(self) -> tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, ...]]]:
        """The condition and the body of the loop as functions of flat tensors.

        These are the cotangents, then those of dense outputs if there are any, and the chunk.
        """
        width, dense = 3 + self.plan.carries + len(self.shared), self.plan.slots > 0

        def condition(*tensors: Tensor) -> Tensor:
            return tensors[0][0] > 0

        def body(*tensors: Tensor) -> tuple[Tensor, ...]:
            after = Pulled.of(tensors, self.plan, len(self.shared))
            chunk = Chunk.of(tensors[width + dense :], self.plan)
            return tuple(self.step(after, chunk, tensors[width : width + dense]).flat())

        return condition, body


def used(rhs: Rhs, t: Tensor, y: Tensor, shared: Sequence[Tensor]) -> list[bool]:
    """Which of `shared` the field's derivative reaches."""
    with torch.enable_grad():
        out = rhs(t.detach(), y.detach().requires_grad_())
        if not (shared and out.requires_grad):
            return [False] * len(shared)
        found = torch.autograd.grad(out.sum(), list(shared), allow_unused=True)
    return [bar is not None for bar in found]
