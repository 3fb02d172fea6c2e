"""What a driver is given and what it returns."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..transforms import plain
from .control import Controller
from .events import Event, Hit
from .lined_up import LinedUp
from .mesh import Mesh
from .method import Carry, Method, Rhs, Time
from .times import Times


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """How large an error is: components relative to atol + rtol |y|, root mean square over what is controlled.

    Attributes:
        rtol: relative part.
        atol: absolute part.
        columns: the matrix's columns that take part in step control; None for all.
        resolution: of the state's type, the error of rounding in units of |y|: where the tolerance is finer, it is NaN,
            so that no step is accepted, however short. 0 where that cannot be, or is not to be looked for.
    """

    rtol: float
    atol: float
    columns: Tensor | None = None
    resolution: float = 0.0

    def scale(self, y: Tensor) -> Tensor:
        """atol + rtol |y|, what errors are compared with at `y` (batch, n)."""
        scale = y.abs().mul_(self.rtol).add_(self.atol)
        return torch.where(scale < self.resolution * y.abs(), math.nan, scale) if self.resolution else scale

    def spent(self, y: Tensor) -> Tensor:
        """Which samples (batch,) are where the tolerance is as fine as two roundings, beyond which no step leads."""
        size = y.abs() if self.columns is None else y.abs().index_select(-1, self.columns)
        return (size * self.rtol + self.atol < 2 * self.resolution * size).any(-1)

    def scaled(self, error: Tensor, scale: Tensor) -> Tensor:
        """`error` (batch, n) in units of the tolerance, controlled columns only."""
        ratio = error / scale
        return ratio if self.columns is None else ratio.index_select(-1, self.columns)

    def batch_ratio(self, error: Tensor, scale: Tensor, alive: Tensor | None = None) -> float:
        """Root mean square over all samples that are `alive`; under vmap the worst example's. One synchronisation."""
        norm, count = self._norm(error, scale, alive)
        return float(norm.max() if norm.ndim else norm) / math.sqrt(count)

    def batch_ratio_beside(
        self, error: Tensor, scale: Tensor, alive: Tensor | None, beside: Tensor
    ) -> tuple[float, float]:
        """The same, and the largest of `beside` (batch,) over these samples, in one synchronisation."""
        norm, count = self._norm(error, scale, alive)
        beside = beside if alive is None else torch.where(alive, beside, 0.0)
        total, largest = torch.stack((norm.max() if norm.ndim else norm, plain(beside).max())).tolist()
        return total / math.sqrt(count), largest

    def _norm(self, error: Tensor, scale: Tensor, alive: Tensor | None) -> tuple[Tensor, int]:
        scaled = self.scaled(error, scale)
        count = scaled.numel()
        if alive is not None:
            scaled = torch.where(alive.unsqueeze(-1), scaled, 0.0)
            count = int(alive.sum()) * scaled.shape[-1]
        return plain(torch.linalg.vector_norm(scaled)), max(count, 1)

    def sample_ratio(self, error: Tensor, scale: Tensor) -> Tensor:
        """Root mean square of each sample (batch,), float64."""
        scaled = self.scaled(error, scale)
        return torch.linalg.vector_norm(scaled, dim=-1).double() / math.sqrt(max(scaled.shape[-1], 1))

    def component(self, error: Tensor, scale: Tensor) -> Tensor:
        """The column (batch,) in which each sample's error is largest; one that is not finite is larger than any."""
        scaled = self.scaled(error, scale).abs().nan_to_num(nan=math.inf)
        worst = scaled.argmax(-1)
        return worst if self.columns is None else self.columns[worst]


@dataclasses.dataclass(frozen=True)
class Problem:
    """One call of `solve_ode`, flattened.

    Attributes:
        rhs: the field on matrices.
        y0: initial matrix (batch, n).
        times: where the solution is asked for.
        method: the integrator.
        controller: of its steps.
        tolerance: how errors are measured.
        max_steps: a budget of accepted and rejected steps together, per sample.
        dense: whether every step's dense output is kept.
        events: to watch.
        observe: called with start, length and dense output of every accepted step; with steps per sample the length
            is zero for those that accepted none.
        first_step: length of the first step, which goes before the controller's; a float, or (batch,).
    """

    rhs: Rhs
    y0: Tensor
    times: Times
    method: Method
    controller: Controller
    tolerance: Tolerance
    max_steps: int
    dense: bool = False
    events: tuple[Event, ...] = ()
    observe: Callable[[Time, Time, Tensor], None] | None = None
    first_step: Time | None = None

    def __post_init__(self) -> None:
        """Let the method know the tolerance."""
        object.__setattr__(self, "method", self.method.tuned(self.tolerance.rtol, self.tolerance.atol))

    @property
    def per_sample(self) -> bool:
        """Whether every sample takes its own steps."""
        return self.controller.per_sample or self.times.per_sample

    @property
    def adaptive(self) -> bool:
        """Whether steps are rejected."""
        return self.controller.adaptive


@dataclasses.dataclass
class Run:
    """What a driver found; all of it without derivatives.

    Attributes:
        y: the final matrix (batch, n), garbage in rows that did not reach the end.
        mesh: the accepted steps.
        dense: its picks (picks, p + 1, batch, n), or None where there are none.
        places: which pick each inner output time lies in, (T - 2,), or (T - 2, batch) with steps per sample.
        reached: (batch,) how far each sample came, float64.
        status: (batch,) `Status` values.
        accepted, rejected, evaluations: (batch,) counts.
        ratio: (batch,) the last error in units of the tolerance.
        step: (batch,) the last step tried.
        wish: (batch,) the step that the controller would take next.
        component: (batch,) the column in which the last error was largest.
        hits: the events that happened.
    """

    y: Tensor
    mesh: Mesh
    dense: Tensor | None
    places: Tensor
    reached: Tensor
    status: Tensor
    accepted: Tensor
    rejected: Tensor
    evaluations: Tensor
    ratio: Tensor
    step: Tensor
    wish: Tensor
    component: Tensor
    hits: list[Hit]


class Keeper:
    """Keeps states of a solve whose number of steps is not known beforehand, evenly spread.

    It keeps every `stride`-th state and doubles the stride, dropping every other one, when there are too many.

    Attributes:
        kept: (index of the step that starts here, y, carry), in order.
    """

    def __init__(self, segments: int | None) -> None:
        """With `segments` None as many states are kept as steps lie between two of them, up to a factor of two."""
        self._segments, self._stride = segments, 1
        self.kept: list[tuple[int, Tensor, Carry]] = []

    def renew(self) -> None:
        """To be called before the carry is made anew."""

    def attempt(self) -> None:
        """To be called before a step is tried."""

    def offer(self, index: int, y: Tensor, carry: Carry, breaks: bool = False) -> None:
        """To be called for every accepted step, in order, with the state and carry that the one before left behind.

        `breaks` says that the step starts from something else: a carry made anew, or a state some rows of which are
        replaced.
        """
        if index % self._stride:
            return
        self.kept.append((index, y, carry))
        if len(self.kept) > (self._segments or 2 * self._stride):
            self._stride *= 2
            self.kept = [entry for entry in self.kept if entry[0] % self._stride == 0]

    def close(self, y: Tensor, carry: Carry) -> None:
        """To be called with what the last step left behind."""

    def line_up(self, lined: LinedUp) -> None:
        """Number the kept states as the steps are lined up."""
        self.kept = [(index, y, carry) for index, (_, y, carry) in zip(lined.firsts, self.kept)]
