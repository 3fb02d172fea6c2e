"""Matrices with given row and column sums: Sinkhorn's, and the nearest doubly stochastic one.

Both maximise a concave dual in one number a column. Given those, every row is a simplex map of its own (softmax,
sparsemax), which leaves the column sums to be met: by Newton's method, whose matrix is the Laplacian of a graph on the
columns. The derivatives are attached to what it found by recorded Newton steps with that matrix held constant.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..solution import Solution, Stats, Status
from ..transforms import all_true, any_true, derivative_levels, no_derivatives, not_compiled, plain
from .isotonic import finest
from .projections import project_simplex


@dataclasses.dataclass(frozen=True)
class _Rows:
    """A simplex map, row by row.

    Attributes:
        plan: of scores (batch, n, m) and row sums (batch, n, 1), the rows.
        conjugate: of scores, plan and row sums, what the rows contribute to the dual, (batch,).
        escort: of the plan, the weights w of its Jacobian diag(w) - w w' / sum(w), row by row.
        stride: of the range of a Newton step, and of the scores, the part of the step to try first.
        damping: added to the Laplacian, in parts of the error.
        distance: of scores, plan and row sums, how much a column has to rise before it has any weight; None where all
            have some.
        start: the range of scores up to which a solve needs no preparation.
    """

    plan: Callable[[Tensor, Tensor], Tensor]
    conjugate: Callable[[Tensor, Tensor, Tensor], Tensor]
    escort: Callable[[Tensor], Tensor]
    stride: Callable[[Tensor, Tensor], Tensor]
    damping: float
    distance: Callable[[Tensor, Tensor, Tensor], Tensor] | None
    start: float


def _distance(x: Tensor, plan: Tensor, a: Tensor) -> Tensor:
    """How much every column (batch, m) has to rise before a row of sparsemax reaches it."""
    support = plan > 0
    threshold = (torch.where(support, x, 0).sum(-1, keepdim=True) - a) / support.sum(-1, keepdim=True)
    return (threshold - x).amin(1)


# With logarithmic strides Newton's method on sums of exponentials converges from anywhere: Sun and Tran-Dinh 2019.
_ENTROPIC = _Rows(
    plan=lambda x, a: a * x.softmax(-1),
    conjugate=lambda x, p, a: (a.squeeze(-1) * x.logsumexp(-1)).sum(-1),
    escort=lambda p: p,
    stride=lambda span, reach: torch.where(span > 0, span.log1p() / span, 1),
    damping=0.0,
    distance=None,
    start=32.0,
)
_QUADRATIC = _Rows(
    plan=project_simplex,
    conjugate=lambda x, p, a: (torch.where(p > 0, x * p, 0) - p.square() / 2).sum((-2, -1)),
    escort=torch.sign,
    stride=lambda span, reach: torch.where(span > reach, reach / span, 1),
    damping=1e-2,
    distance=_distance,
    start=4.0,
)


@not_compiled
def sinkhorn(
    scores: Float[Tensor, "*batch n m"],
    rows: Float[Tensor, "*#batch n"] | None = None,
    columns: Float[Tensor, "*#batch m"] | None = None,
    *,
    temperature: float | Float[Tensor, "..."] = 1.0,
    rtol: float = 1e-9,
    max_steps: int = 200,
    throw: bool | str = False,
) -> Solution[Tensor]:
    """The plan of largest score plus entropy with given row and column sums; with neither, doubly stochastic.

    argmax_P <P, scores> + temperature H(P), which is diag(u) exp(scores / temperature) diag(v): what Sinkhorn's
    iteration converges to, and entropic optimal transport where the scores are negative costs. Found by Newton's
    method, a Cholesky factorisation (m, m) a step, which low temperatures are approached with from higher ones.

    Args:
        scores: any real tensor; -inf excludes an entry.
        rows: positive; what each row sums to. None for ones.
        columns: positive; in proportion to these the columns share what the rows sum to. None for equal shares.
        temperature: positive; a tensor broadcasts against (..., 1, 1). The smaller, the nearer to an assignment.
        rtol: a sample has converged where its column sums miss by no more than this part of their total.
        max_steps: the largest number of Newton steps.
        throw: raise `SolverError` if some sample does not converge; "warn" warns instead.

    Returns:
        The `Solution`, with the plans (..., n, m) as its value and (batch,) statistics, `batch` of all leading
        dimensions. Rows sum to `rows` in any case. Computed in float64 where the device has it. Differentiable in all
        arguments, to third order, and under torch.func as often as its transforms ask.

    Raises:
        ValueError: a marginal or the temperature is not positive and finite, or does not fit; a row or column without
            any score above -inf.
        SolverError: see `throw`. Where excluded entries leave no plan with these sums, no sample converges.

    Source: Sinkhorn and Knopp 1967; Cuturi 2013, lemma 2; Brauer, Clason, Lorenz and Wirth 2017 (Newton's method).
    """
    x = _wide(scores, "sinkhorn")
    heat = temperature if isinstance(temperature, Tensor) else torch.tensor(float(temperature), dtype=torch.float64)
    heat = _positive(heat, (*x.shape[:-2], 1, 1), x, "sinkhorn: temperature")
    solution = _balance(x / heat, scores, rows, columns, _ENTROPIC, "sinkhorn", rtol, max_steps)
    solution.check(throw, "sinkhorn")
    return solution


@not_compiled
def project_birkhoff(
    points: Float[Tensor, "*batch n m"],
    rows: Float[Tensor, "*#batch n"] | None = None,
    columns: Float[Tensor, "*#batch m"] | None = None,
    *,
    rtol: float = 1e-9,
    max_steps: int = 200,
    throw: bool | str = False,
) -> Solution[Tensor]:
    """The nearest non-negative matrix with given row and column sums; with neither, doubly stochastic.

    Sparse, unlike the plans of `sinkhorn`: the Euclidean projection onto the Birkhoff polytope.

    Args:
        points: any real tensor; -inf excludes an entry.
        rows: positive; what each row sums to. None for ones.
        columns: positive; in proportion to these the columns share what the rows sum to. None for equal shares.
        rtol: a sample has converged where its column sums miss by no more than this part of their total.
        max_steps: the largest number of Newton steps.
        throw: raise `SolverError` if some sample does not converge; "warn" warns instead.

    Returns:
        The `Solution`, with the projections (..., n, m) as its value and (batch,) statistics, `batch` of all
        leading dimensions. Rows sum to `rows` in any case. Computed in float64 where the device has it. Differentiable
        in all arguments; derivatives are those of the entries that are not zero.

    Raises:
        ValueError: a marginal is not positive and finite, or does not fit; a row or column without any point above
            -inf.
        SolverError: see `throw`.

    Source: Blondel, Seguy and Rolet 2018 (its dual); Lorenz, Manns and Meyer 2021 (Newton's method).
    """
    x = _wide(points, "project_birkhoff")
    solution = _balance(x, points, rows, columns, _QUADRATIC, "project_birkhoff", rtol, max_steps)
    solution.check(throw, "project_birkhoff")
    return solution


def _balance(
    x: Tensor,
    given: Tensor,
    rows: Tensor | None,
    columns: Tensor | None,
    kind: _Rows,
    name: str,
    rtol: float,
    max_steps: int,
) -> Solution[Tensor]:
    if not rtol >= 0:
        raise ValueError(f"{name}: rtol must not be negative; got {rtol!r}.")
    if max_steps < 1:
        raise ValueError(f"{name}: max_steps must be at least 1; got {max_steps!r}.")
    shape = x.shape
    a = x.new_ones(()) if rows is None else rows
    b = x.new_ones(()) if columns is None else columns
    a = _positive(a, shape[:-1], x, f"{name}: rows").reshape(-1, shape[-2], 1)
    b = _positive(b, (*shape[:-2], shape[-1]), x, f"{name}: columns").reshape(-1, shape[-1])
    b = b * (a.sum(1) / b.sum(1, keepdim=True))
    x = x.reshape(-1, *shape[-2:])
    for dim, side in ((-1, "row"), (-2, "column")):
        excluded = plain(torch.isneginf(x.detach()).all(dim))
        if any_true(excluded):
            first = tuple(excluded.nonzero()[0].tolist())
            raise ValueError(f"{name}: {side} {first[-1]} of sample {first[-2]} has no entry above -inf.")
    x0, a0, b0 = (_Constant.apply(t) for t in (x, a, b))
    with no_derivatives():
        g, stats = _solve(x0, a0, b0, kind, rtol, max_steps)
        plan = kind.plan(x0 + g.unsqueeze(1), a0)
        # Beyond the last digits of the columns' weights, the right-hand side of a derivative is noise.
        factor = _Factor(plan, kind, 100 * torch.finfo(x.dtype).eps * b0.mean(1))
    # Newton steps of value zero; each adds an exact order of derivative.
    for _ in range(max(derivative_levels(), 1) + 2):
        missing = b - kind.plan(x + g.unsqueeze(1), a).sum(1)
        g = g + factor.solve(missing - _Constant.apply(missing))
    plan = kind.plan(x + g.unsqueeze(1), a)
    return Solution(plan.reshape(shape).to(given.dtype), stats)


class _Constant(torch.autograd.Function):
    """The tensor without derivatives, of whatever transform of torch.func: detach drops those of the innermost."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        """The same."""
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        """No derivative."""
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, _: Any) -> None:
        """None."""

    @staticmethod
    def jvp(ctx: Any, _: Any) -> None:
        """None."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None], x: Tensor) -> tuple[Tensor, int | None]:
        """The same."""
        return _Constant.apply(x), in_dims[0]


def _solve(x: Tensor, a: Tensor, b: Tensor, kind: _Rows, rtol: float, max_steps: int) -> tuple[Tensor, Stats]:
    """The dual variables of the columns (batch, m), without derivatives; samples stop one by one.

    Scores of a wide range are approached from parts of them, each twice the one before, and so are the variables.
    """
    g = torch.zeros_like(b)
    total = b.sum(1)
    finite = torch.where(x > -torch.inf, x, 0)
    reach = finite.amax((1, 2)) - finite.amin((1, 2)) + b.amax(1)
    # Of the dual's terms, and how much of that their rounding can hide.
    size, blur = reach * total, 100 * torch.finfo(x.dtype).eps
    part = torch.exp2(-(reach / kind.start).log2().ceil().clamp(0, _HALVINGS)).nan_to_num(nan=1.0)

    def look(g: Tensor, part: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The plan, the dual, what the columns miss, and that relative to the total."""
        moved = x * part[:, None, None] + g.unsqueeze(1)
        plan = kind.plan(moved, a)
        missing = b - plan.sum(1)
        return plan, (b * g).sum(1) - kind.conjugate(moved, plan, a), missing, missing.abs().sum(1) / total

    steps = torch.zeros_like(total, dtype=torch.int64)
    looks = torch.ones_like(steps)
    now = look(g, part)
    for _ in range(max_steps):
        while any_true(near := (part < 1) & (now[3] < _ROUGH)):
            part, g = torch.where(near, 2 * part, part), torch.where(near.unsqueeze(1), 2 * g, g)
            now = look(g, part)
            looks = looks + near
        plan, dual, missing, error = now
        running = ((error > rtol) | (part < 1)) & error.isfinite()
        if not any_true(running):
            break
        step = _Factor(plan, kind, kind.damping * error.clamp(max=1)).solve(missing)
        if kind.distance is not None:
            # The Laplacian does not know how far away a column is that no row has reached.
            far = kind.distance(x * part[:, None, None] + g.unsqueeze(1), plan, a)
            step = torch.where(missing == b, torch.maximum(step, far), step)
        t = kind.stride(step.amax(1) - step.amin(1), reach)
        gain = (step * missing).sum(1)
        settled = ~running
        for _ in range(_HALVINGS):
            trial = g + torch.where(running.unsqueeze(1), t.unsqueeze(1) * step, 0)
            now = look(trial, part)
            looks = looks + (~settled)
            settled = settled | (now[1] >= dual + 1e-4 * t * gain - blur * (dual.abs() + size))
            if all_true(settled):
                break
            t = torch.where(settled, t, t / 2)
        g = trial
        steps = steps + running
    g = g / part.unsqueeze(1)
    error = look(g, torch.ones_like(part))[3]
    status = torch.where(error <= rtol, int(Status.CONVERGED), int(Status.MAX_STEPS))
    status = torch.where(error.isfinite(), status, int(Status.NON_FINITE))
    return g, Stats(steps, looks, error, status)


_HALVINGS = 40
_ROUGH = 0.02
"""The error at which to go on to the next part of the scores."""


class _Factor:
    """The Laplacian of the graph on the columns, factorised.

    It is scaled to a diagonal of ones, since its entries can differ by any power of ten, and made definite: along the
    ones nothing changes, nor along each part where the graph falls apart. What is added to it moves solutions along
    such directions only.
    """

    def __init__(self, plan: Tensor, kind: _Rows, damping: Tensor) -> None:
        w = kind.escort(plan)
        sums = w.sum(2, keepdim=True)
        between = w.mT @ (w / torch.where(sums > 0, sums, 1))
        between = between - torch.diag_embed(between.diagonal(dim1=-2, dim2=-1))
        # Not the column's weight less what its square takes from it: that cancels.
        degree = between.sum(-1)
        linked = degree > torch.finfo(w.dtype).tiny ** 0.5
        self.scale = torch.where(linked, degree, 1).sqrt()
        outer = self.scale.unsqueeze(-1) * self.scale.unsqueeze(-2)
        slack = 100 * torch.finfo(w.dtype).eps
        ones = outer / self.scale.square().sum(-1)[..., None, None]
        matrix = ones - between / outer + torch.diag_embed(linked.to(w.dtype) + slack)
        matrix = matrix + torch.diag_embed(damping.unsqueeze(-1) / self.scale.square())
        self.factor, _ = torch.linalg.cholesky_ex(matrix)

    def solve(self, right: Tensor) -> Tensor:
        """The Laplacian's inverse times (batch, m)."""
        scaled = (right / self.scale).unsqueeze(-1)
        return torch.cholesky_solve(scaled, self.factor).squeeze(-1) / self.scale


def _wide(scores: Tensor, name: str) -> Tensor:
    """Checked, and in the finest precision: at low temperatures the columns hang together by the last digits."""
    if scores.ndim < 2 or 0 in scores.shape[-2:]:
        raise ValueError(f"{name}: expected a non-empty matrix (*batch, n, m); got shape {tuple(scores.shape)}.")
    if not scores.is_floating_point():
        raise TypeError(f"{name}: expected a real floating-point type; got {scores.dtype}.")
    return finest(scores)


def _positive(value: Tensor, shape: tuple[int, ...], like: Tensor, name: str) -> Tensor:
    """The value in that shape and in the type of `like`."""
    wrong = ~((value > 0) & (value < torch.inf))
    if any_true(wrong):
        first = plain(value)[plain(wrong)].flatten()[0]
        raise ValueError(f"{name} must be positive and finite; got {float(first):g}.")
    try:
        return value.to(like).expand(shape)
    except RuntimeError as error:
        raise ValueError(f"{name} has to broadcast to shape {tuple(shape)}; got {tuple(value.shape)}.") from error
