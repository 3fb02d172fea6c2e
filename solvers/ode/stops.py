"""Where along a solve the cotangents of its results arrive."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .interpolation import polynomial
from .method import Time
from .problem import Problem, Run

# Output times that are this much worse conditioned than one are replaced by well-spaced points of their step.
_CONDITION = 1e6


@dataclasses.dataclass(frozen=True)
class Stop:
    """A time at which a cotangent arrives.

    Attributes:
        t: when: a float, or (batch,).
        y: the state there (batch, n).
        bar: its cotangent (batch, n).
    """

    t: Time
    y: Tensor
    bar: Tensor


def cotangent_stops(problem: Problem, run: Run, dense_bar: Tensor | None) -> list[Stop]:
    """The cotangents of dense outputs as such of states, the last one first.

    A linear function of a polynomial is one of its values at points: at the output times that lie in the step where it
    is one of the values there, and at as many well-spaced points as the polynomial has coefficients in any case.
    """
    if dense_bar is None or run.dense is None:
        return []
    if isinstance(run.mesh.picks, Tensor):
        return _sample_stops(problem, run, run.mesh.picks, run.dense, dense_bar)
    return _shared_stops(problem, run, run.mesh.picks, run.dense, dense_bar)


def _shared_stops(problem: Problem, run: Run, picks: list[int], dense: Tensor, dense_bar: Tensor) -> list[Stop]:
    assert problem.times.listed is not None
    inside: dict[int, list[float]] = {}
    for place, t in zip(run.places.tolist(), problem.times.listed[1:-1]):
        inside.setdefault(place, []).append(t)
    whole = set(range(len(picks))) if problem.dense else {hit.pick for hit in run.hits}
    sign = 1.0 if problem.times.listed[-1] > problem.times.listed[0] else -1.0
    found: dict[float, Stop] = {}
    for pick, index in enumerate(picks):
        taken = run.mesh.steps[index]
        theta = torch.tensor([(t - taken.t) / taken.h for t in inside.get(pick, [])], dtype=torch.float64)
        weights = None if pick in whole else _weights(theta, dense.shape[1])
        if weights is None or not _represents(theta, weights, dense_bar[pick]):
            theta = torch.linspace(0, 1, dense.shape[1], dtype=torch.float64)
            weights = _weights(theta, dense.shape[1])
        assert weights is not None
        weights, theta = weights.to(dense), theta.to(dense.device)
        bars = torch.tensordot(weights, dense_bar[pick], dims=1)
        states = polynomial(dense[pick].unsqueeze(0).expand(len(theta), -1, -1, -1), theta)
        for t, y, bar in zip((taken.t + theta * taken.h).tolist(), states, bars):
            found[t] = Stop(t, y, bar if t not in found else bar + found[t].bar)
    return [found[t] for t in sorted(found, key=lambda t: -t * sign)]


def _sample_stops(problem: Problem, run: Run, picks: Tensor, dense: Tensor, dense_bar: Tensor) -> list[Stop]:
    t, h = run.mesh.all_times(picks, None, None)
    times, states, bars = [], [], []
    # Without the dense output of all steps the first picks are those of the output times, one each.
    outputs = 0 if problem.dense else len(run.places)
    if outputs:
        given = problem.times.values.expand(len(problem.y0), -1)[:, 1:-1].T
        theta = (given - t[:outputs]) / torch.where(h[:outputs] == 0, 1.0, h[:outputs])
        bar = dense_bar[:outputs]
        powers = theta.unsqueeze(1) ** torch.arange(dense.shape[1], device=theta.device).view(-1, 1)
        if _small(bar - powers.to(bar).unsqueeze(-1) * bar[:, :1], bar):
            times.append(given)
            states.append(polynomial(dense[:outputs], theta))
            bars.append(bar[:, 0])
        else:
            outputs = 0
    if outputs < len(picks):
        nodes = torch.linspace(0, 1, dense.shape[1], dtype=torch.float64)
        weights = _weights(nodes, dense.shape[1])
        assert weights is not None
        for node, row in zip(nodes.tolist(), weights.to(dense)):
            times.append(t[outputs:] + node * h[outputs:])
            states.append(polynomial(dense[outputs:], torch.full_like(t[outputs:], node)))
            bars.append(torch.einsum("p,kpbn->kbn", row, dense_bar[outputs:]))
    sign = (problem.times.values[..., -1] - problem.times.values[..., 0]).sign()
    at, y, bar = torch.cat(times), torch.cat(states), torch.cat(bars)
    # Where a sample takes no step there is nothing to stop for: put that to the end of the solve.
    empty = (h == 0)[outputs:].repeat(dense.shape[1], 1) if outputs < len(picks) else h[:0] == 0
    empty = torch.cat([torch.zeros_like(h[:outputs], dtype=torch.bool), empty])
    at = torch.where(empty, problem.times.values[..., -1], at)
    y, bar = torch.where(empty.unsqueeze(-1), run.y, y), torch.where(empty.unsqueeze(-1), 0.0, bar)
    order = (at * sign).argsort(dim=0, descending=True)
    rows = order.unsqueeze(-1).expand_as(y)
    return [Stop(*parts) for parts in zip(at.gather(0, order), y.gather(0, rows), bar.gather(0, rows))]


def _weights(theta: Tensor, count: int) -> Tensor | None:
    """Weights (points, p + 1) that turn a cotangent of coefficients into such of values; None where ill-conditioned."""
    if not 0 < len(theta) <= count:
        return None
    powers = theta.unsqueeze(0) ** torch.arange(count, dtype=torch.float64).unsqueeze(1)
    if float(torch.linalg.cond(powers)) > _CONDITION:
        return None
    return torch.linalg.pinv(powers)


def _represents(theta: Tensor, weights: Tensor, bar: Tensor) -> bool:
    """Whether a cotangent (p + 1, batch, n) of coefficients is one of the values at `theta` alone."""
    powers = theta.unsqueeze(0) ** torch.arange(len(bar), dtype=torch.float64).unsqueeze(1)
    return _small(bar - torch.tensordot((powers @ weights).to(bar), bar, dims=1), bar)


def _small(difference: Tensor, bar: Tensor) -> bool:
    """Whether it is no more than rounding."""
    return float(difference.abs().max()) <= torch.finfo(bar.dtype).eps ** 0.5 * float(bar.abs().max())


def pull_mesh(
    run: Run, dense_bar: Tensor | None, ends: tuple[Tensor | None, Tensor | None]
) -> tuple[Tensor | None, Tensor | None]:
    """Cotangents of the ends of the solve by way of the steps, which move with them and carry dense outputs along."""
    if dense_bar is None or run.dense is None or ends == (None, None):
        return None, None
    picks = run.mesh.picks
    index = picks if isinstance(picks, Tensor) else torch.tensor(picks, device=run.dense.device)
    leaves = [None if x is None else x.detach().requires_grad_() for x in ends]
    with torch.enable_grad():
        t, h = run.mesh.all_times(index, *leaves)
        exponents = torch.arange(run.dense.shape[1], device=run.dense.device).view(-1, 1, 1)
        dims = (1, 2, 3) if index.ndim == 1 else (1, 3)
        length = torch.where(h == 0, 1.0, h).detach()
        by_start = (dense_bar[:, :-1] * (run.dense * exponents)[:, 1:]).double().sum(dims) / length
        by_length = (dense_bar * run.dense * exponents).double().sum(dims) / length
        total = (by_start * t + by_length * h).sum()
        wanted = [x for x in leaves if x is not None]
        if not total.requires_grad:
            return None, None
        pulled = iter(torch.autograd.grad(total, wanted, allow_unused=True))
    first, last = (None if x is None else next(pulled) for x in leaves)
    return first, last
