"""The loop that drives every minimiser: line search, stopping, freezing, statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from ..solution import Stats, Status
from ..transforms import any_true
from ..tree import norms
from .energy import Energy
from .minimize_methods import Minimizer
from .quadratic_problem import Limits

DECREASE = 1e-4
"""Share of the fall that the slope promises which a step must bring about."""

HALVINGS = 40
"""Shortenings of a step after which a sample stagnates."""


def descend(energy: Energy, y: Tensor, solver: Minimizer, limits: Limits, atol: float) -> tuple[Tensor, Stats]:
    """The minimisers (batch, n) and the statistics."""
    value, slope = energy.both(y)
    memory = solver.init(y, slope)
    first = norms(slope)
    steps = torch.zeros_like(value, dtype=torch.int64)
    evaluations = steps + 1
    status = steps + int(Status.MAX_STEPS)
    active = torch.ones_like(steps, dtype=torch.bool)
    for k in range(limits.max_steps + 1):
        size = norms(slope)
        scale = torch.maximum(norms(y), first)
        fine = active & torch.isfinite(size) & (size <= atol + limits.rtol * scale)
        endless = active & (value == -torch.inf)
        broken = active & ~endless & ~(torch.isfinite(slope).all(1) & torch.isfinite(value))
        status = torch.where(fine, int(Status.CONVERGED), status)
        status = torch.where(endless, int(Status.UNBOUNDED), status)
        status = torch.where(broken, int(Status.NON_FINITE), status)
        active = active & ~(fine | endless | broken)
        if k == limits.max_steps or not any_true(active):
            break
        towards = solver.direction(energy, y, slope, memory)
        fall = (towards * slope).sum(1)
        astray = ~(fall < 0)
        towards = torch.where(astray.unsqueeze(1), -slope, towards)
        fall = torch.where(astray, -size.square(), fall)
        if solver.length is None:
            taken, tried = _search(energy, y, value, slope, towards, fall, active)
        else:
            taken, tried = active.to(y.dtype) * solver.length, torch.zeros_like(steps)
        moved = taken > 0
        following = torch.where(moved.unsqueeze(1), y + taken.unsqueeze(1) * towards, y)
        value_there, slope_there = energy.both(following)
        stuck = active & ~moved
        status = torch.where(stuck, int(Status.STAGNATED), status)
        keep = moved.unsqueeze(1)
        memory = solver.learn(
            memory, torch.where(keep, following - y, 0.0), torch.where(keep, slope_there - slope, 0.0)
        )
        evaluations = evaluations + torch.where(active, tried + 1, 0)
        steps = steps + moved
        y, slope = following, torch.where(keep, slope_there, slope)
        value = torch.where(moved, value_there, value)
        active = active & ~stuck
    size = norms(slope)
    scale = torch.maximum(norms(y), first)
    residual = torch.where(scale > 0, size / scale.clamp_min(torch.finfo(scale.dtype).tiny), size)
    return y, Stats(steps, evaluations, residual, status)


def _search(
    energy: Energy, y: Tensor, value: Tensor, slope: Tensor, towards: Tensor, fall: Tensor, active: Tensor
) -> tuple[Tensor, Tensor]:
    """The share of the direction to go (batch,), zero where none is found, and how many shares were tried."""
    rounding = 10 * torch.finfo(y.dtype).eps * value.abs()
    taken = torch.zeros_like(value)
    tried = torch.zeros_like(value, dtype=torch.int64)
    searching, share = active, torch.ones_like(value)
    for _ in range(HALVINGS):
        there = y + share.unsqueeze(1) * towards
        new = energy.value(there)
        # Near the minimum the fall drowns in rounding errors, and the slope has to tell.
        enough = new <= value + DECREASE * share * fall + rounding
        enough = searching & enough & ~torch.isnan(new) & (there != y).any(1)
        doubtful = enough & (new > value + DECREASE * share * fall)
        if any_true(doubtful):
            smaller = norms(energy.both(there)[1]) < norms(slope)
            enough = enough & (~doubtful | smaller)
        tried = tried + searching
        taken = torch.where(enough, share, taken)
        searching = searching & ~enough
        if not any_true(searching):
            break
        share = torch.where(searching, share / 2, share)
    return taken, tried
