"""Derivatives of the method's own steps: recorded, or recomputed between checkpoints."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils import checkpoint

from ..fixed_point.driver import Carry, advance, settle
from ..options import options
from ..transforms import inside_reverse, no_derivatives
from .base import Adjoint, Task, Witness, healthy_rows, wants_derivatives, warn_of_start
from .shared import CheckpointAdjoint


@options
class UnrollAdjoint(Adjoint):
    """Exact derivatives of the iterates as they are, converged or not, recorded by autograd.

    The reference that the others are measured against, and the only one with a gradient towards the initial value.
    Memory grows with the number of steps: `CheckpointAdjoint` has the same gradient for less. A sample that has
    converged at the initial value takes no step, and its gradient towards anything else is zero; a warning says so.

    Source: Maclaurin, Duvenaud and Adams 2015, section 2; Domke 2012.
    """

    def solve(self, task: Task) -> Carry:
        """Run with the graph being recorded."""
        if not wants_derivatives():
            return task.run()
        return _taped(task, lambda part: part.run(compact=False), "UnrollAdjoint")


class CheckpointedSteps(Adjoint):
    """`CheckpointAdjoint` for a rest point."""

    def __init__(self, knobs: CheckpointAdjoint) -> None:
        self.knobs = knobs

    def solve(self, task: Task) -> Carry:
        """Run once to learn the number of steps, then again in checkpointed segments."""
        if not wants_derivatives():
            return task.run()
        if inside_reverse():
            raise RuntimeError(
                "CheckpointAdjoint keeps its states by saved-tensor hooks, which torch.func does not support; choose "
                "ImplicitAdjoint() or UnrollAdjoint() under its grad, vjp and jacrev."
            )
        return _taped(task, self._segments, "CheckpointAdjoint")

    def _segments(self, task: Task) -> Carry:
        with no_derivatives():
            count = task.run(compact=False).count
        carry, witness = task.start(), Witness(task.problem)
        if self.knobs.recursive:
            carry = _halve(task, carry, count, witness)
        else:
            segments = min(self.knobs.segments or math.isqrt(count - 1) + 1, count)
            for i in range(segments):
                carry = _replayed(_steps, task, carry, count * (i + 1) // segments, witness)
        witness.arm()
        return settle(carry)


def _taped(task: Task, run: Callable[[Task], Carry], name: str) -> Carry:
    carry = run(task)
    warn_of_start(carry, name)
    rows = healthy_rows(task.problem, carry)
    if rows is None:
        return carry
    # The recording of a broken row would carry its NaN into shared parameters: record the others alone.
    some = run(task.rows(rows))
    return dataclasses.replace(carry, value=rows.merge(carry.value.detach(), some.value))


def _steps(task: Task, carry: Carry, end: int, witness: Witness) -> Carry:
    while carry.count < end and carry.running():
        first = carry.count == 0
        carry = advance(task.problem, task.solver, task.budget, carry)
        if first:
            witness.see(carry.z)
    return carry


def _halve(task: Task, carry: Carry, end: int, witness: Witness) -> Carry:
    """Both halves are checkpointed, and inside each again both halves: log2(steps) states are alive at a time."""
    if end - carry.count <= 1 or not carry.running():
        return _steps(task, carry, end, witness)
    middle = (carry.count + end) // 2
    carry = _replayed(_halve, task, carry, middle, witness)
    return _replayed(_halve, task, carry, end, witness)


def _replayed(
    run: Callable[[Task, Carry, int, Witness], Carry], task: Task, carry: Carry, end: int, witness: Witness
) -> Carry:
    """run(task, carry, end, witness), recomputed in the backward pass.

    The carry's tensors are handed over one by one: whatever else a checkpoint is given it holds until the end, also
    inside another checkpoint, which is there to drop it.
    """
    tensors: list[Tensor] = []
    form = _dissolve(carry, tensors)

    def resume(*given: Tensor) -> Carry:
        witness.check()
        return run(task, _assemble(form, given), end, witness)

    replayed: Carry = checkpoint.checkpoint(resume, *tensors, use_reentrant=False, determinism_check="default")
    return replayed


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a tensor was."""

    index: int


@dataclasses.dataclass(frozen=True)
class _Parts:
    """What an object with rows, such as a carry or a method's memory, consisted of."""

    kind: type
    attributes: dict[str, Any]


def _dissolve(whole: Any, tensors: list[Tensor]) -> Any:
    """`whole` without its tensors, which are appended to `tensors`."""
    if isinstance(whole, Tensor):
        tensors.append(whole)
        return _Place(len(tensors) - 1)
    if isinstance(whole, tuple):
        return tuple(_dissolve(part, tensors) for part in whole)
    if hasattr(whole, "select") and hasattr(whole, "__dict__"):
        return _Parts(type(whole), {name: _dissolve(part, tensors) for name, part in vars(whole).items()})
    return whole


def _assemble(form: Any, tensors: tuple[Tensor, ...]) -> Any:
    """What `_dissolve` made `form` of, with other tensors."""
    if isinstance(form, _Place):
        return tensors[form.index]
    if isinstance(form, tuple):
        return tuple(_assemble(part, tensors) for part in form)
    if isinstance(form, _Parts):
        whole: Any = object.__new__(form.kind)
        vars(whole).update({name: _assemble(part, tensors) for name, part in form.attributes.items()})
        return whole
    return form
