"""How much, and how smoothly, the derivatives change around a point."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..fixed_point.problem import Problem
from ..tree import norms
from .recording import Recording, sign_vectors
from .singular import extreme_singular_values

BISECTIONS = 16
NORM_STEPS = 8


@dataclasses.dataclass(frozen=True)
class Change:
    """The largest changes that were seen, all (batch,); infinite where something was not finite.

    Attributes:
        jacobian: |A(z') - A(z)|, the spectral norm.
        sources: of the derivatives by everything but the state, relative, along random directions.
        loss: |v(z') - v(z)|, v the gradient of the loss by the state.
        jump: of A^T w, w random signs, relative to |A^T w|, over the smallest part of the ball in which it
            changes most, and 0 where that is what a smooth function would show.
    """

    jacobian: Tensor
    sources: Tensor
    loss: Tensor
    jump: Tensor

    def join(self, other: Change) -> Change:
        """The larger of each."""
        return Change(*[torch.maximum(getattr(self, f.name), getattr(other, f.name)) for f in dataclasses.fields(self)])


@dataclasses.dataclass(frozen=True)
class Centre:
    """The point around which is probed.

    Attributes:
        problem: with the function.
        z: (batch, n).
        here: the function recorded at z.
        shared: the leaves that the function closes over.
        slope: z -> the gradient of the loss by the state (batch, n).
    """

    problem: Problem
    z: Tensor
    here: Recording
    shared: list[Tensor]
    slope: Callable[[Tensor], Tensor]

    def change(self, offset: Tensor, generator: torch.Generator | None) -> Change:
        """What differs between z and z + offset, and whether it differs by a jump on the way from z - offset."""
        w = sign_vectors(self.z, generator)
        ahead, before = Recording.at(self.problem, self.z + offset), Recording.at(self.problem, self.z - offset)
        found = self._jump(offset, w, before, ahead)
        for there, place in ((ahead, self.z + offset), (before, self.z - offset)):
            loss = norms(self.slope(place) - self.slope(self.z))
            found = found.join(Change(self._norm(there, generator), self._sources(there, generator), loss, found.jump))
        parts = [getattr(found, f.name) for f in dataclasses.fields(found)]
        return Change(*[part.nan_to_num(nan=math.inf, posinf=math.inf) for part in parts])

    def _norm(self, there: Recording, generator: torch.Generator | None) -> Tensor:
        a, b = self.here.operator, there.operator
        start = sign_vectors(self.z, generator)
        return extreme_singular_values(
            lambda v: b.matvec(v) - a.matvec(v), lambda v: b.rmatvec(v) - a.rmatvec(v), start, NORM_STEPS
        )[1]

    def _sources(self, there: Recording, generator: torch.Generator | None) -> Tensor:
        # Along random changes of args, and of what is shared: forwards, since only so the samples stay apart.
        found = torch.zeros_like(norms(self.z))
        for here, new in ((self.here.inputs, there.inputs), (self.shared, self.shared)):
            tangents = [sign_vectors(t, generator).to(t.dtype) for t in here]
            before, after = self.here.response(here, tangents), there.response(new, tangents)
            change = norms(after - before)
            found = torch.maximum(found, torch.where(change == 0, 0.0, change / norms(before)))
        return found

    def _jump(self, offset: Tensor, w: Tensor, before: Recording, ahead: Recording) -> Change:
        """Bisect towards the fastest change of A^T w: of a smooth function it vanishes with the interval."""

        def product(t: Tensor) -> Tensor:
            place = torch.addcmul(self.z, offset, t.unsqueeze(1).to(offset.dtype))
            return Recording.at(self.problem, place).operator.rmatvec(w)

        middle = self.here.operator.rmatvec(w)
        low, high = before.operator.rmatvec(w), ahead.operator.rmatvec(w)
        size = torch.stack([norms(low), norms(middle), norms(high)]).amax(dim=0)
        zero = torch.zeros_like(size)
        start, end = zero - 1, zero + 1
        centre = zero
        total = torch.maximum(norms(middle - low), norms(high - middle))
        for step in range(BISECTIONS):
            upper = norms(high - middle) > norms(middle - low)
            column = upper.unsqueeze(1)
            start, end = torch.where(upper, centre, start), torch.where(upper, end, centre)
            low, high = torch.where(column, middle, low), torch.where(column, high, middle)
            if step < BISECTIONS - 1:
                centre = (start + end) / 2
                middle = product(centre)
        last = norms(high - low)
        eps = torch.finfo(self.z.dtype).eps
        # Half of the orders of magnitude that a smooth change would lose, and more than rounding.
        sudden = (last > total * 2 ** (-BISECTIONS / 2)) & (last > math.sqrt(eps) * size)
        broken = ~torch.isfinite(total) | ~torch.isfinite(last)
        jump = torch.where(sudden, last / size.clamp_min(torch.finfo(size.dtype).tiny), 0.0)
        return Change(zero, zero, zero, torch.where(broken, math.inf, jump))
