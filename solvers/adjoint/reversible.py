"""The two-state reversible iteration of reversible equilibrium models."""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.utils import checkpoint

from ..fixed_point.driver import Carry, advance, settle, start
from ..fixed_point.method import Evaluated, FixedPointSolver, Proposal
from ..fixed_point.picard import NoMemory, Picard
from ..fixed_point.problem import Problem
from ..solution import AdjointWarning
from ..transforms import inside_transform
from ..tree import norms
from .base import Adjoint, Task, Witness, healthy_rows, refuse_batched, wants_derivatives, warn_of_start
from .shared import ReversibleAdjoint


@dataclasses.dataclass(frozen=True)
class TwoState(FixedPointSolver):
    """u_{k+1} = (1 - damping) u_{k-1} + damping f(u_k), the two-state iteration as a two-term recurrence.

    With y and x for the odd and the even terms it reads y' = (1 - b) y + b f(x), x' = (1 - b) x + b f(y').
    """

    damping: float

    def init(self, z: Tensor) -> Previous:
        """u_{-1} = u_0."""
        return Previous(z)

    def propose(self, problem: Problem, at: Evaluated, memory: Any) -> Proposal:
        """The next term."""
        z = torch.add(memory.z * (1 - self.damping), at.image, alpha=self.damping)
        return Proposal(z, Previous(at.z))


@dataclasses.dataclass(frozen=True)
class Previous:
    """The term before the current one (rows, n)."""

    z: Tensor

    def select(self, rows: Tensor) -> Previous:
        """That of some rows."""
        return Previous(self.z.index_select(0, rows))


class ReversibleSteps(Adjoint):
    """`ReversibleAdjoint` for a rest point.

    The recurrence itself is linear in its terms, so autograd keeps nothing for it. What it would keep inside `f` is
    dropped by torch's checkpoint and recomputed in the backward pass from the term that `_Walk` reconstructs.
    """

    def __init__(self, knobs: ReversibleAdjoint) -> None:
        self.knobs = knobs

    @staticmethod
    def default_solver() -> FixedPointSolver:
        """What to take where no solver is named."""
        return Picard(damping=0.5)

    def solve(self, task: Task) -> Carry:
        """Iterate with a graph whose activations are reconstructed."""
        if not isinstance(task.solver, Picard) or not task.solver.damping < 1:
            raise ValueError(
                "ReversibleAdjoint brings its own iteration, which takes solver=Picard(damping=b) with b below 1; "
                f"got {task.solver!r}."
            )
        task = dataclasses.replace(task, solver=TwoState(task.solver.damping), memory=None)
        if not wants_derivatives():
            return _unlabelled(task.run())
        if inside_transform():
            raise RuntimeError(
                "ReversibleAdjoint reconstructs states inside the backward pass, which torch.func cannot see through; "
                "choose ImplicitAdjoint() or UnrollAdjoint() under its transforms."
            )
        carry = self._recorded(task)
        warn_of_start(carry, "ReversibleAdjoint")
        rows = healthy_rows(task.problem, carry)
        if rows is not None:
            some = self._recorded(task.rows(rows))
            carry = dataclasses.replace(carry, value=rows.merge(carry.value.detach(), some.value))
        return _unlabelled(carry)

    def _recorded(self, task: Task) -> Carry:
        walk = _Walk(task.problem, task.solver.damping, task.z0.detach(), self.knobs.drift)  # type: ignore[attr-defined]
        knowledge = {field.name: getattr(task.problem, field.name) for field in dataclasses.fields(task.problem)}
        problem = _Replayed(**knowledge, walk=walk)
        carry = start(task.z0, task.solver.init(task.z0), task.trajectory)
        while carry.count < task.budget.max_steps and carry.running():
            before = carry.z.detach()
            carry = advance(problem, task.solver, task.budget, carry)
            if carry.running():
                walk.record(before, carry.z.detach(), carry.active)
        walk.witness.arm()
        return settle(carry)


def _unlabelled(carry: Carry) -> Carry:
    return dataclasses.replace(carry, memory=NoMemory())


@dataclasses.dataclass(frozen=True)
class _Replayed(Problem):
    """A problem whose evaluations keep no activations."""

    walk: _Walk = dataclasses.field(kw_only=True)

    def evaluate(self, z: Tensor, room: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As `Problem.evaluate`, recorded without activations."""
        entry = _Entry(self.walk, len(self.walk.moved), z, z.requires_grad)
        # Recomputing to the very end yields the image, which the reconstruction needs anyway.
        with checkpoint.set_checkpoint_early_stop(False):
            image: Tensor = checkpoint.checkpoint(
                _evaluate, self.walk.problem, entry, use_reentrant=False, determinism_check="default"
            )
        entry.z = None
        if image.requires_grad:
            index, walk = entry.index, self.walk
            if index == 0:
                walk.witness.see(image)
            image.register_hook(lambda grad: walk.weigh(index, grad))
        return image, image - z


@dataclasses.dataclass
class _Entry:
    """The input of evaluation `index`: itself in the forward pass, its reconstruction in the backward pass."""

    walk: _Walk
    index: int
    z: Tensor | None
    recorded: bool


def _evaluate(problem: Problem, entry: _Entry) -> Tensor:
    if entry.z is not None:
        return problem.evaluate(entry.z)[0]
    entry.walk.witness.check()
    z = entry.walk.at(entry.index).requires_grad_(entry.recorded)
    image, _ = problem.evaluate(z)
    entry.walk.offer(entry.index, image.detach())
    return image


class _Walk:
    """Goes from the last terms of the recurrence back to the first.

    Attributes:
        moved: per step, the rows that took it; None for all.
        image: the index and f of the term that was recomputed last, to be used for the step back from it.
    """

    def __init__(self, problem: Problem, damping: float, z0: Tensor, drift: float | None) -> None:
        self.problem, self.damping, self.z0 = problem, damping, z0
        self.drift = torch.finfo(z0.dtype).eps ** 0.5 if drift is None else drift
        self.witness = Witness(problem)
        self.moved: list[Tensor | None] = []
        self.last, self.last_previous = z0, z0
        self.index, self.z, self.previous = -1, z0, z0
        self.image: tuple[int, Tensor] | None = None
        self.heaviest, self.weight = torch.zeros_like(z0[:, 0]), torch.zeros_like(z0[:, 0])

    def weigh(self, index: int, grad: Tensor | None) -> None:
        """Note the size of the gradient that arrives at evaluation `index`; None for one that is zero."""
        if torch.is_grad_enabled():
            raise RuntimeError(
                "A backward pass through ReversibleAdjoint was asked to build a graph (create_graph=True), but it has "
                "first derivatives only; choose ImplicitAdjoint(order=2) or UnrollAdjoint()."
            )
        refuse_batched(grad, "ReversibleAdjoint")
        size = torch.zeros_like(self.weight) if grad is None else norms(grad)
        self.heaviest = size if index >= len(self.moved) - 1 else torch.maximum(self.heaviest, size)
        self.weight = size

    def record(self, before: Tensor, after: Tensor, moved: Tensor | None) -> None:
        """Note a step of the forward pass: a row that rests keeps the term before its last."""
        if moved is not None:
            before = torch.where(moved.unsqueeze(1), before, self.last_previous)
        self.last, self.last_previous = after, before
        self.moved.append(moved)

    def offer(self, index: int, image: Tensor) -> None:
        """Leave f of term `index`."""
        self.image = (index, image)

    def at(self, index: int) -> Tensor:
        """Term `index`, reconstructed. The walk itself stands one term further: the pair holds both."""
        if self.index <= index:
            # The first request of a backward pass: begin at the end.
            self.index, self.z, self.previous, self.image = len(self.moved), self.last, self.last_previous, None
        with torch.no_grad():
            while self.index > index + 1:
                self._back()
        term = self.z if self.index == index else self._before()
        if index == 0:
            self._check(term)
        return term.detach().clone()

    def _before(self) -> Tensor:
        """u_{k-1} from (u_k, u_{k-1}): a row that did not take step k - 1 had u_k already."""
        moved = self.moved[self.index - 1]
        return self.previous if moved is None else torch.where(moved.unsqueeze(1), self.previous, self.z)

    def _back(self) -> None:
        """From (u_k, u_{k-1}) to (u_{k-1}, u_{k-2}), for the rows that took step k - 1."""
        term, moved = self._before(), self.moved[self.index - 1]
        known = self.image is not None and self.image[0] == self.index - 1
        image = self.image[1] if known else self.problem.evaluate(term)[0]  # type: ignore[index]
        earlier = (self.z - self.damping * image) / (1 - self.damping)
        if moved is not None:
            earlier = torch.where(moved.unsqueeze(1), earlier, self.previous)
        self.z, self.previous, self.image = term, earlier, None
        self.index -= 1

    def _check(self, first: Tensor) -> None:
        # What is reconstructed worst, the earliest terms, is also what the gradient of a contraction feels least.
        share = self.weight / self.heaviest.clamp_min(torch.finfo(self.weight.dtype).tiny)
        error = share * norms(first - self.z0) / norms(self.z0).clamp_min(1.0)
        # What has overflowed on the way back is not within any bound.
        error = error.nan_to_num(nan=math.inf)
        if bool((error > self.drift).any()):
            worst = int(error.argmax())
            warnings.warn(
                f"ReversibleAdjoint: the reconstruction of sample {worst} has drifted by {float(error[worst]):.3g}, "
                "weighed by the gradient there, and the gradient is no more exact than that. Each step "
                f"back amplifies rounding by 1 / (1 - damping) = {1 / (1 - self.damping):.3g}: lower the damping of "
                "Picard, take fewer steps, or compute in float64.",
                AdjointWarning,
                stacklevel=2,
            )
