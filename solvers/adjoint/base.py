"""How a rest point becomes differentiable: what an adjoint is given and what it returns."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from ..fixed_point.driver import Budget, Carry, independent, iterate, start
from ..fixed_point.method import FixedPointSolver
from ..fixed_point.problem import Problem
from ..solution import AdjointWarning, Stats, Status, warn_caller
from ..transforms import all_true, any_true, derivative_levels, inside_vmap, no_derivatives, plain, recording_tangents
from ..tree import norms


@dataclasses.dataclass(frozen=True)
class Task:
    """A fixed-point problem with all that its solve needs.

    Attributes:
        problem: the function, its args and its spec.
        z0: initial iterate (batch, n).
        solver: the method; None where the caller left the choice to the adjoint.
        budget: tolerances and steps.
        memory: a method's memory to start from, of an earlier solution, or None.
        trajectory: keep every iterate.
        report: takes the statistics of the backward solve.
    """

    problem: Problem
    z0: Tensor
    solver: FixedPointSolver
    budget: Budget
    memory: object
    trajectory: bool
    report: Callable[[Stats], None]

    def run(self, compact: bool = True) -> Carry:
        """The solve itself, recorded by autograd or not, as the caller's grad mode says."""
        return iterate(self.problem, self.solver, self.budget, self.start(), compact)

    def start(self) -> Carry:
        """The carry before the first evaluation, with a memory that may be written to."""
        memory = self.solver.init(self.z0) if self.memory is None else self.solver.resume(self.memory)
        return start(self.z0, memory, self.trajectory)

    def rows(self, rows: Rows) -> Task:
        """The task of some rows."""
        memory = None if self.memory is None else self.memory.select(rows.index)  # type: ignore[attr-defined]
        return dataclasses.replace(
            self, problem=rows.of(self.problem), z0=self.z0.index_select(0, rows.index), memory=memory
        )


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows to record where some broke: the broken ones taken out, or a healthy one standing in for each.

    Attributes:
        index: the rows (k,).
        broken: mask of those that another stands in for (batch,); None where they are taken out, as needs args that
            all have the batch in front.
        leaves: which of the args' leaves have rows; None for all of them.
    """

    index: Tensor
    broken: Tensor | None = None
    leaves: frozenset[int] | None = None

    def of(self, problem: Problem) -> Problem:
        """The problem of these rows."""
        return problem.select(self.index, self.leaves)

    def merge(self, z: Tensor, value: Tensor) -> Tensor:
        """z (batch, n) with the values of these rows."""
        if self.broken is None:
            return z.index_copy(0, self.index, value)
        return torch.where(self.broken.unsqueeze(1), z, value)

    def spread(self, stats: Stats, batch: int) -> Stats:
        """Statistics of these rows as those of the whole batch; the others took no part and are NON_FINITE."""

        def full(part: Tensor, missing: float) -> Tensor:
            if self.broken is not None:
                return torch.where(self.broken, missing, part).to(part.dtype)
            return part.new_full((batch,), missing).index_copy(0, self.index, part)

        return Stats(
            full(stats.steps, 0),
            full(stats.evaluations, 0),
            full(stats.residual, float("nan")),
            full(stats.status, int(Status.NON_FINITE)),
        )


class Adjoint(abc.ABC):
    """A way to differentiate a fixed point. Subclasses hold knobs only."""

    @abc.abstractmethod
    def solve(self, task: Task) -> Carry:
        """Solve and return the finished carry, whose `value` carries derivatives."""


class RestPointAdjoint(Adjoint):
    """An adjoint that needs only where the rest point is, not how it was found."""

    def solve(self, task: Task) -> Carry:
        """Solve without recording, then attach derivatives to the rest point."""
        with no_derivatives():
            carry = task.run(compact=not self.needs_memory)
        z = carry.value.detach()
        if not wants_derivatives():
            return dataclasses.replace(carry, value=z)
        rows = healthy_rows(task.problem, carry)
        if rows is None:
            value = self.attach(task.problem, z, carry, task.report)
            broken = carry.status == int(Status.NON_FINITE)
            if any_true(broken):
                # Whatever was recorded for them, their value is the one that the solve left them with.
                value = torch.where(broken.unsqueeze(1), z, value)
            return dataclasses.replace(carry, value=value)

        def report(stats: Stats) -> None:
            task.report(rows.spread(stats, len(z)))

        some = dataclasses.replace(carry, memory=carry.memory.select(rows.index))
        value = self.attach(rows.of(task.problem), z.index_select(0, rows.index), some, report)
        return dataclasses.replace(carry, value=rows.merge(z, value))

    @property
    def needs_memory(self) -> bool:
        """Whether `attach` uses the method's memory of all rows, for which they have to stay together."""
        return False

    @abc.abstractmethod
    def attach(self, problem: Problem, z: Tensor, carry: Carry, report: Callable[[Stats], None]) -> Tensor:
        """z (batch, n), a constant, with derivatives."""


def healthy_rows(problem: Problem, carry: Carry) -> Rows | None:
    """The rows to record where some broke, since a NaN would reach shared parameters; None for all as they are."""
    batch = len(carry.status)
    if inside_vmap():
        return None
    broken = plain(carry.status) == int(Status.NON_FINITE)
    index = (~broken).nonzero().flatten()
    if not 0 < len(index) < batch:
        return None
    with no_derivatives():
        z = carry.value.detach()
        image, _ = problem.evaluate(z)
        if problem.divisible(batch) and independent(problem.select(index), z, image, index):
            return Rows(index)
        # What the args share cannot be divided, and what a function closes over not even be seen.
        stand_ins = torch.where(broken, index[0], torch.arange(batch, device=broken.device))
        parts = enumerate(pytree.tree_leaves(problem.args))
        long = [i for i, part in parts if isinstance(part, Tensor) and part.ndim > 0 and len(part) == batch]
        rows = Rows(stand_ins, broken, frozenset(long))
        if not _stands_in(rows, problem, z, image):
            # A weight may be as long as the batch by chance.
            each = {i: Rows(stand_ins, broken, frozenset([i])) for i in long}
            own = [i for i in long if _stands_in(each[i], problem, z, image)]
            rows = Rows(stand_ins, broken, frozenset(own))
        return rows if _stands_in(rows, problem, z, image, finite=True) else None


def _stands_in(rows: Rows, problem: Problem, z: Tensor, image: Tensor, finite: bool = False) -> bool:
    """Whether the function does to the rows that are not broken what it did before, and perhaps is finite in all."""
    assert rows.broken is not None
    among, _ = rows.of(problem).evaluate(z.index_select(0, rows.index))
    rounding = torch.finfo(z.dtype).eps ** 0.5
    sound = rows.broken | (norms(among - image) <= rounding * norms(image).clamp_min(rounding))
    return all_true(sound & torch.isfinite(norms(among)) if finite else sound)


class Witness:
    """Notices a tensor that was changed in place before the backward pass computes with it again.

    Autograd watches over the tensors that it has saved; what recomputes has saved none. Watched are the args, what the
    function closes over, and the leaves that its derivative reaches. What the function itself changes is its own.
    """

    def __init__(self, problem: Problem) -> None:
        # Later than this module, which trajectories import for the adjoints that they share with rest points.
        from ..ode.externals import clock, constants

        held = [*pytree.tree_leaves(problem.args), *constants(problem.function)]
        self._versions: dict[int, tuple[Tensor, int]] = {}
        self._watch(held)
        self._clock = clock()
        self._armed = False

    def _watch(self, things: Iterable[object]) -> None:
        for thing in things:
            # A tensor of inference mode has no version, and cannot be changed outside of it.
            if isinstance(thing, Tensor) and not thing.is_inference():
                self._versions.setdefault(id(thing), (thing, thing._version))

    def see(self, recorded: Tensor) -> None:
        """Watch the leaves that a recording reaches, too, in the forward pass."""
        from ..ode.externals import leaves_since

        if not self._armed:
            self._watch(leaves_since(recorded, self._clock))

    def arm(self) -> None:
        """From now on nothing may change: the forward pass is over."""
        self._versions = {key: (t, version) for key, (t, version) in self._versions.items() if t._version == version}
        self._armed = True

    def check(self) -> None:
        """Raise RuntimeError if one was."""
        if self._armed and any(tensor._version != version for tensor, version in self._versions.values()):
            raise RuntimeError(
                "one of the args, or a tensor that the function closes over, or a parameter was changed in place "
                "between the forward pass and the backward pass, which computes with it again: the gradient would be "
                "wrong."
            )


def refuse_batched(grad: Tensor | None, name: str) -> None:
    """Raise RuntimeError where autograd hands several gradients at once to a backward pass that looks at each."""
    if grad is not None and _functorch.is_legacy_batchedtensor(grad):
        raise RuntimeError(
            f"A backward pass through {name} was asked for several gradients at once (is_grads_batched=True, or "
            "vectorize=True of torch.autograd.functional), of which it cannot see each by itself; ask for one after "
            "another, or take torch.func.jacrev, jacfwd or hessian with ImplicitAdjoint()."
        )


def warn_of_start(carry: Carry, name: str) -> None:
    """Warn where a sample had converged before the first step: the gradient of no step is zero."""
    if not (torch.is_grad_enabled() or recording_tangents()):
        return
    at_once = (plain(carry.steps) == 0) & (plain(carry.status) == int(Status.CONVERGED))
    if any_true(at_once):
        warn_caller(
            f"{name}: {int(at_once.sum())} of {at_once.numel()} samples had converged at the initial value, so that no "
            "step was recorded and their gradient is zero, but towards the initial value. Lower rtol, start elsewhere, "
            "or choose ImplicitAdjoint().",
            AdjointWarning,
        )


def wants_derivatives() -> bool:
    """Whether anything is being recorded: a graph, or tangents."""
    return torch.is_grad_enabled() or forward_level() or derivative_levels() > 0


def forward_level() -> bool:
    """Whether a forward-mode level is open outside of torch.func."""
    return forward_ad._current_level >= 0
