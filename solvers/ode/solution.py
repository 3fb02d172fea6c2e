"""What `solve_ode` returns."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import torch
from torch import Tensor

from ..solution import Solution, Status
from ..tree import Leaf, StateSpec
from .events import EventInfo
from .interpolation import Interpolation

T = TypeVar("T")

# So many samples are named one by one in a message.
_NAMED = 8


@dataclasses.dataclass
class ODESolution(Solution[T]):
    """A trajectory.

    `value` is the state at the output times, which are stacked in front: (T, batch, ...) per tensor. It is NaN from
    where a sample broke or ran out of steps, and stays what it is after a terminal event. `stats.residual` is the
    last estimated error in units of the tolerance.

    Attributes:
        ts: the output times, (T,) or (batch, T).
        reached: how far each sample came (batch,), float64.
        event: what happened on the way, where events were given.
        interpolation: the solution at any time, where it was asked for with `dense=True`.
    """

    ts: Tensor = dataclasses.field(kw_only=True)
    reached: Tensor = dataclasses.field(kw_only=True)
    event: EventInfo[T] | None = dataclasses.field(kw_only=True, default=None)
    interpolation: Interpolation | None = dataclasses.field(kw_only=True, default=None, repr=False)
    _trouble: Trouble = dataclasses.field(kw_only=True, repr=False)

    def report(self) -> str:
        """How far the failed samples came, and what stopped the one that came least far."""
        status = self.stats.status
        failed = (~self.converged).nonzero().flatten()
        if len(failed) == 0:
            return f"all {len(status)} samples reached the end"
        start, end = self.ts[..., 0].double(), self.ts[..., -1].double()
        done = ((self.reached - start) / (end - start)).detach()
        worst = int(failed[done[failed].argmin()])
        kind = Status(int(status[worst]))
        came = ", ".join(f"{int(i)}: {float(self.reached[i]):.6g}" for i in failed[:_NAMED])
        rest = self.reached[failed[_NAMED:]].tolist()
        more = f", and {len(rest)} more between {min(rest):.6g} and {max(rest):.6g}" if rest else ""
        return (
            f"{len(failed)} of {len(status)} samples did not reach the end. Sample {worst} {kind.meaning} at "
            f"t = {float(self.reached[worst]):.9g} with a step of {float(self._trouble.step[worst]):.3g}"
            f"{self._where(worst, kind)}, after {int(self.stats.steps[worst])} steps. They reached "
            f"t = {{{came}{more}}}. To change: {kind.advice}."
        )

    def _where(self, sample: int, kind: Status) -> str:
        if kind not in (Status.NON_FINITE, Status.STEP_UNDERFLOW):
            return ""
        return f", in {component_name(self._trouble.spec, int(self._trouble.component[sample]))}"


@dataclasses.dataclass(frozen=True)
class Trouble:
    """What stopped each sample.

    Attributes:
        spec: how the state lies in its matrix.
        step: the last step tried (batch,).
        component: the column in which its error was largest (batch,).
    """

    spec: StateSpec
    step: Tensor
    component: Tensor


def component_name(spec: StateSpec, column: int) -> str:
    """Which number of a sample's state the matrix's `column` is, such as `y['position'][2]`."""
    for leaf in spec.leaves:
        if column < leaf.size:
            return f"y{leaf.path}{_index(leaf, column)}"
        column -= leaf.size
    raise IndexError(column)


def _index(leaf: Leaf, column: int) -> str:
    if leaf.dtype.is_complex:
        column //= 2
    place = torch.unravel_index(torch.tensor(column), leaf.shape) if leaf.shape else ()
    return f"[{', '.join(str(int(i)) for i in place)}]" if leaf.shape else ""
