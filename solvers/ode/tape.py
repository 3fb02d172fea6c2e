"""Recorded evaluations of the field, and what their cotangents add up to."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from .externals import Externals, clock
from .method import Rhs, Time

_ENGINE = torch.autograd.Variable._execution_engine

# An evaluation: the derivative, recorded from the leaf of the state and that of the time (None: not wanted).
Record = tuple[Tensor, Tensor, Tensor | None]


@dataclasses.dataclass
class Sums:
    """Accumulated cotangents of what every step shares.

    Attributes:
        inputs: the tensors, args first and then what the field closes over.
        externals: knows and checks what the field closes over.
        totals: the cotangents so far; None where nothing has arrived.
        evaluations: of the field, so far.
    """

    inputs: list[Tensor]
    externals: Externals
    totals: list[Tensor | None] = dataclasses.field(default_factory=list)
    evaluations: int = 0

    def __post_init__(self) -> None:
        """Nothing has arrived yet."""
        self.totals = [None] * len(self.inputs)

    def add(self, cotangents: Sequence[Tensor | None]) -> None:
        """Add what one stage or segment contributes."""
        totals = self.totals
        if len(totals) == 1 and totals[0] is not None and cotangents[0] is not None:
            totals[0].add_(cotangents[0])
            return
        sums, news = [], []
        for i, new in enumerate(cotangents):
            if new is None:
                continue
            total = totals[i]
            if total is None:
                # A copy: autograd may hand out one tensor twice, or a view of the cotangent it was given.
                totals[i] = new.clone()
            else:
                sums.append(total)
                news.append(new)
        if sums:
            torch._foreach_add_(sums, news)


class Tape:
    """Recorded evaluations of the field, each from leaves of its own."""

    def __init__(self, rhs: Rhs, sums: Sums, timed: bool) -> None:
        self.rhs, self.sums, self.timed = rhs, sums, timed
        self._began = clock()

    def evaluate(self, t: Time, y: Tensor) -> Record:
        """The derivative at (t, y), recorded from leaves; to be called with grad mode on."""
        leaf = y.detach().requires_grad_()
        time = self.rhs.time(t).detach()
        if self.timed:
            time.requires_grad_()
        out = self.rhs(time, leaf)
        if out is leaf:
            out = leaf.clone()
        self.sums.evaluations += 1
        if out.requires_grad:
            # A field that differentiates with respect to time makes it a leaf by itself.
            own = (leaf, time) if time.requires_grad else (leaf,)
            self.sums.externals.check(out, own, self._began, lambda: f"At t = {t}")
        return out, leaf, time if self.timed else None

    def pull(self, record: Record, cotangent: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Cotangents of the state and of the time; those of everything shared are added up."""
        out, leaf, time = record
        if not out.requires_grad:
            return None, None
        sums = self.sums
        if time is None:
            first, *rest = vector_jacobian((out,), (leaf, *sums.inputs), (cotangent,), sums.externals.retain)
            sums.add(rest)
            return first, None
        first, second, *rest = vector_jacobian((out,), (leaf, time, *sums.inputs), (cotangent,), sums.externals.retain)
        sums.add(rest)
        return first, second


def vector_jacobian(
    outs: tuple[Tensor, ...], inputs: tuple[Tensor, ...], cotangents: tuple[Tensor, ...], retain: bool
) -> tuple[Tensor | None, ...]:
    """`torch.autograd.grad` without its checks, which cost several times as much as a small field's derivative."""
    pulled: tuple[Tensor | None, ...] = _ENGINE.run_backward(outs, cotangents, retain, False, inputs, True, False)
    return pulled


# The evaluations of a step by stage, the first one None where it belongs to the step before, others where nobody needs
# them; and the derivative at the start.
Recorded = tuple[list[Record | None], Tensor]


class Recorder(Rhs):
    """The right-hand side, recording its evaluations while it is `active`.

    Attributes:
        records: of the evaluations since the list was last emptied.
        active: whether to record.
    """

    __slots__ = ("_first", "active", "records", "tape")

    def __init__(self, tape: Tape, first: Record | None = None) -> None:
        """`first` is what the first call would record, if it is there already."""
        super().__init__(tape.rhs.field, tape.rhs.args, tape.rhs.spec, tape.rhs.batch)
        self._autocast = tape.rhs._autocast
        self.tape, self.active, self._first = tape, True, first
        self.records: list[Record] = []

    def stand_in(self, rows: Tensor | None, own: frozenset[int]) -> None:
        """As `Rhs.stand_in`."""
        super().stand_in(rows, own)
        if hasattr(self, "tape"):
            self.tape.rhs.stand_in(rows, own)

    def __call__(self, t: Time, y: Tensor) -> Tensor:
        """The derivative, without derivatives of its own."""
        if not self.active:
            return super().__call__(t, y)
        self.calls += 1
        if self._first is not None:
            record, self._first = self._first, None
            self.records.append(record)
            return record[0].detach()
        before = torch.is_grad_enabled()
        torch.set_grad_enabled(True)
        try:
            record = self.tape.evaluate(t, y)
        finally:
            torch.set_grad_enabled(before)
        self.records.append(record)
        return record[0].detach()
