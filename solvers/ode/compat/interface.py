"""`odeint` and `odeint_event` with the signatures and the meaning of torchdiffeq's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .layout import Layout, State
from .methods import FOREIGN
from .request import Func, Request, checked_method, combined_event, read_request


def odeint(
    func: Func,
    y0: Any,
    t: Tensor,
    *,
    rtol: Any = 1e-7,
    atol: Any = 1e-9,
    method: str | None = None,
    options: dict[str, Any] | None = None,
    event_fn: Func | None = None,
) -> Any:
    """Solve dy/dt = func(t, y) from y(t[0]) = y0: torchdiffeq's function of this name, on this library's integrators.

    Every argument means what it means there. What differs is how: the last step ends at t[-1] instead of beyond it,
    gradients are those of the accepted steps, replayed from kept states (memory grows with the square root of their
    number), and second derivatives exist. Write `solve_ode` in new code: it has steps per sample, further methods and
    adjoints, and says how a solve went.

    Args:
        func: dy/dt of a 0-dim time and the state. Its attributes `callback_step`, `callback_accept_step` and
            `callback_reject_step`, if it has them, are called with (t, y, dt) at each step.
        y0: initial state, a tensor of any shape or a tuple of tensors.
        t: (T,) output times, strictly monotone in either direction.
        rtol, atol: relative and absolute tolerance: numbers, tensors that broadcast to y0, or a tuple of these, one
            for each tensor of y0.
        method: dopri8, dopri5 (the default), bosh3, fehlberg2, adaptive_heun; euler, midpoint, heun2, heun3, rk4 with
            fixed steps; explicit_adams, implicit_adams, fixed_adams and scipy_solver, which torchdiffeq itself runs.
        options: adaptive methods: norm, min_step, max_step, first_step, step_t, jump_t, safety, ifactor, dfactor,
            max_num_steps (for each output time), dtype (of times). Fixed steps: step_size or grid_constructor, interp
            ("linear" or "cubic"), perturb. Others are reported by a warning.
        event_fn: of time and state; the solve ends where an entry of it crosses zero, and only t[0] and the direction
            of `t` matter. See `odeint_event` for derivatives of the event's time.

    Returns:
        The state at the output times, stacked in front: (T, *shape) for each tensor of y0. With `event_fn` the time of
        the event, 0-dim, and the state at t[0] and at the event.

    Raises:
        ValueError: an unknown method, or options that exclude each other.
        AssertionError: arguments of the wrong kind, a step below the resolution of time, or max_num_steps used up.
        TypeError: times that are not floating-point.

    Source: Chen 2018, torchdiffeq, version 0.2.5.
    """
    method = checked_method(method)
    if method in FOREIGN:
        import torchdiffeq

        given = {"rtol": rtol, "atol": atol, "method": method, "options": options, "event_fn": event_fn}
        return torchdiffeq.odeint(func, y0, t, **given)
    request = read_request(func, y0, t, rtol, atol, method, options, event_fn)
    rows, time = request.solve()
    return as_answer(request, rows, time)


def as_answer(request: Request, rows: Tensor, time: Tensor | None) -> Any:
    """What the caller gets, from matrices (T, rows, n) and the time of the event, if one was asked for."""
    solution = request.layout.split(request.layout.elements(rows).flatten(1))
    return solution if time is None else (time.to(request.t), solution)


def odeint_event(
    func: Func,
    y0: Any,
    t0: Tensor,
    *,
    event_fn: Func,
    reverse_time: bool = False,
    odeint_interface: Callable[..., Any] = odeint,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Solve until an event, with derivatives of its time: torchdiffeq's function of this name.

    Beyond torchdiffeq, the tensors that `event_fn` uses, such as the parameters of a learned event, get their
    derivatives too. Second derivatives raise.

    Args:
        func: as in `odeint`.
        y0: initial state.
        t0: initial time, a tensor with one entry.
        event_fn: of time and state; the solve ends where an entry of it crosses zero.
        reverse_time: integrate towards earlier times.
        odeint_interface: `odeint` or `odeint_adjoint`.
        **kwargs: for `odeint_interface`.

    Returns:
        The time of the event, 0-dim, and the state at t0 and at the event.

    Raises:
        ValueError, AssertionError, TypeError: as `odeint_interface` does.
        RuntimeError: a second derivative was asked for.

    Source: Chen, Amos, Nickel 2021, "Learning neural event functions for ordinary differential equations".
    """
    start = t0.reshape(-1)
    t = torch.cat([start, start.detach() + (-1.0 if reverse_time else 1.0)])
    time, solution = odeint_interface(func, y0, t, event_fn=event_fn, **kwargs)
    layout = Layout(y0)
    tensors = (solution,) if layout.single else solution
    states = tuple(tensor[-1] for tensor in tensors)
    event = combined_event(event_fn, t[0], y0)
    whole = states[0] if layout.single else states
    value = event(time.detach(), whole)
    time, *states = _AtEvent.apply(func, event, layout, time, value, *states)
    joined = tuple(torch.cat([tensor[:-1], state.unsqueeze(0)]) for tensor, state in zip(tensors, states))
    return time, joined[0] if layout.single else joined


class _AtEvent(torch.autograd.Function):
    """Time and state at an event, as functions of the state at that time in a solve that goes on, by dt = -dc / c'.

    Source: Chen, Amos, Nickel 2021, section 3.
    """

    @staticmethod
    def forward(
        ctx: Any, func: Func, event: Func, layout: Layout, time: Tensor, value: Tensor, *states: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.func, ctx.event, ctx.layout = func, event, layout
        ctx.save_for_backward(time, *states)
        return time.clone(), *(state.clone() for state in states)

    @staticmethod
    def backward(ctx: Any, time_bar: Tensor, *state_bars: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("odeint_event has no second derivatives: call backward without create_graph.")
        time, *states = ctx.saved_tensors
        layout = ctx.layout
        flow = _tensors(ctx.func(time.to(layout.real), _state(layout, states)))
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (time, *states)]
            value = ctx.event(leaves[0], _state(layout, leaves[1:]))
            pulled = (
                torch.autograd.grad(value, leaves, allow_unused=True) if value.requires_grad else [None] * len(leaves)
            )
        rate = 0.0 if pulled[0] is None else pulled[0].double()
        for bar, speed in zip(pulled[1:], flow):
            if bar is not None:
                rate = rate + _product(bar, speed)
        at_time = time_bar.double()
        for bar, speed in zip(state_bars, flow):
            at_time = at_time + _product(bar, speed)
        value_bar = (-at_time / (rate + 1e-12)).to(value.dtype)
        return None, None, None, None, value_bar, *state_bars


def _state(layout: Layout, tensors: Any) -> State:
    return tensors[0] if layout.single else tuple(tensors)


def _tensors(state: Any) -> tuple[Tensor, ...]:
    return (state,) if isinstance(state, Tensor) else tuple(state)


def _product(bar: Tensor, speed: Tensor) -> Tensor:
    """The real inner product, in float64."""
    return (bar.conj() * speed).real.double().sum() if bar.is_complex() else (bar * speed).double().sum()
