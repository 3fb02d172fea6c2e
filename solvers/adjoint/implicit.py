"""Implicit differentiation of a rest point, by chord Newton steps of value zero."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from ..fixed_point.broyden import BroydenMemory, InverseJacobian
from ..fixed_point.driver import Carry
from ..fixed_point.method import FixedPointSolver
from ..fixed_point.problem import Problem, TooLargeError, operator_of_recording
from ..linear import Auto, LinearOperator, LinearSolver
from ..options import options, require
from ..solution import AdjointWarning, Solution, SolverError, Stats, Status
from ..transforms import any_true, autocast_to, derivative_levels, inside_transform, no_derivatives, solve_ex
from ..tree import norms
from .base import RestPointAdjoint, forward_level, refuse_batched
from .coupling import coupled, doubtful, solve_jointly

Solve = Callable[[Tensor, bool], Tensor]
"""(right-hand side, transposed) -> solution of A x = b or A^T x = b."""


@options
class ImplicitAdjoint(RestPointAdjoint):
    """Derivatives by the implicit function theorem: memory of one evaluation, whatever the number of steps.

    At r(z*, theta) = 0 with A = -dr/dz, dz*/dtheta = A^{-1} dr/dtheta. The backward pass solves one linear system
    with A^T, applied by vector-Jacobian products of one recorded evaluation.

    Exact up to the two residuals: that of z* and that of the linear solve. Rows that the function couples (batch
    normalisation, attention across the batch) are noticed, since the solve row by row leaves a residual, and are
    then solved jointly.

    Attributes:
        linear_solver: for A^T u = g; any fixed-point method is one, too.
        order: 1 gives first derivatives; a backward pass that would record a graph raises. 2 gives second
            derivatives as well, for one more recorded evaluation. Under torch.func and forward-mode AD, which
            record always, 2 is taken by itself, with an assembled Jacobian.
        reuse: what the backward solve takes over from a forward solve by Broyden: "start" its inverse's answer as
            an initial guess, "precondition" its inverse as a right preconditioner, "only" its answer as it is,
            without any solve (approximate), None nothing.

    Raises:
        TypeError: `linear_solver` is not one.
        ValueError: `order` or `reuse` is not one of the above.
        SolverError (in backward): the Jacobian A is singular at some sample: the theorem's third condition fails.

    Source: Krantz and Parks 2003, The implicit function theorem; Bai, Kolter and Koltun 2019, theorem 1; for
    `reuse`, Ramzi et al. 2022, SHINE.
    """

    linear_solver: LinearSolver = Auto()
    order: Literal[1, 2] = 1
    reuse: Literal["start", "precondition", "only"] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.linear_solver, FixedPointSolver):
            from ..linear import FixedPointLinear

            object.__setattr__(self, "linear_solver", FixedPointLinear(solver=self.linear_solver))
        require(self.linear_solver, LinearSolver, "linear_solver")
        if self.order not in (1, 2):
            raise ValueError(f"ImplicitAdjoint: order must be 1 or 2; got {self.order!r}.")
        if self.reuse not in ("start", "precondition", "only", None):
            raise ValueError(
                f"ImplicitAdjoint: reuse must be 'start', 'precondition', 'only' or None; got {self.reuse!r}."
            )

    def attach(self, problem: Problem, z: Tensor, carry: Carry, report: Callable[[Stats], None]) -> Tensor:
        """z plus a zero whose derivative is A^{-1} dr."""
        if inside_transform() or forward_level():
            return _attach_dense(problem, z)
        inverse = self._forward_inverse(carry)
        with torch.enable_grad():
            leaf = z.detach().requires_grad_()
            point = _Wall.apply(leaf)
            out = problem.output(point)
            if not _reaches_beyond(out, leaf):
                return z
            operator = operator_of_recording(problem, point, out)
            solve = _Solver(self, operator, inverse, report, _resolution(problem, z))
            value = z + self._correct(_residual(problem, out, z), solve)
            if self.order == 2:
                value = value + self._correct(problem.residual(_Second.apply(value)), solve)
        return value

    @property
    def needs_memory(self) -> bool:
        """Only to reuse it."""
        return self.reuse is not None

    def _correct(self, residual: Tensor, solve: Solve) -> Tensor:
        return _Inverse.apply(residual, solve, False, self.order)

    def _forward_inverse(self, carry: Carry) -> InverseJacobian | None:
        if self.reuse is None:
            return None
        if not isinstance(carry.memory, BroydenMemory) or carry.count == 0:
            raise ValueError(
                f"ImplicitAdjoint(reuse={self.reuse!r}) reuses the inverse of a forward solve by Broyden(); "
                "choose that solver, or reuse=None."
            )
        return carry.memory.inverse


def _residual(problem: Problem, out: Tensor, z: Tensor) -> Tensor:
    return -out if problem.root else out - z


def _attach_dense(problem: Problem, z: Tensor) -> Tensor:
    """Chord steps with an assembled, constant Jacobian: made of differentiable operations throughout.

    As many steps as there are derivatives that enclosing transforms can take, and two more for autograd outside.
    """
    with no_derivatives():
        joint = len(z) > 1 and coupled(problem.pullback(z), z)
    try:
        with no_derivatives():
            matrix = problem.jacobian(z, joint)
    except TooLargeError as error:
        if derivative_levels() or forward_level():
            raise
        # Under vmap alone it may well be that nobody asks for the derivative.
        return _Refused.apply(z, problem.residual(z), str(error))
    matrix = matrix.float() if matrix.dtype in (torch.float16, torch.bfloat16) else matrix
    value = z
    for _ in range(max(derivative_levels(), 1) + 2):
        right = problem.residual(value).to(matrix.dtype).reshape(len(matrix), -1, 1)
        step, info = solve_ex(matrix, right)
        step = step.reshape(z.shape).to(z.dtype)
        sound = torch.isfinite(step).all(dim=1, keepdim=True)
        if any_true((info != 0) & torch.isfinite(matrix).flatten(1).all(dim=1)):
            raise SolverError(_SINGULAR.format(sample="some sample"))
        # A broken sample keeps the value that the solve left it with.
        value = torch.where(sound, value + step, value)
    return value


class _Refused(torch.autograd.Function):
    """z, whose derivative is an error."""

    @staticmethod
    def forward(z: Tensor, recorded: Tensor, reason: str) -> Tensor:
        return z.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.reason = inputs[2]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise TooLargeError(ctx.reason)

    @staticmethod
    def vmap(info: Any, dims: tuple[int | None, ...], z: Tensor, recorded: Tensor, reason: str) -> tuple[Tensor, Any]:
        return _Refused.apply(z, recorded, reason), dims[0]


class _Wall(torch.autograd.Function):
    """The identity, through which no gradient passes: A is taken at a constant."""

    @staticmethod
    def forward(ctx: FunctionCtx, z: Tensor) -> Tensor:
        return z.view_as(z)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> None:
        return None


class _Second(torch.autograd.Function):
    """The identity on its way to the second correction, which makes second derivatives exact but not third ones.

    The gradient that passes back through here takes part in every first derivative, and so a backward pass through
    that gradient is a second derivative; if it records a graph, a third one is about to be asked for.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, value: Tensor) -> Tensor:
        ctx.save_for_backward(value)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _First.apply(grads[0], *ctx.saved_tensors)


class _First(torch.autograd.Function):
    """The identity on a gradient; `anchor`, which the parameters lead to, keeps it in the graph of that gradient."""

    @staticmethod
    def forward(ctx: FunctionCtx, grad: Tensor, anchor: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "A second backward pass through ImplicitAdjoint(order=2) was asked to build a graph "
                "(create_graph=True), but it has no third derivative; torch.func's transforms and UnrollAdjoint() do."
            )
        return grads[0], None


class _Inverse(torch.autograd.Function):
    """b -> A^{-1} b, whose backward is itself with A transposed, and so on.

    A step from a rest point is zero, so the first application is not computed: z is returned as it was measured.
    """

    @staticmethod
    def forward(ctx: Any, b: Tensor, solve: Solve, transposed: bool, order: int, needed: bool = False) -> Tensor:
        ctx.solve, ctx.transposed, ctx.order = solve, transposed, order
        return solve(b, transposed) if needed else torch.zeros_like(b)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and ctx.order == 1:
            raise RuntimeError(
                "A backward pass through ImplicitAdjoint(order=1) was asked to build a graph (create_graph=True), "
                "but the second derivative needs ImplicitAdjoint(order=2)."
            )
        refuse_batched(grads[0], "ImplicitAdjoint")
        return _Inverse.apply(grads[0], ctx.solve, not ctx.transposed, ctx.order, True), None, None, None, None


class _Solver:
    """Solves with A and A^T, reports how it went, and complains where it went wrong."""

    def __init__(
        self,
        adjoint: ImplicitAdjoint,
        operator: LinearOperator,
        inverse: InverseJacobian | None,
        report: Callable[[Stats], None],
        resolution: float,
    ) -> None:
        self.adjoint, self.operator, self.inverse, self.report = adjoint, operator, inverse, report
        self.resolution = resolution

    def __call__(self, b: Tensor, transposed: bool) -> Tensor:
        operator = self.operator.T if transposed else self.operator
        right = b.detach().to(operator.dtype)
        healthy = torch.isfinite(right).all(dim=1, keepdim=True)
        if not bool(healthy.all()):
            # A NaN in the loss stays visible in the gradient, as in any backward pass, but only in its row.
            right = torch.where(healthy, right, 0.0)
        with autocast_to(None, b.device):
            solution = self._solve(operator, right, transposed)
        self.report(solution.stats)
        value = solution.value if bool(healthy.all()) else torch.where(healthy, solution.value, float("nan"))
        return value.to(b.dtype)

    def _guess(self, right: Tensor, transposed: bool) -> Tensor | None:
        if self.inverse is None:
            return None
        # H approximates the inverse of dr/dz = -A.
        wide = self.inverse.to(right.dtype)
        return -(wide.apply_transpose(right) if transposed else wide.apply(right))

    def _solve(self, operator: LinearOperator, right: Tensor, transposed: bool) -> Solution[Tensor]:
        adjoint, guess = self.adjoint, self._guess(right, transposed)
        if adjoint.reuse == "only":
            assert guess is not None
            zeros = torch.zeros(len(right), dtype=torch.int64, device=right.device)
            return Solution(guess, Stats(zeros, zeros, norms(right) * float("nan"), zeros + Status.MAX_STEPS))
        if adjoint.reuse == "precondition":
            solution = adjoint.linear_solver.solve(
                operator,
                right,
                preconditioner=lambda v: self._guess(v, transposed),  # type: ignore[arg-type,return-value]
            )
        else:
            solution = adjoint.linear_solver.solve(operator, right, x0=guess)
        loose = self._loose(solution, right)
        # A failure too may come of the rows being coupled.
        suspect = bool(loose.any()) or doubtful(operator, right, solution, self.resolution)
        if suspect and len(right) > 1 and coupled(operator.matvec, right):
            solution = solve_jointly(operator, right, solution, adjoint.linear_solver)
            loose = self._loose(solution, right)
        if bool(loose.any()):
            _complain(solution, loose)
        return solution

    def _loose(self, solution: Solution[Tensor], right: Tensor) -> Tensor:
        """Samples whose solve failed by more than the rounding of its type and of the function explains."""
        rounding = max(torch.finfo(right.dtype).eps ** 0.5, 2 * self.resolution)
        return ~solution.converged & ~(solution.stats.residual <= rounding)


def _resolution(problem: Problem, z: Tensor) -> float:
    """Relative rounding of an evaluation at z: that of its type, or of autocast's."""
    types = (z.dtype,) if problem.autocast is None else (z.dtype, problem.autocast)
    return max(torch.finfo(dtype).eps for dtype in types)


_SINGULAR = (
    "implicit differentiation: the Jacobian at {sample} is singular or not finite, so the third condition of the "
    "implicit function theorem fails and the gradient does not exist there. Look at the point with "
    "restpoint.solvers.diagnose, or choose UnrollAdjoint() or PhantomAdjoint()."
)


_NEARLY_SINGULAR = (
    "The Jacobian may be singular there, where the gradient does not exist: look at the point with "
    "restpoint.solvers.diagnose. Otherwise loosen the tolerance of the adjoint's linear solver, or "
)


def _complain(solution: Solution[Tensor], loose: Tensor) -> None:
    """Raise where A is singular, warn where the backward solve is only less exact than it should be."""
    residual = solution.stats.residual
    broken = loose & ~torch.isfinite(residual)
    if bool(broken.any()):
        raise SolverError(_SINGULAR.format(sample=f"sample {int(broken.nonzero()[0])}"), solution)
    worst = int(torch.where(loose, residual, -1.0).argmax())
    status = Status(int(solution.stats.status[worst]))
    warnings.warn(
        f"implicit differentiation: the backward solve of {int(loose.sum())} of {len(loose)} samples did not reach its "
        f"tolerance (worst: sample {worst}, relative residual {float(residual[worst]):.3g}, {status.name}: it "
        f"{status.meaning}), and the gradient is that much less exact. "
        + (_NEARLY_SINGULAR if status == Status.STAGNATED else "Raise max_steps of the adjoint's linear solver, or ")
        + "choose another one.",
        AdjointWarning,
        stacklevel=2,
    )


def _reaches_beyond(out: Tensor, leaf: Tensor) -> bool:
    """Whether the recording depends on anything that requires grad beside `leaf`."""
    if out.grad_fn is None:
        # A function may return one of its inputs as it is.
        return out.requires_grad and out is not leaf
    seen, pending = set(), [out.grad_fn]
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and variable is not leaf:
            return True
        # A reentrant checkpoint hides what it uses. In the backward pass it refuses to be used this way.
        if node.name() == "CheckpointFunctionBackward":
            return True
        pending.extend(parent for parent, _ in node.next_functions if parent is not None)
    return False
