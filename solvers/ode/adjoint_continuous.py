"""What the continuous adjoints share: cotangents at points in time, and the equation that they obey between these.

The cotangent a(t) of the state obeys da/dt = -(df/dy)^T a, jumps where the result depends on the state, and gives the
derivative with respect to everything that the field uses as the integral of (df/dtheta)^T a.

Source: Chen et al. 2018, "Neural ordinary differential equations"; the integral by Gauss quadrature on accepted steps
after Norcliffe and Deisenroth 2023, "Faster training of neural ODEs using Gauss-Legendre quadrature".
"""

from __future__ import annotations

import abc
import math
import warnings

import torch
from torch import Tensor

from ..options import options, require
from ..solution import AdjointWarning, SolverError, Status
from .adjoint import Adjoint, Outcome, Task, must_tape, plain_solve, taped_outcome
from .adjoint_checkpoint import Segments
from .control import PIDController
from .function import Cotangents, Solve
from .interpolation import polynomial
from .method import Method, Rhs, Time, column
from .problem import Problem, Run, Tolerance
from .sample_steps import SampleSteps
from .shared_steps import SharedSteps
from .stops import Stop, cotangent_stops, pull_mesh
from .tape import Sums, Tape, vector_jacobian
from .times import Times

# Gauss-Legendre nodes and weights on [0, 1], exact for polynomials of degree 5.
_NODES = (0.5 - math.sqrt(0.15), 0.5, 0.5 + math.sqrt(0.15))
_WEIGHTS = (5 / 18, 8 / 18, 5 / 18)
# After so many attempts, and so many for each step that the forward solve took over the interval, it is asked whether
# the budget will do at this pace; and again whenever their number has doubled.
_ATTEMPTS, _ATTEMPTS_PER_STEP = 50, 5


class Refused(Exception):
    """The backward solve has failed; the message says why."""


@options
class ContinuousAdjoint(Adjoint):
    """An adjoint that solves the equation of the cotangents backwards in time.

    First derivatives only carry the error of that solve, which the tolerances control: the norm is over the state and
    its cotangent, and the derivatives with respect to parameters take no part in it. Second derivatives are those of
    the accepted steps of the forward solve.

    Attributes:
        solver: the integrator; None for that of the forward solve.
        rtol, atol: its tolerances; None for those of the forward solve. atol is relative to the largest cotangent
            that arrives, so that the scale of a loss does not matter.
        max_steps: its budget between two output times; None for that of the forward solve. The backward solve fails as
            soon as it has taken several times the steps of the forward one and will, at its pace, not keep to it.
        fallback: where the backward solve fails, warn with an `AdjointWarning` that says why, and take the exact
            derivatives of the accepted steps, repeated from the initial value. Otherwise raise a `SolverError`.
    """

    solver: Method | None = None
    rtol: float | int | None = None
    atol: float | int | None = None
    max_steps: int | None = None
    fallback: bool = True

    def __post_init__(self) -> None:
        """Check the knobs.

        Raises:
            TypeError: `solver` is no integrator.
            ValueError: negative tolerances.
        """
        if self.solver is not None:
            require(self.solver, Method, "solver")
        if (self.rtol or 0) < 0 or (self.atol or 0) < 0:
            raise ValueError(f"rtol and atol must not be negative; got rtol={self.rtol}, atol={self.atol}.")

    def solve(self, task: Task) -> Outcome:
        """Solve forwards; the backward pass solves the equation of the cotangents."""
        if must_tape():
            return taped_outcome(task)
        return self.prepare(task).outcome() if torch.is_grad_enabled() else plain_solve(task)

    @abc.abstractmethod
    def prepare(self, task: Task) -> ContinuousSolve:
        """One solve in this way."""


class ContinuousSolve(Solve):
    """One solve with a continuous adjoint."""

    def __init__(self, task: Task, knobs: ContinuousAdjoint) -> None:
        super().__init__(task)
        self.knobs = knobs

    def forward(self) -> tuple[Tensor, ...]:
        """Find the steps; the results are the final matrix and the dense outputs that were asked for."""
        self.run = run = self.task.run()
        return tuple(x.detach() for x in (run.y, run.dense) if x is not None)

    def backward(self, bars: tuple[Tensor, ...]) -> Cotangents:
        """By the equation of the cotangents, or, where that fails, by the accepted steps."""
        dense_bar = bars[1] if len(bars) > 1 else None
        try:
            return BackwardSolve(self, bars[0], dense_bar).pull()
        except Refused as refusal:
            message = f"solve_ode: {type(self.knobs).__name__}: {refusal}."
            if not self.knobs.fallback:
                raise SolverError(f"{message} Tighten its tolerances or choose adjoint=CheckpointAdjoint().") from None
            warnings.warn(f"{message} Falling back to the derivatives of the accepted steps.", AdjointWarning, 2)
        return Segments(self, dense_bar, recursive=True).pull(bars[0], [(0, self.problem.y0.detach(), ())])

    @abc.abstractmethod
    def adjoint_rhs(self) -> AdjointRhs:
        """The right-hand side of the backward problem."""

    def settle(self, found: Tensor, expected: Tensor, tolerance: Tolerance) -> Tensor:
        """The backward problem's matrix at a time where the state is `expected`, having been integrated to `found`.

        Raises:
            Refused: it has drifted too far away.
        """
        return found


class AdjointRhs(Rhs):
    """Of the backward problem. The last columns of its matrix are the cotangent of the state."""

    __slots__ = ("inner",)

    def __init__(self, inner: Rhs) -> None:
        super().__init__(inner.field, inner.args, inner.spec, inner.batch)
        self.inner = inner

    def split(self, t: Time, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """State and its cotangent, each (batch, n)."""
        raise NotImplementedError

    def join(self, y: Tensor, rate: Tensor, bar: Tensor) -> Tensor:
        """The matrix of a state's derivative, or of the state itself, and a cotangent."""
        raise NotImplementedError

    def __call__(self, t: Time, matrix: Tensor) -> Tensor:
        """The derivative of the matrix; it can itself be differentiated where grad mode is on."""
        self.calls += 1
        y, bar = self.split(t, matrix)
        if torch.is_grad_enabled() and matrix.requires_grad:
            y = y if y.requires_grad else y.detach().requires_grad_()
            rate = self.inner(t, y)
            pulled: Tensor | None = torch.autograd.grad(rate, y, bar, create_graph=True, allow_unused=True)[0]
        else:
            with torch.enable_grad():
                leaf = y.detach().requires_grad_()
                rate = self.inner(t, leaf)
            pulled = vector_jacobian((rate,), (leaf,), (bar,), True)[0] if rate.requires_grad else None
            rate = rate.detach()
        return self.join(y, rate, torch.zeros_like(bar) if pulled is None else -pulled)


class BackwardSolve:
    """The backward pass: interval by interval between the times at which cotangents arrive."""

    def __init__(self, solve: ContinuousSolve, y_bar: Tensor, dense_bar: Tensor | None) -> None:
        assert solve.run is not None
        self.solve, self.problem = solve, solve.problem
        self.run: Run = solve.run
        self.y_bar, self.dense_bar = y_bar, dense_bar
        self.rhs = solve.adjoint_rhs()
        self.sums = Sums(solve.shared, solve.externals)
        self.tape = Tape(solve.inner, self.sums, timed=False)
        knobs, forward = solve.knobs, solve.problem
        self.method = forward.method if knobs.solver is None else knobs.solver
        self.controller = PIDController(per_sample=forward.per_sample, jump_t=forward.controller.jump_t)
        self.tolerance = Tolerance(
            forward.tolerance.rtol if knobs.rtol is None else float(knobs.rtol),
            forward.tolerance.atol if knobs.atol is None else float(knobs.atol),
        )
        if self.method.error_order is None:
            raise Refused(f"{type(self.method).__name__} has no error estimate; give it a solver that has one")
        self.steps: Tensor | int = 0
        self.rejected: Tensor | int = 0
        self.step: Time | None = None
        starts = [torch.as_tensor(taken.t, dtype=torch.float64) for taken in self.run.mesh.steps]
        self._starts = torch.stack(starts) if starts else torch.zeros((0,), dtype=torch.float64)

    def pull(self) -> Cotangents:
        """Cotangents of everything.

        Raises:
            Refused: the backward solve failed.
        """
        if not bool((self.run.status == Status.CONVERGED).all()):
            raise Refused("a sample ended before the last time")
        start = self._plain_time(self.problem.times.values[..., 0])
        here = self._plain_time(self.problem.times.values[..., -1])
        stops = cotangent_stops(self.problem, self.run, self.dense_bar)
        scale = max([float(self.y_bar.abs().max())] + [float(stop.bar.abs().max()) for stop in stops])
        if not math.isfinite(scale):
            raise Refused("a cotangent that is not finite arrived")
        scale = scale or 1.0
        y, bar = self.run.y, self.y_bar / scale
        end_bar = self._time_bar(here, y, bar)
        initial = Stop(start, self.problem.y0.detach(), torch.zeros_like(bar))
        for stop in [*stops, initial]:
            matrix = self._between(here, stop.t, self.rhs.join(y, y, bar), scale)
            y, bar = self.rhs.split(stop.t, self.solve.settle(matrix, stop.y, self.tolerance))
            y, bar = stop.y, bar + stop.bar / scale
            here = stop.t
        # The time before the first is none: the solution is what moves.
        start_bar = self._time_bar(start, y, -bar)
        moved = pull_mesh(self.run, self.dense_bar, self.solve.ends)
        ends = [None if x is None else x * scale for x in (start_bar, end_bar)]
        ends = [x if m is None else m if x is None else x + m for x, m in zip(ends, moved)]
        totals = [None if total is None else total.mul_(scale) for total in self.sums.totals]
        calls = self.rhs.calls + self.sums.evaluations
        return Cotangents(ends[0], ends[1], bar * scale, totals, calls, self.steps, self.rejected)

    def _plain_time(self, t: Tensor) -> Time:
        return t.expand(len(self.problem.y0)) if self.problem.per_sample else float(t)

    def _time_bar(self, t: Time, y: Tensor, bar: Tensor) -> Tensor | None:
        if not self.solve.timed:
            return None
        with torch.no_grad():
            product = (self.solve.inner(t, y) * bar).double()
        self.sums.evaluations += 1
        return product.sum(-1) if self.problem.per_sample else product.sum()

    def _between(self, here: Time, there: Time, matrix: Tensor, scale: float) -> Tensor:
        """The matrix after integration from one time back to another.

        Raises:
            Refused: it failed, or is going to.
        """
        ends = self.problem.times.values
        near = 1e-12 * (ends[..., -1] - ends[..., 0]).abs()
        if isinstance(here, Tensor):
            assert isinstance(there, Tensor)
            # Stops at the two ends of neighbouring steps differ by rounding.
            here = torch.where((here - there).abs() <= near, there, here)
        elif not isinstance(there, Tensor) and abs(here - there) <= float(near):
            return matrix
        most = self.problem.max_steps if self.solve.knobs.max_steps is None else self.solve.knobs.max_steps
        tried, tries, start = 0, _ATTEMPTS + _ATTEMPTS_PER_STEP * self._passed(here, there), here
        while True:
            run = self._run(start, there, matrix, min(tries, most - tried))
            tried, matrix = tried + tries, run.y
            failed = run.status != Status.CONVERGED
            if not bool(failed.any()):
                return matrix
            if tried >= most or not bool((run.status[failed] == Status.MAX_STEPS).all()):
                sample = int(failed.nonzero()[0])
                raise Refused(
                    f"the backward solve of sample {sample} {Status(int(run.status[sample])).meaning} at "
                    f"t = {float(run.reached[sample]):.6g} with a step of {float(run.step[sample]):.3g}"
                )
            start = run.reached if isinstance(here, Tensor) else float(run.reached[0])
            come, way = (torch.as_tensor(x - here, device=matrix.device).abs() for x in (run.reached, there))
            share = torch.where(failed, come / way, 1.0)
            if float(share.min()) * most < tried:
                sample = int(share.argmin())
                goal = float(torch.as_tensor(there).expand(len(failed))[sample])
                raise Refused(
                    f"the backward solve of sample {sample} came to t = {float(run.reached[sample]):.9g} in {tried} "
                    f"attempts, the last of length {float(run.step[sample]):.3g}, and would not come to {goal:.9g} in "
                    f"{most}"
                )
            tries = tried

    def _passed(self, here: Time, there: Time) -> int:
        """How many steps the forward solve took from `there` to `here`, those of the sample that took the most."""
        low, high = (torch.as_tensor(x, dtype=torch.float64, device=self._starts.device) for x in (there, here))
        inside = (self._starts - low).sign() * (self._starts - high).sign() <= 0
        return int(inside.sum(0).max()) if len(inside) else 0

    def _run(self, here: Time, there: Time, matrix: Tensor, attempts: int) -> Run:
        """As far as it comes in so many attempts."""
        ends, listed = self.problem.times.values, None
        if isinstance(here, Tensor):
            assert isinstance(there, Tensor)
            values = torch.stack([here, there], dim=1)
        else:
            values = torch.tensor([here, there], dtype=torch.float64, device=matrix.device)
            listed = values.tolist()
        problem = Problem(
            rhs=self.rhs,
            y0=matrix,
            times=Times(values, values, listed),
            method=self.method,
            controller=self.controller,
            tolerance=self.tolerance,
            max_steps=attempts,
            observe=self._integrate if self.sums.inputs else None,
            first_step=self.step,
        )
        with torch.no_grad():
            run = (SampleSteps if self.problem.per_sample else SharedSteps)(problem, None).run()
        self.steps, self.rejected = self.steps + run.accepted, self.rejected + run.rejected
        if self.problem.per_sample:
            # A sample whose interval was empty keeps its step.
            before = 0.01 * (ends[..., -1] - ends[..., 0]).abs() if self.step is None else self.step
            self.step = torch.where(run.wish == 0, before, run.wish.abs())
        else:
            self.step = abs(float(run.wish[0]))
        return run

    def _integrate(self, t: Time, h: Time, dense: Tensor) -> None:
        """Add an accepted step's share of the integral of (df/dtheta)^T a."""
        for node, weight in zip(_NODES, _WEIGHTS):
            place = torch.full((1,), node, dtype=torch.float64, device=dense.device)
            y, bar = self.rhs.split(t + node * h, polynomial(dense.unsqueeze(0), place)[0])
            with torch.enable_grad():
                record = self.tape.evaluate(t + node * h, y)
            # Time runs backwards here.
            self.tape.pull(record, bar * (-weight * column(h, bar)))
