"""`odeint_adjoint` with the signature and the meaning of torchdiffeq's."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ...solution import AdjointWarning
from ..tape import vector_jacobian
from .interface import as_answer
from .layout import ErrorNorm, Layout, Norm
from .methods import CALLBACKS, FOREIGN, read_method
from .request import Func, Request, checked_method, read_hooks, read_request, read_tolerance, times_dtype


def odeint_adjoint(
    func: Func,
    y0: Any,
    t: Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: dict[str, Any] | None = None,
    event_fn: Func | None = None,
    adjoint_rtol: Any = None,
    adjoint_atol: Any = None,
    adjoint_method: str | None = None,
    adjoint_options: dict[str, Any] | None = None,
    adjoint_params: Iterable[Tensor] | None = None,
) -> Any:
    """As `odeint`, differentiated by the adjoint equation, solved backwards in time: memory does not grow with steps.

    torchdiffeq's function of this name; every argument means what it means there. Where the backward solve breaks
    down, as it does in torchdiffeq if the equation is unstable backwards in time, gradients are those of the accepted
    steps instead, with a warning. Second derivatives are those of the accepted steps too; third ones raise.

    Args:
        func: as in `odeint`. If it has attributes `callback_step_adjoint`, `callback_accept_step_adjoint` and
            `callback_reject_step_adjoint`, these are called at each step of the backward solve.
        y0, t, rtol, atol, method, options, event_fn: as in `odeint`.
        adjoint_rtol, adjoint_atol, adjoint_method: of the backward solve; those of the forward one by default.
        adjoint_options: its options; `options` without the norm by default. Its norm is "seminorm", which leaves the
            parameters' integrals out of step control, or a function of (t, *y, *cotangent of y, *those of parameters).
        adjoint_params: tensors that get gradients; the parameters of `func` by default, which then has to be a module.

    Returns:
        As `odeint`.

    Raises:
        ValueError: `func` is no module and adjoint_params is missing; adjoint_method differs from method and
            adjoint_options is missing; and as `odeint`.
        AssertionError, TypeError: as `odeint`.

    Source: Chen et al. 2018, "Neural ordinary differential equations"; Kidger, Chen, Lyons 2021, "'Hey, that's not an
    ODE': faster ODE adjoints via seminorms".
    """
    if adjoint_params is None and not isinstance(func, nn.Module):
        raise ValueError(
            "func must be an instance of nn.Module to specify the adjoint parameters; alternatively they can be "
            "specified explicitly via the `adjoint_params` argument. If there are no parameters then it is allowable "
            "to set `adjoint_params=()`."
        )
    if {checked_method(method), checked_method(adjoint_method or method)} & set(FOREIGN):
        import torchdiffeq

        given = {"rtol": rtol, "atol": atol, "method": method, "options": options, "event_fn": event_fn}
        given |= {"adjoint_rtol": adjoint_rtol, "adjoint_atol": adjoint_atol, "adjoint_method": adjoint_method}
        given |= {"adjoint_options": adjoint_options, "adjoint_params": adjoint_params}
        return torchdiffeq.odeint_adjoint(func, y0, t, **given)
    if adjoint_method not in (None, method) and options is not None and adjoint_options is None:
        raise ValueError(
            "If `adjoint_method != method` then we cannot infer `adjoint_options` from `options`. So as `options` has "
            "been passed then `adjoint_options` must be passed as well."
        )
    if adjoint_options is None:
        adjoint_options = {key: value for key, value in (options or {}).items() if key != "norm"}
    request = read_request(func, y0, t, rtol, atol, checked_method(method), options, event_fn)
    backward = Backward(
        rtol=rtol if adjoint_rtol is None else adjoint_rtol,
        atol=atol if adjoint_atol is None else adjoint_atol,
        method=checked_method(adjoint_method or method),
        options=adjoint_options,
        callbacks={name: hook for name in CALLBACKS if (hook := getattr(func, f"{name}_adjoint", None)) is not None},
    )
    params = _differentiable(func, adjoint_params, adjoint_options)
    rows, *time = _Backsolved.apply(request, backward, request.y0, request.t, *params)
    return as_answer(request, rows, time[0] if time else None)


def _differentiable(func: Any, given: Iterable[Tensor] | None, options: dict[str, Any]) -> tuple[Tensor, ...]:
    """The tensors that get gradients."""
    if given is not None:
        params: tuple[Tensor, ...] = tuple(given)
    elif getattr(func, "_is_replica", False):
        # The parameters of a replica under DataParallel are plain attributes.
        params = tuple(x for module in func.modules() for x in vars(module).values() if isinstance(x, Tensor))
    else:
        params = tuple(func.parameters())
    wanted = tuple(x for x in params if x.requires_grad)
    if len(wanted) < len(params) and callable(options.get("norm")):
        warnings.warn(
            "An adjoint parameter was passed without requiring gradient. For efficiency this will be excluded from the "
            "adjoint pass, and will not appear as a tensor in the adjoint norm.",
            stacklevel=3,
        )
    return wanted


@dataclasses.dataclass(frozen=True)
class Backward:
    """What was asked for of the backward solve: see `odeint_adjoint`.

    Attributes:
        rtol, atol, method, options: of the solve.
        callbacks: by the names under which a solver looks for them.
    """

    rtol: Any
    atol: Any
    method: str
    options: dict[str, Any]
    callbacks: dict[str, Any]


class _Backsolved(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, request: Request, backward: Backward, y0: Tensor, t: Tensor, *params: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.request, ctx.backward = request, backward
        rows, time = dataclasses.replace(request, y0=y0.detach(), t=t.detach()).solve()
        ctx.save_for_backward(y0, t, rows, time, *params)
        if time is None:
            return (rows,)
        ctx.mark_non_differentiable(time)
        return rows, time

    @staticmethod
    def backward(ctx: Any, bars: Tensor, *_: Any) -> Any:
        y0, t, rows, time = ctx.saved_tensors[:4]
        params = ctx.saved_tensors[4:]
        if torch.is_grad_enabled():
            pulled = _Replayed.apply(ctx.request, bars, y0, t, *params)
            return None, None, *pulled
        ends = t if time is None else torch.stack([t[0], time.to(t)])
        try:
            solve = _Backsolve(ctx.request, ctx.backward, ends.detach(), t.requires_grad, params)
            y_bar, t_bar, params_bar = solve.run(rows, bars)
        except AssertionError as failure:
            warnings.warn(
                f"odeint_adjoint: the adjoint equation could not be solved backwards in time ({failure}). The gradient "
                f"is that of the accepted steps instead. Use odeint, or solve_ode with another adjoint.",
                AdjointWarning,
                stacklevel=2,
            )
            return None, None, *_replay(ctx.request, bars, y0, t, params, create_graph=False)[0]
        if t_bar is not None and time is not None:
            t_bar = torch.stack([t_bar[0], torch.zeros_like(t_bar[0])])
        return None, None, y_bar, t_bar, *params_bar


def _replay(
    request: Request, bars: Tensor, y0: Tensor, t: Tensor, params: Iterable[Tensor], create_graph: bool
) -> tuple[list[Tensor | None], list[Tensor]]:
    """Cotangents of y0, t and params by the accepted steps, and these as the tensors that they were pulled to."""
    with torch.enable_grad():
        leaves = [y0.detach().requires_grad_(), t.detach().requires_grad_(t.requires_grad)]
        rows, _ = dataclasses.replace(request, y0=leaves[0], t=leaves[1]).solve()
        inputs = [*leaves, *params]
        wanted = [x for x in inputs if x.requires_grad]
        found = iter(
            torch.autograd.grad(rows, wanted, bars, retain_graph=True, create_graph=create_graph, allow_unused=True)
        )
        return [next(found) if x.requires_grad else None for x in inputs], inputs


class _Replayed(torch.autograd.Function):
    """The backward pass as a function of its own, by the accepted steps."""

    @staticmethod
    def forward(ctx: Any, request: Request, bars: Tensor, y0: Tensor, t: Tensor, *params: Tensor) -> Any:
        ctx.request = request
        ctx.save_for_backward(bars, y0, t, *params)
        return tuple(_replay(request, bars, y0, t, params, create_graph=False)[0])

    @staticmethod
    def backward(ctx: Any, *seconds: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("odeint_adjoint has no third derivatives: call backward without create_graph.")
        bars, y0, t, *params = ctx.saved_tensors
        with torch.enable_grad():
            bars = bars.detach().requires_grad_()
            firsts, inputs = _replay(ctx.request, bars, y0, t, params, create_graph=True)
            pairs = [
                (x, bar) for x, bar in zip(firsts, seconds) if x is not None and bar is not None and x.requires_grad
            ]
            wanted = [x for x in (bars, *inputs) if x.requires_grad]
            found = iter(
                torch.autograd.grad(
                    [x for x, _ in pairs],
                    wanted,
                    [bar for _, bar in pairs],
                    retain_graph=True,
                    allow_unused=True,
                )
            )
        return None, *(next(found) if x.requires_grad else None for x in (bars, *inputs))


class _Backsolve:
    """The adjoint equation of one solve, in one row: time's cotangent, the state, its own, those of parameters."""

    def __init__(self, request: Request, backward: Backward, t: Tensor, timed: bool, params: Sequence[Tensor]) -> None:
        """`t` are the times between which it is solved; `timed` says whether their cotangents are wanted."""
        self.request, self.t, self.timed, self.params = request, t, timed, params
        like = request.y0
        self.width = like.numel()
        y = request.layout.split(request.layout.elements(like).flatten())
        parts = (y,) if isinstance(y, Tensor) else y
        tensors = [x.detach() for x in (like.new_zeros(()), *parts, *parts, *params)]
        layout = _AugmentedLayout(tensors)
        norm, controlled = _read_norm(backward.options, request, len(parts))
        rtol = read_tolerance("rtol", backward.rtol, layout)
        atol = read_tolerance("atol", backward.atol, layout)
        left = {key: value for key, value in backward.options.items() if key != "norm"}
        sign = -1.0 if t[0] < t[-1] else 1.0
        stepping = read_method(backward.method, left, layout.real, sign, float(t[-1]))
        self.zeros = [like.new_zeros((1, as_real(x).numel()), dtype=layout.real) for x in params]
        flat = like.detach().reshape(1, -1)
        row = torch.cat([like.new_zeros((1, 1)), flat, flat, *self.zeros], 1)
        self.solver = Request(
            field=self._field,
            layout=layout,
            y0=row,
            t=t,
            stepping=stepping,
            norm=ErrorNorm(layout, rtol, atol, norm, controlled),
            hooks=read_hooks(SimpleNamespace(**backward.callbacks), backward.method, layout, times_dtype(stepping, t)),
            event=None,
            seen=(lambda t, y: self._field(t, y.unsqueeze(0))[0], row[0]),
        )

    def _field(self, t: Tensor, row: Tensor) -> Tensor:
        y, bar = row.narrow(1, 1, self.width), row.narrow(1, 1 + self.width, self.width)
        with torch.enable_grad():
            # A copy, because complex numbers must not begin at an odd place.
            leaf = y.detach().clone().requires_grad_()
            time = t.detach().requires_grad_(self.timed)
            out = self.request.field(time, leaf.view_as(self.request.y0).to(self.request.y0.dtype))
        inputs = (leaf, *self.params, time) if self.timed else (leaf, *self.params)
        pulled: Sequence[Tensor | None] = (None,) * len(inputs)
        if out.requires_grad:
            pulled = vector_jacobian((out,), inputs, (-bar.view_as(out).to(out.dtype),), True)
        found = [zeros if x is None else as_real(x).reshape(1, -1) for x, zeros in zip(pulled[1:], self.zeros)]
        at_time = pulled[-1] if self.timed else None
        first = row.new_zeros((1, 1)) if at_time is None else at_time.reshape(1, 1)
        return torch.cat(
            [first, out.detach().reshape(1, -1), torch.zeros_like(y) if pulled[0] is None else pulled[0], *found], 1
        )

    def run(self, rows: Tensor, bars: Tensor) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """Cotangents of y0, of the times and of the parameters.

        Args:
            rows: the solution (T, rows, n) at the times.
            bars: its cotangents.

        Raises:
            AssertionError: a solve between two times failed.
        """
        n, t, field = self.width, self.t, self.request.field
        flat, flat_bars = rows.reshape(len(t), 1, n), bars.reshape(len(t), 1, n)
        row = torch.cat([bars.new_zeros((1, 1)), flat[-1], flat_bars[-1], *self.zeros], 1)
        t_bar = torch.zeros_like(t)
        for i in range(len(t) - 1, 0, -1):
            if self.timed:
                moved = (field(t[i].to(rows.dtype), rows[i]) * bars[i]).sum()
                t_bar[i] = moved
                row[0, 0] -= moved
            if t[i] != t[i - 1]:
                solver = dataclasses.replace(self.solver, y0=row, t=t[i - 1 : i + 1].flip(0))
                row = solver.solve()[0][1].clone()
            row[:, 1 : 1 + n] = flat[i - 1]
            row[:, 1 + n : 1 + 2 * n] += flat_bars[i - 1]
        if self.timed:
            t_bar[0] = row[0, 0]
        found = self.solver.layout.split(row[0])[-len(self.params) :] if self.params else ()
        pulled = [x.to(param.dtype) for x, param in zip(found, self.params)]
        y_bar = row[:, 1 + n : 1 + 2 * n].clone().to(bars.dtype).view(bars.shape[1:])
        return y_bar, t_bar if self.timed else None, pulled


class _AugmentedLayout(Layout):
    """Real and complex tensors side by side in a real row."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__(tuple(map(as_real, tensors)))
        self._complex = [x.is_complex() for x in tensors]

    def split(self, elements: Tensor) -> tuple[Tensor, ...]:
        parts = super().split(elements)
        return tuple(torch.view_as_complex(x.clone()) if pair else x for x, pair in zip(parts, self._complex))


def as_real(x: Tensor) -> Tensor:
    """Complex numbers as pairs."""
    return torch.view_as_real(x) if x.is_complex() else x


def _read_norm(options: dict[str, Any], request: Request, count: int) -> tuple[Norm | None, int | None]:
    """The norm of the augmented state, None for the largest of all tensors', and how many tensors count."""
    given, own, single = options.get("norm"), request.norm.norm, request.layout.single
    semi = isinstance(given, str) and given == "seminorm"
    if given is not None and not semi:
        return given, None
    if own is None:
        return None, 1 + 2 * count if semi else None

    def norm(parts: tuple[Tensor, ...]) -> Tensor:
        state, bar, rest = parts[1 : 1 + count], parts[1 + count : 1 + 2 * count], parts[1 + 2 * count :]
        values = [parts[0], *(own(x[0] if single else x) for x in (state, bar))]
        values += [] if semi else [torch.linalg.vector_norm(x) / max(x.numel(), 1) ** 0.5 for x in rest]
        return torch.stack([torch.as_tensor(x).abs().to(parts[0].dtype) for x in values]).max()

    return norm, None
