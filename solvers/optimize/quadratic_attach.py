"""Saddle-point systems as an autograd Function whose derivatives are saddle-point systems again, to any order."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from ..solution import AdjointWarning
from ..transforms import any_true, tangents_of_others
from .quadratic_kkt import PRIMAL, PROXIMAL, Saddle, factorise, times, times_transposed

LOOSE = 1e-6
"""Relative residual of a backward solve above which the gradient is not to be trusted."""


def fold(tensors: tuple[Any, ...], dims: tuple[int | None, ...], ranks: tuple[int, ...], size: int) -> list[Any]:
    """Tensors whose examples under vmap have become a part of the batch; `ranks` are those of batched tensors.

    A tensor that all samples share, and all examples too, stays shared.
    """
    folded: list[Any] = []
    for tensor, dim, rank in zip(tensors, dims, ranks, strict=True):
        if not isinstance(tensor, Tensor):
            folded.append(tensor)
            continue
        if dim is None and tensor.ndim < rank:
            folded.append(tensor)
            continue
        t = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        if t.ndim - 1 < rank:
            # Shared by the samples of an example, but not by the examples.
            batch = next(
                o.shape[0] if k is None else o.movedim(k, 0).shape[1]
                for o, k, r in zip(tensors, dims, ranks, strict=True)
                if isinstance(o, Tensor) and o.ndim - (k is not None) == r
            )
            t = t.unsqueeze(1).expand(size, batch, *t.shape[1:])
        folded.append(t.reshape(t.shape[0] * t.shape[1], *t.shape[2:]))
    return folded


class _SaddleSolve(torch.autograd.Function):
    """(Q, C, W, r, d) -> (u, v) with Q u + C'v = r and C u - W v = d, row by row of the batch.

    With u and v given, they are returned as they are, and only derivatives are computed. Everything behind them in
    the arguments is constant: the factor, and the scales under which it was computed.
    """

    @staticmethod
    def forward(
        Q: Tensor, C: Tensor, W: Tensor, r: Tensor, d: Tensor, factor: Tensor, rows: Tensor, objective: Tensor,
        u: Tensor | None, v: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        if u is not None and v is not None:
            return u.clone(), v.clone()
        size = objective.unsqueeze(1)
        scaled_Q = Q / (objective[0] if Q.ndim == 2 else objective[:, None, None])
        scaled_C = C / (rows[0].unsqueeze(1) if C.ndim == 2 else rows.unsqueeze(2))
        scaled_W = W * size / rows**2
        saddle = Saddle(scaled_Q, scaled_C, scaled_W, factor, 1 / (scaled_W + PROXIMAL))
        x, y, error = saddle.solve(r / size, d / rows)
        if any_true(error > 1e-11):
            hard = (error > 1e-11).nonzero().flatten()
            x, y, error = saddle.with_hard(hard).solve(r / size, d / rows)
            loose = error > LOOSE
            if bool(loose.any()):
                warnings.warn(
                    f"quadratic_program: the backward solve of {int(loose.sum())} of {len(loose)} samples left a "
                    f"relative residual of {float(error[loose].max()):.3g}: their optimum is not unique or all but, "
                    "and the gradient there is not to be trusted. Regularise Q.",
                    AdjointWarning,
                    stacklevel=2,
                )
        return x, y * size / rows

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        Q, C, W, _, _, factor, rows, objective, _, _ = inputs
        kept = (Q, C, W, factor, rows, objective, *output)
        ctx.save_for_backward(*kept)
        ctx.save_for_forward(*kept)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        Q, C, W, factor, rows, objective, u, v = ctx.saved_tensors
        on_u = torch.zeros_like(u) if grads[0] is None else grads[0]
        on_v = torch.zeros_like(v) if grads[1] is None else grads[1]
        a, b = _SaddleSolve.apply(Q, C, W, on_u, on_v, factor, rows, objective, None, None)
        needs = ctx.needs_input_grad
        on_Q = on_C = on_W = None
        if needs[0]:
            half = _outer(a, u, Q.ndim)
            on_Q = -(half + half.mT) / 2
        if needs[1]:
            on_C = -(_outer(v, a, C.ndim) + _outer(b, u, C.ndim))
        if needs[2]:
            on_W = b * v
        return on_Q, on_C, on_W, a, b, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor, Tensor]:
        dQ, dC, dW, dr, dd = tangents[:5]
        with tangents_of_others(*ctx.saved_tensors) as (Q, C, W, factor, rows, objective, u, v):
            r = torch.zeros_like(u) if dr is None else dr
            d = torch.zeros_like(v) if dd is None else dd
            if dQ is not None:
                r = r - (times(dQ, u) + times_transposed(dQ, u)) / 2
            if dC is not None:
                r, d = r - times_transposed(dC, v), d - times(dC, u)
            if dW is not None:
                d = d + dW * v
            return _SaddleSolve.apply(Q, C, W, r, d, factor, rows, objective, None, None)

    @staticmethod
    def vmap(info: Any, dims: tuple[int | None, ...], *args: Any) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        folded = fold(args, dims, (3, 3, 2, 2, 2, 3, 2, 1, 2, 2), info.batch_size)
        u, v = _SaddleSolve.apply(*folded)
        shape = (info.batch_size, len(u) // info.batch_size)
        return (u.reshape(*shape, -1), v.reshape(*shape, v.shape[1])), (0, 0)


class _Objective(torch.autograd.Function):
    """The objective at (x, v), whose first derivatives are those of the Lagrangian at a fixed optimum.

    Through x itself they would be those of multipliers that may have a wrong sign, where more rows hold as equations
    than there are dimensions, and so of no direction at all. x and v matter to second derivatives only.

    Source: Bertsimas and Tsitsiklis 1997, theorem 5.2 (a dual optimum is a subgradient of the optimal cost).
    """

    @staticmethod
    def forward(x: Tensor, v: Tensor, Q: Tensor, q: Tensor, C: Tensor, d: Tensor) -> Tensor:
        value: Tensor = (x * (times(Q, x) / 2 + q)).sum(1)
        return value

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, v, Q, _, C, _ = inputs
        ctx.ranks = Q.ndim, C.ndim
        ctx.save_for_backward(x, v)
        ctx.save_for_forward(x, v)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, v = ctx.saved_tensors
        size, needs = grads[0].unsqueeze(1), ctx.needs_input_grad
        on_Q = _outer(size * x, x, ctx.ranks[0]) / 2 if needs[2] else None
        on_C = _outer(size * v, x, ctx.ranks[1]) if needs[4] else None
        return None, None, on_Q, size * x, on_C, -size * v

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        _, _, dQ, dq, dC, dd = tangents
        with tangents_of_others(*ctx.saved_tensors) as (x, v):
            moved = torch.zeros_like(x[:, 0])
            if dQ is not None:
                moved = moved + (x * times(dQ, x)).sum(1) / 2
            if dq is not None:
                moved = moved + (x * dq).sum(1)
            if dC is not None:
                moved = moved + (v * times(dC, x)).sum(1)
            if dd is not None:
                moved = moved - (v * dd).sum(1)
            return moved

    @staticmethod
    def vmap(info: Any, dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        value = _Objective.apply(*fold(args, dims, (2, 2, 3, 2, 3, 2), info.batch_size))
        return value.reshape(info.batch_size, -1), 0


def _outer(a: Tensor, b: Tensor, rank: int) -> Tensor:
    """a b' of every sample, or their sum where the matrix is shared."""
    return a.mT @ b if rank == 2 else a.unsqueeze(2) * b.unsqueeze(1)


def saddle_factor(Q: Tensor, C: Tensor, W: Tensor, rows: Tensor, objective: Tensor) -> Tensor:
    """The factor of a saddle for `saddle_solve`, with W in the units of the programme."""
    scaled_Q = Q / (objective[0] if Q.ndim == 2 else objective[:, None, None])
    scaled_C = C / (rows[0].unsqueeze(1) if C.ndim == 2 else rows.unsqueeze(2))
    weight = 1 / (W * objective.unsqueeze(1) / rows**2 + PROXIMAL)
    return factorise(scaled_Q, scaled_C, weight, PRIMAL)


saddle_solve = _SaddleSolve.apply
objective_at = _Objective.apply
