"""The loop that drives every fixed-point method: stopping, freezing, compaction, statistics."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..solution import Stats, Status
from ..transforms import all_true, any_true, inside_transform
from ..tree import norms, scaled_norms
from .method import Evaluated, FixedPointSolver
from .problem import Problem

PATIENCE = 60
"""Evaluations without a new smallest residual after which a row counts as stagnated."""

PROGRESS = 0.999
"""A residual counts as a new smallest one below this multiple of the last; it absorbs rounding."""

CROWDED = 0.75
"""Finished rows are taken out of the batch once at most this share of its rows is still running."""


@dataclasses.dataclass(frozen=True)
class Budget:
    """When to stop.

    A row has converged where |r| <= atol + rtol * scale: scale is |f(z)| for a fixed point, and
    max(|x|, |F(x0)|) for a root. With rtol = atol = 0 the loop runs exactly max_steps.
    """

    rtol: float
    atol: float
    max_steps: int

    @property
    def endless(self) -> bool:
        """Whether no residual can be small enough."""
        return self.rtol == 0 and self.atol == 0


@dataclasses.dataclass(frozen=True)
class Carry:
    """Everything that one evaluation hands to the next; never changed in place.

    Attributes:
        z: the iterates to be evaluated next (rows, n).
        memory: the method's.
        count: evaluations by the loop so far.
        extra: evaluations by the method so far.
        active: which rows are running (rows,); None while all are.
        best: the iterates with the smallest residual so far (rows, n), their residuals and scales (rows,).
        improved_at: the evaluation that found them: one for all rows, or (rows,).
        floor: |F(x0)| of a root problem (rows,).
        value, status, steps, evaluations, residual: the results of the rows that have ended.
        trajectory: iterates so far, where they were asked for.
        measured: the last evaluated iterates and their images, to check a compacted batch against.
    """

    z: Tensor
    memory: Any
    best: Tensor
    best_norm: Tensor
    best_scale: Tensor
    value: Tensor
    status: Tensor
    steps: Tensor
    evaluations: Tensor
    residual: Tensor
    count: int = 0
    extra: int = 0
    active: Tensor | None = None
    improved_at: int | Tensor = 0
    floor: Tensor | None = None
    trajectory: tuple[Tensor, ...] | None = None
    measured: tuple[Tensor, Tensor] | None = None

    def running(self) -> bool:
        """Whether any row is still running."""
        return self.active is None or any_true(self.active)

    def select(self, rows: Tensor) -> Carry:
        """The carry of some rows."""

        def take(t: Any) -> Any:
            return t.index_select(0, rows) if isinstance(t, Tensor) else t

        changes = {f.name: take(getattr(self, f.name)) for f in dataclasses.fields(self)}
        changes.update(memory=self.memory.select(rows), active=None, measured=None)
        return Carry(**changes)


def start(z: Tensor, memory: Any, trajectory: bool = False) -> Carry:
    """The carry before the first evaluation."""
    wide = torch.float32 if z.dtype in (torch.float16, torch.bfloat16) else z.dtype
    infinite = z.new_full((len(z),), float("inf"), dtype=wide)
    zeros = torch.zeros(len(z), dtype=torch.int64, device=z.device)
    return Carry(
        z, memory, z, infinite, torch.ones_like(infinite), z, zeros + Status.MAX_STEPS, zeros, zeros, infinite,
        trajectory=(z,) if trajectory else None,
    )  # fmt: skip


def advance(problem: Problem, solver: FixedPointSolver, budget: Budget, carry: Carry, measured: bool = False) -> Carry:
    """One evaluation, its bookkeeping, and the method's next iterate; `measured` keeps what was evaluated."""
    z = carry.z
    count, active, recording = carry.count + 1, carry.active, torch.is_grad_enabled()
    image, residual = problem.evaluate(z, solver.room(carry.memory, z))
    with torch.no_grad():
        norm, scale, floor = _measure(problem, z, image, residual, carry, norms)
        going, improved, moved = _judge(budget, carry, norm, scale)
        ordinary = going & improved
        if moved is not None:
            ordinary = (ordinary | ~carry.active) & ~moved  # type: ignore[operator]
        improving = all_true(ordinary)
        if improving:
            # Every running row got better: there is nothing to freeze, and the best iterates are these.
            changes: dict[str, Any] = {
                "best": z,
                "best_norm": norm,
                "best_scale": scale,
                "improved_at": count,
                "floor": floor,
            }
        else:
            changes = {}
            if _extreme(norm, scale, active):
                norm, scale, floor = _measure(problem, z, image, residual, carry, scaled_norms)
                going, improved, moved = _judge(budget, carry, norm, scale)
                # Any residual is small beside an infinite scale.
                going = going | torch.isinf(scale)
            # An infinite residual is above any limit, but leads nowhere, unless the step that led to it is shortened. A
            # tape would carry the NaN into the gradient.
            finite = torch.isfinite(norm)
            retried = None if recording else solver.retries(carry.memory)
            going = going & finite if retried is None else torch.where(finite, going, retried)
            if moved is not None and any_true(moved):
                carry = _thaw(carry, moved, solver)
                active, improved = carry.active, improved | moved
            carry = _keep_best(carry, z, norm, scale, improved, count, floor, recording)
            ended = ~going if active is None else active & ~going
            if any_true(ended) or _patience_ends(count):
                carry = _retire(carry, budget, z, norm, scale, going, recording)
                active = carry.active
    if active is not None and not any_true(active):
        return carry
    proposal = solver.propose(problem, Evaluated(z, image, residual, norm, improving), carry.memory)
    following = proposal.z if active is None else torch.where(active.unsqueeze(1), proposal.z, z)
    trajectory = None if carry.trajectory is None else (*carry.trajectory, following)
    return dataclasses.replace(
        carry, z=following, memory=proposal.memory, active=active, extra=carry.extra + proposal.evaluations,
        trajectory=trajectory, measured=(z, image) if measured else None, count=count, **changes,
    )  # fmt: skip


def _patience_ends(count: int) -> bool:
    """Whether to look for rows that stagnate: not at each evaluation, but at the same ones for every batch."""
    return count >= PATIENCE and count % 10 == 0


def _measure(
    problem: Problem, z: Tensor, image: Tensor, residual: Tensor, carry: Carry, length: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The residual's norm, the scale that it is relative to, and the floor of that scale; `length` measures rows."""
    norm = length(residual.detach())
    if not problem.root:
        return norm, length(image.detach()), None
    floor = norm if carry.floor is None else carry.floor
    return norm, torch.maximum(length(z.detach()), floor), floor


def _judge(budget: Budget, carry: Carry, norm: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Which rows are above their tolerance, which have a new smallest residual, and which have been moved.

    A row that had converged is moved where others have changed its rest point; None while all rows are running.
    """
    limit = scale * budget.rtol
    if budget.atol:
        limit = limit + budget.atol
    if budget.endless:
        # Without a tolerance the newest iterate is the wanted one, whatever its residual.
        going = improved = torch.isfinite(norm)
    else:
        going, improved = norm > limit, norm < carry.best_norm * PROGRESS
    if carry.active is None:
        return going, improved, None
    return going, improved, ~carry.active & (carry.status == int(Status.CONVERGED)) & (norm > 2 * limit)


def _extreme(norm: Tensor, scale: Tensor, active: Tensor | None) -> bool:
    """Whether the squares in a running row's norms overflow, or underflow so far that they say nothing."""
    limits = torch.finfo(norm.dtype)
    usual = (scale > limits.tiny**0.5 / limits.eps) & (torch.maximum(norm, scale) < limits.max**0.5)
    return not all_true(usual if active is None else usual | ~active)


def _thaw(carry: Carry, moved: Tensor, solver: FixedPointSolver) -> Carry:
    """Let rows that had converged run again, since others have moved their rest points: the function couples them."""
    assert carry.active is not None
    return dataclasses.replace(
        carry,
        active=carry.active | moved,
        status=torch.where(moved, int(Status.MAX_STEPS), carry.status),
        memory=solver.forget(carry.memory, moved),
    )


def _keep_best(
    carry: Carry, z: Tensor, norm: Tensor, scale: Tensor, improved: Tensor, count: int, floor: Tensor | None,
    recording: bool,
) -> Carry:  # fmt: skip
    """Keep the iterates with the smallest residual, row by row."""
    with torch.set_grad_enabled(recording):
        best = torch.where(improved.unsqueeze(1), z, carry.best)
    return dataclasses.replace(
        carry, count=count, floor=floor, best=best,
        best_norm=torch.where(improved, norm, carry.best_norm),
        best_scale=torch.where(improved, scale, carry.best_scale),
        improved_at=torch.where(improved, count, carry.improved_at),
    )  # fmt: skip


def _retire(
    carry: Carry, budget: Budget, z: Tensor, norm: Tensor, scale: Tensor, going: Tensor, recording: bool
) -> Carry:
    """End the rows that have converged, broken or stagnated."""
    active = torch.ones_like(going) if carry.active is None else carry.active
    broken = active & ~going & ~torch.isfinite(norm)
    done = active & ~going & ~broken
    stale = torch.zeros_like(active)
    if not budget.endless and _patience_ends(carry.count):
        stale = active & ~done & ~broken & (carry.count - carry.improved_at >= PATIENCE)
    ended = broken | done | stale
    status = torch.where(done, int(Status.CONVERGED), carry.status)
    status = torch.where(stale, int(Status.STAGNATED), status)
    status = torch.where(broken, int(Status.NON_FINITE), status)
    shown = torch.where(stale, relative(carry.best_norm, carry.best_scale), relative(norm, scale))
    with torch.set_grad_enabled(recording):
        # A converged row is returned where it was measured, any other at its best.
        final = torch.where(done.unsqueeze(1), z, carry.best)
        value = torch.where(ended.unsqueeze(1), final, carry.value)
    return dataclasses.replace(
        carry, value=value, status=status, active=active & ~ended,
        residual=torch.where(ended, shown, carry.residual),
        # The last evaluation measured the iterate and took no further step.
        steps=torch.where(ended, carry.count - 1, carry.steps),
        evaluations=torch.where(ended, carry.count + carry.extra, carry.evaluations),
    )  # fmt: skip


def relative(norm: Tensor, scale: Tensor) -> Tensor:
    """The residual relative to its scale; where the scale is zero, the residual itself."""
    return torch.where(scale > 0, norm / scale.clamp_min(torch.finfo(scale.dtype).tiny), norm)


def settle(carry: Carry) -> Carry:
    """Give the rows that are still running their result: the budget is used up.

    If a row's last evaluation was its best, the step that it led to is the result; otherwise the best iterate is.
    """
    active = torch.ones_like(carry.status, dtype=torch.bool) if carry.active is None else carry.active
    newest = active & (torch.as_tensor(carry.improved_at, device=active.device) == carry.count)
    newest = newest & torch.isfinite(norms(carry.z.detach()))
    final = torch.where(newest.unsqueeze(1), carry.z, carry.best)
    value = torch.where(active.unsqueeze(1), final, carry.value)
    with torch.no_grad():
        residual = torch.where(active, relative(carry.best_norm, carry.best_scale), carry.residual)
        steps = torch.where(active, carry.count, carry.steps)
        evaluations = torch.where(active, carry.count + carry.extra, carry.evaluations)
        # Only a loop that runs without a tolerance gets here with a residual of zero.
        status = torch.where(active & (residual == 0), int(Status.CONVERGED), carry.status)
    return dataclasses.replace(
        carry, value=value, residual=residual, steps=steps, evaluations=evaluations, status=status
    )


def iterate(problem: Problem, solver: FixedPointSolver, budget: Budget, carry: Carry, compact: bool = True) -> Carry:
    """Run to the end, taking finished rows out of the batch where that is possible and pays.

    Args:
        compact: allow that. It needs `problem.divisible`, is off under torch.func and where a trajectory is kept.
    """
    batch = len(carry.z)
    compact = compact and batch > 1 and not inside_transform() and carry.trajectory is None and problem.divisible(batch)
    result, rows, tried = carry, None, False
    while carry.count < budget.max_steps and carry.running():
        carry = advance(problem, solver, budget, carry, measured=compact and not tried)
        if not compact or carry.active is None or carry.count >= budget.max_steps:
            continue
        keep = carry.active.nonzero().flatten()
        if not 0 < len(keep) <= CROWDED * len(carry.z):
            continue
        smaller = problem.select(keep)
        if not tried:
            tried = True
            assert carry.measured is not None
            compact = independent(smaller, *carry.measured, keep)
            carry = dataclasses.replace(carry, extra=carry.extra + 1)
            if not compact:
                continue
        result = _merge(result, carry, rows)
        rows = keep if rows is None else rows[keep]
        problem, carry = smaller, carry.select(keep)
    return _merge(result, settle(carry), rows)


def _merge(whole: Carry, part: Carry, rows: Tensor | None) -> Carry:
    """Write the results of some rows into those of the whole batch."""
    if rows is None:
        return part
    return dataclasses.replace(
        whole, count=part.count, extra=part.extra,
        **{
            name: getattr(whole, name).index_copy(0, rows, getattr(part, name))
            for name in ("value", "status", "steps", "evaluations", "residual")
        },
    )  # fmt: skip


def independent(part: Problem, z: Tensor, image: Tensor, rows: Tensor) -> bool:
    """Whether the function of some rows alone is what it was among all rows, where z was mapped to image.

    Not so where it closes over a per-sample tensor, normalises over the batch or draws random numbers.
    """
    z, image = z.index_select(0, rows), image.index_select(0, rows)
    try:
        alone, _ = part.evaluate(z)
    except Exception:
        # Whatever a function says to a batch of another size.
        return False
    rounding = torch.finfo(z.dtype).eps ** 0.5
    close = norms(alone - image) <= rounding * norms(image).clamp_min(rounding)
    return all_true(close | ~torch.isfinite(norms(image)))


def stats_of(carry: Carry) -> Stats:
    """The per-sample statistics of a finished run."""
    return Stats(carry.steps, carry.evaluations, carry.residual, carry.status)
