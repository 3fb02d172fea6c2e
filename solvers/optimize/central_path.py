"""A point of the central path: the smooth relative of an optimum, where all constraints push back a little."""

from __future__ import annotations

import torch
from torch import Tensor

from ..options import options
from ..solution import Status
from .interior_point import residuals_of, starting_rows, step
from .quadratic_problem import Found, Limits, Programme


@options
class CentralPath:
    """An adjoint that smooths the programme: the value minimises the objective - barrier * sum(log(slack)).

    It is differentiable in everything, to second order, also where the optimum itself jumps from vertex to vertex or
    has no derivative. As the barrier falls the value tends to the optimum, and the derivative to that of the optimum
    where it has one. With the simplex as feasible set and a linear objective this is a smoothed argmax.

    Attributes:
        barrier: weight of the logarithms, in units of the objective.

    Raises:
        ValueError: barrier is not positive.

    Source: Fiacco and McCormick 1968; Mandi and Guns 2020, Interior point solving for LP-based prediction and
    optimisation.
    """

    barrier: float = 1e-2

    def __post_init__(self) -> None:
        if not 0 < self.barrier < float("inf"):
            raise ValueError(f"CentralPath: barrier must be positive and finite; got {self.barrier!r}.")


def follow_to(problem: Programme, barrier: Tensor, limits: Limits) -> Found:
    """The points at which slack times multiplier is the `barrier` (batch,) of each sample."""
    found, m = Found.empty(problem), problem.m
    state = starting_rows(problem)
    rows = torch.arange(problem.batch, device=barrier.device)
    for k in range(limits.max_steps):
        mu, primal, dual = residuals_of(problem, state, limits.floor)[:3]
        product = state.s * state.v[:, :m]
        off = (product - barrier.unsqueeze(1)).abs().amax(1) / barrier if m else torch.zeros_like(mu)
        residual = torch.maximum(torch.maximum(primal, dual), off)
        fine = residual <= limits.rtol
        broken = ~torch.isfinite(residual)
        over = torch.ones_like(fine) if k == limits.max_steps - 1 else fine | broken
        at = over.nonzero().flatten()
        if len(at):
            to = rows[at]
            found.x[to], found.v[to] = state.x[at], state.v[at]
            found.W[to] = torch.cat([state.s / state.v[:, :m], torch.zeros_like(state.v[:, m:])], 1)[at]
            found.steps[to], found.residual[to] = k, residual[at]
            ended = torch.where(fine, int(Status.CONVERGED), int(Status.MAX_STEPS))
            found.status[to] = torch.where(broken, int(Status.STAGNATED), ended)[at]
            keep = (~over).nonzero().flatten()
            if len(keep) == 0:
                break
            problem, state, barrier, rows = problem.select(keep), state.select(keep), barrier[keep], rows[keep]
        state = step(problem, state, limits.floor, barrier)[0]
    return found
