"""What `odeint` is asked for, checked and brought into one form, and the solve itself."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...adjoint.shared import CheckpointAdjoint
from ...transforms import no_derivatives, plain
from ...tree import flatten
from ..adjoint import DirectAdjoint, Outcome, Task, must_tape, taped
from ..adjoint_checkpoint import CheckpointedTrajectory
from ..control import ConstantController
from ..externals import computed_attributes
from ..interpolation import polynomial
from ..method import Method, Rhs
from ..problem import Keeper, Problem, Run, Tolerance
from ..times import Times
from .adaptive import AdaptiveSteps, Hook, Hooks, horner
from .fixed import FixedSteps, FixedStepsToEvent, make_grid, recorded
from .layout import ErrorNorm, Layout, Norm, State
from .methods import ADAPTIVE, CALLBACKS, CLASSES, Adaptive, Fixed, Given, read_method

Func = Callable[[Tensor, Any], Any]
Field = Callable[[Tensor, Tensor], Tensor]


def checked_times(t: Any) -> Tensor:
    """`t`, if it is a tensor (T,) of strictly monotone times.

    Raises:
        AssertionError, TypeError: it is not, as in torchdiffeq.
    """
    assert isinstance(t, Tensor), "t must be a torch.Tensor"
    if not t.is_floating_point():
        raise TypeError(f"`t` must be a floating point Tensor but is a {t.type()}")
    assert t.ndim == 1, f"t must be one dimensional; its shape is {tuple(t.shape)}"
    steps = t.detach().diff()
    monotone = bool((steps > 0).all()) or bool((steps < 0).all())
    assert monotone, "t must be strictly increasing or decreasing"
    return t


def checked_method(method: str | None) -> str:
    """The name of a method, dopri5 where there is none.

    Raises:
        ValueError: an unknown name.
    """
    method = "dopri5" if method is None else method
    if method not in CLASSES:
        names = '", "'.join(CLASSES)
        raise ValueError(f'Invalid method "{method}". Must be one of {{"{names}"}}.')
    return method


def read_tolerance(name: str, tolerance: Any, layout: Layout) -> Any:
    """A number, or a matrix (rows, entries) of numbers."""
    assert not (isinstance(tolerance, Tensor) and tolerance.requires_grad), f"{name} cannot require gradient"
    if not layout.single:
        try:
            parts = tuple(tolerance)
        except TypeError:
            return float(tolerance)
        assert len(parts) == len(layout.shapes), (
            f"If using tupled {name} it must have the same length as the tuple y0: {len(layout.shapes)}, not "
            f"{len(parts)}"
        )
        rows = [torch.as_tensor(part).reshape(-1).expand(size) for part, size in zip(parts, layout.sizes)]
        return torch.cat(rows).to(layout.real).to(layout.device).unsqueeze(0)
    if isinstance(tolerance, Tensor) and tolerance.ndim:
        return (
            tolerance.to(layout.device, layout.real)
            .expand(layout.shapes[0])
            .reshape(layout.matrix if not layout.dtype.is_complex else (1, -1))
        )
    return float(tolerance)


def combined_event(event: Func, t: Tensor, y: State) -> Func:
    """One function, positive at the start, that is zero where any entry of `event` is."""
    with torch.no_grad():
        signs = torch.sign(event(t, y))
    return lambda t, y: torch.min(event(t, y) * signs)


@dataclasses.dataclass(frozen=True)
class Request:
    """One solve.

    Attributes:
        field: the caller's function on matrices.
        layout: of the state.
        y0: as a matrix (rows, n).
        t: output times (T,); for an event only the first one and the direction count.
        stepping: the integrator and its options.
        norm: of errors.
        hooks: what the function wants to be told.
        event: combined event function of t and the state, or None.
        seen: field and initial value as a caller's grid constructor sees them: flat where the state is a tuple.
    """

    field: Field
    layout: Layout
    y0: Tensor
    t: Tensor
    stepping: Adaptive | Fixed
    norm: ErrorNorm
    hooks: Hooks
    event: Func | None
    seen: tuple[Func, Tensor]

    def problem(self) -> Problem:
        """For the adjoints. What lies in the rows of a matrix takes its steps together."""
        method: Method
        if isinstance(self.stepping, Adaptive):
            method = self.stepping.method
        else:
            method = Given(self.stepping.tableau)
        values = self.t.detach().double()
        return Problem(
            rhs=Rhs(self.field, (), flatten(self.y0)[1], len(self.y0)),
            y0=self.y0,
            times=Times(self.t, values, values.tolist()),
            method=method,
            controller=ConstantController(dt=1.0),
            tolerance=Tolerance(0.0, 1.0),
            max_steps=0,
        )

    def solve(self) -> tuple[Tensor, Tensor | None]:
        """The matrices at the output times (T, rows, n), and for an event its time, in float64; then T is 2."""
        if isinstance(self.stepping, Fixed) and self.event is None:
            grid = make_grid(self.stepping, *self.seen, self.t)
            if self.stepping.perturb or grid.requires_grad or self.t.requires_grad or must_tape():
                rhs = self.problem().rhs
                return torch.stack(recorded(rhs, self.stepping, grid, self.y0, self.t, self.hooks)), None
        else:
            grid = None
        task = RequestedTask(self.problem(), lambda stats: None, self, grid, Findings())
        if len(self.t) == 1:
            return self.y0.unsqueeze(0), None
        outcome = task.solve()
        first = self.y0.unsqueeze(0)
        if self.event is None:
            return torch.cat([first, *_inner_rows(task, outcome), outcome.y.unsqueeze(0)]), None
        located = task.findings.located
        assert located is not None
        time = torch.tensor(located, dtype=torch.float64, device=self.y0.device)
        if outcome.dense is None:
            return torch.cat([first, first]), time
        last = torch.tensor([len(outcome.run.mesh.steps) - 1])
        start, h = outcome.run.mesh.all_times(last, task.start, None)
        theta = ((time - start) / h).to(self.y0.dtype)
        return torch.cat([first, horner(outcome.dense[0], theta).unsqueeze(0)]), time


@dataclasses.dataclass
class Findings:
    """What a driver found beside its run.

    Attributes:
        located: when the event happened.
        noisy: whether the field drew random numbers after its first evaluation.
    """

    located: float | None = None
    noisy: bool = False


@dataclasses.dataclass
class RequestedTask(Task):
    """A request as the adjoints see it.

    Attributes:
        request: what was asked for.
        grid: the times of fixed steps.
        findings: filled by the driver.
    """

    request: Request
    grid: Tensor | None
    findings: Findings

    @property
    def end(self) -> Tensor | None:
        """No derivative is wanted with respect to the last time where an event ends the solve."""
        return None if self.request.event is not None else super().end

    def solve(self) -> Outcome:
        """With derivatives of the accepted steps where any are wanted."""
        if torch.is_grad_enabled() and computed_attributes(self.problem.rhs.field):
            # Which of them are used, and when, only a recording tells.
            return DirectAdjoint().solve(self)
        outcome = CheckpointedTrajectory(CheckpointAdjoint()).solve(self)
        if self.findings.noisy and outcome.y.requires_grad and not must_tape():
            # A replay in the backward pass would meet other noise; this one's noise is recorded with it.
            return taped(self.problem, outcome.run, self.start, self.end)
        return outcome

    def run(self, keeper: Keeper | None = None) -> Run:
        """By the driver that the options ask for."""
        request, problem = self.request, self.problem
        with no_derivatives():
            driver: AdaptiveSteps | FixedSteps | FixedStepsToEvent
            if isinstance(request.stepping, Adaptive):
                driver = AdaptiveSteps(problem, request.stepping, request.norm, request.hooks, keeper, self._event())
            elif self.grid is not None:
                driver = FixedSteps(problem, request.stepping, self.grid, request.hooks, keeper)
            else:
                event = self._event()
                assert event is not None
                driver = FixedStepsToEvent(problem, request.stepping, keeper, event, request.norm.atol)
            before = _generator_state(request.y0.device)
            run = driver.run()
            self.findings.noisy = not torch.equal(before, _generator_state(request.y0.device))
            self.findings.located = getattr(driver, "located", None)
        return run

    def _event(self) -> Callable[[float, Tensor], float] | None:
        event, layout, t = self.request.event, self.request.layout, self.request.t
        if event is None:
            return None
        dtype = self.request.stepping.dtype if isinstance(self.request.stepping, Adaptive) else layout.real

        def at(time: float, y: Tensor) -> float:
            return float(plain(event(torch.tensor(time, dtype=dtype, device=t.device), layout.unpack(y))))

        return at


def _inner_rows(task: RequestedTask, outcome: Outcome) -> list[Tensor]:
    """The matrices at the output times but the first and the last, (T - 2, rows, n), if there are any."""
    if outcome.dense is None:
        return []
    run = outcome.run
    assert not isinstance(run.mesh.picks, Tensor)
    steps = torch.tensor(run.mesh.picks, device=run.places.device)[run.places]
    start, h = run.mesh.all_times(steps, task.start, task.end)
    theta = (task.request.t[1:-1].double() - start) / h
    return [polynomial(outcome.dense[run.places], theta)]


def _generator_state(device: torch.device) -> Tensor:
    if device.type == "cuda":
        return torch.cat([torch.get_rng_state(), torch.cuda.get_rng_state(device)])
    return torch.get_rng_state()


def read_request(
    func: Func,
    y0: Any,
    t: Any,
    rtol: Any,
    atol: Any,
    method: str,
    options: dict[str, Any] | None,
    event_fn: Func | None,
) -> Request:
    """Check the arguments of `odeint` for a native method.

    Raises:
        AssertionError, TypeError, ValueError: as torchdiffeq does.
    """
    if event_fn is not None:
        if len(t) != 2:
            raise ValueError(f"We require len(t) == 2 when in event handling mode, but got len(t)={len(t)}.")
        event_fn = combined_event(event_fn, t[0], y0)
    assert isinstance(y0, (Tensor, tuple)), "y0 must be either a torch.Tensor or a tuple"
    layout = Layout(y0, broadcasts=method not in ADAPTIVE)
    left = dict(options or {})
    norm: Norm | None = left.pop("norm", None)
    t = checked_times(t)
    errors = ErrorNorm(layout, read_tolerance("rtol", rtol, layout), read_tolerance("atol", atol, layout), norm)
    if t.device != layout.device:
        warnings.warn("t is not on the same device as y0. Coercing to y0.device.", stacklevel=3)
        t = t.to(layout.device)
    sign = -1.0 if len(t) > 1 and bool(t[0] > t[1]) else 1.0
    stepping = read_method(method, left, layout.real, sign, float(t[0].detach()))
    hooks = read_hooks(func, method, layout, times_dtype(stepping, t))

    field = _on_matrices(func, layout)

    def flat(t: Tensor, y: Tensor) -> Tensor:
        return layout.elements(field(t, layout.join([y]))).flatten()

    matrix = layout.pack(y0)
    seen = (func, y0) if isinstance(y0, Tensor) else (flat, layout.elements(matrix).flatten())
    return Request(field, layout, matrix, t, stepping, errors, hooks, event_fn, seen)


def _on_matrices(func: Func, layout: Layout) -> Field:
    """The caller's function on matrices."""
    shape, matrix, dtype = layout.shapes[0], layout.matrix, layout.real

    def in_general(t: Tensor, y: Tensor) -> Tensor:
        return layout.pack(func(t, layout.unpack(y)))

    def on_tensors(t: Tensor, y: Tensor) -> Tensor:
        out = func(t, y.view(shape))
        return out.reshape(matrix) if out.shape == shape and out.dtype is dtype else layout.pack(out)

    def on_matrices(t: Tensor, y: Tensor) -> Tensor:
        # Without a recording `y` is the integrator's own, whose requires_grad a function may set: it gets a view.
        out = func(t, y if torch.is_grad_enabled() else y.view(shape))
        return out if out.shape == shape and out.dtype is dtype else layout.pack(out)

    if not layout.single or layout.dtype is not dtype:
        return in_general
    return on_matrices if matrix == shape else on_tensors


def times_dtype(stepping: Adaptive | Fixed, t: Tensor) -> torch.dtype:
    """Of the times that callbacks are given."""
    return stepping.dtype if isinstance(stepping, Adaptive) else t.dtype


def read_hooks(func: object, method: str, layout: Layout, dtype: torch.dtype) -> Hooks:
    """The callbacks that `func` has as attributes, `dtype` being that of their times."""
    given = {name: hook for name in CALLBACKS if (hook := getattr(func, name, None)) is not None}
    known = CALLBACKS if method in ADAPTIVE else CALLBACKS[:1]
    if unknown := set(given) - set(known):
        warnings.warn(f"Solver '{method}' does not support callbacks {unknown}", stacklevel=4)

    def on_matrix(name: str) -> Hook | None:
        if name not in given:
            return None

        def hook(t: float, y: Tensor, h: float) -> None:
            time, length = (torch.tensor(x, dtype=dtype, device=layout.device) for x in (t, h))
            given[name](time, layout.unpack(y), length)

        return hook

    return Hooks(*(on_matrix(name) if name in known else None for name in CALLBACKS))
