"""The monotone layer: z = relu(W z + b), found by operator splitting, with exact gradients at constant memory."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...solvers import ImplicitAdjoint, Picard, Solution, Status, fixed_point
from ...solvers.fixed_point import FixedPointSolver
from ...solvers.fixed_point.api import AnyAdjoint
from ...solvers.options import options, require
from ...solvers.transforms import any_true, not_compiled
from ..deq.layer import Problem
from .operators import Assembled, Certificate, MonotoneOperator, State

Step = Callable[[State, State], State]


def _combine(function: Callable[..., Tensor], *states: State) -> State:
    return pytree.tree_map(function, *states)


class Splitting(abc.ABC):
    """How z = relu(W z + b) becomes an iteration that converges where z <- relu(W z + b) need not."""

    def start(self, injection: State) -> State:
        """The iterate that a solve begins with."""
        return _combine(torch.zeros_like, injection)

    @abc.abstractmethod
    def step(self, operator: MonotoneOperator, weights: Assembled) -> Step:
        """One step as a function of the iterate and the injection.

        Raises:
            ValueError: the operator lacks what the splitting needs.
        """

    def rest_point(self, iterate: State) -> State:
        """The layer's output at an iterate."""
        return iterate


@options
class ForwardBackward(Splitting):
    """z <- relu(z - alpha ((I - W) z - b)): one product with W a step, for every operator.

    Attributes:
        alpha: the step; the iteration contracts for 0 < alpha < 2 m / |I - W|^2. None takes the certified
            m / |I - W|^2, which always converges and mostly is far too careful: larger ones are found by trying.

    Raises:
        ValueError: alpha is not positive.

    Source: Winston and Kolter 2020, equation 8.
    """

    alpha: float | None = None

    def __post_init__(self) -> None:
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(f"ForwardBackward: alpha must be positive; got {self.alpha}.")

    def step(self, operator: MonotoneOperator, weights: Assembled) -> Step:
        """See `Splitting`."""
        alpha = operator.certificate().step if self.alpha is None else self.alpha

        def step(z: State, b: State) -> State:
            return _combine(lambda z, wz, b: torch.relu((1 - alpha) * z + alpha * (wz + b)), z, weights.apply(z), b)

        return step


@options
class PeacemanRachford(Splitting):
    """Reflections u <- (2 V - I)(2 relu(u) - u) + 2 alpha V b, with V = (I + alpha (I - W))^{-1} and z = relu(u).

    Converges for every alpha > 0, and in fewer steps than forward-backward splitting; needs an operator with a
    resolvent, which is computed once a solve.

    Attributes:
        alpha: the step.

    Raises:
        ValueError: alpha is not positive.

    Source: Winston and Kolter 2020, section 3.2 and algorithm 2.
    """

    alpha: float = 1.0

    def __post_init__(self) -> None:
        if not self.alpha > 0:
            raise ValueError(f"PeacemanRachford: alpha must be positive; got {self.alpha}.")

    def step(self, operator: MonotoneOperator, weights: Assembled) -> Step:
        """See `Splitting`."""
        if weights.resolvent is None:
            raise ValueError(
                f"PeacemanRachford: {type(operator).__name__} has no resolvent in closed form; "
                "choose splitting=ForwardBackward()."
            )
        resolvent, alpha = weights.resolvent(self.alpha), self.alpha

        def step(u: State, b: State) -> State:
            reflected = _combine(lambda u: 2 * torch.relu(u) - u, u)
            resolved = resolvent(_combine(lambda r, b: r + alpha * b, reflected, b))
            return _combine(lambda v, r: 2 * v - r, resolved, reflected)

        return step

    def rest_point(self, iterate: State) -> State:
        """See `Splitting`."""
        return _combine(torch.relu, iterate)


@dataclasses.dataclass(frozen=True)
class MonotoneProblem(Problem):
    """z = relu(W z + b), with the iteration that solves it.

    Attributes:
        step: one step of the splitting, of its iterate and the injection.
        rest_point: from the iterate to z.
    """

    step: Callable[..., State]
    rest_point: Callable[[State], State]


class MonotoneDEQ(nn.Module):
    """The unique z = relu(W z + b) for an operator W that is monotone by construction.

    There is one rest point for every injection b, whatever the parameters: `certificate` says how well conditioned
    it is. The gradient is the implicit one, of memory independent of the number of steps. Computed in float32 where
    autocast brings less, for the guarantees are about exact arithmetic.

    Args:
        operator: W; its kind says what a state is.
        splitting: `PeacemanRachford()` where the operator has a resolvent, `ForwardBackward()` for any; None takes
            the first of these that is possible.
        solver: what repeats the splitting's step: `Picard()` is the published iteration, `Anderson()` accelerates it.
        adjoint: how the rest point is differentiated.
        rtol, atol, max_steps: of `fixed_point`, for the splitting's iterate.

    Raises:
        TypeError: an argument of the wrong kind.

    Source: Winston and Kolter 2020, Monotone operator equilibrium networks.

    Example:
        >>> layer = MonotoneDEQ(DenseOperator(8, margin=0.5))
        >>> layer(torch.randn(4, 8)).shape
        torch.Size([4, 8])
    """

    def __init__(
        self,
        operator: MonotoneOperator,
        *,
        splitting: Splitting | None = None,
        solver: FixedPointSolver | None = None,
        adjoint: AnyAdjoint | None = None,
        rtol: float = 1e-4,
        atol: float = 0.0,
        max_steps: int = 100,
    ) -> None:
        super().__init__()
        require(operator, MonotoneOperator, "operator")
        if splitting is not None:
            require(splitting, Splitting, "splitting")
        self.operator = operator
        self.splitting = splitting
        self.solver = Picard() if solver is None else solver
        self.adjoint = ImplicitAdjoint() if adjoint is None else adjoint
        self.rtol, self.atol, self.max_steps = rtol, atol, max_steps

    @not_compiled
    def forward(self, injection: State) -> State:
        """The rest point z of the shapes of `injection`; NaN for a sample whose solve met a NaN or an infinity."""
        solution = self.solve(injection)
        broken = solution.stats.status == int(Status.NON_FINITE)
        if not any_true(broken):
            return solution.value
        return _combine(lambda z: torch.where(broken.view(-1, *[1] * (z.ndim - 1)), float("nan"), z), solution.value)

    @not_compiled
    def solve(self, injection: State) -> Solution[Any]:
        """The rest point as a Solution; its residuals are those of the splitting's iterate."""
        return self.solve_problem(self.problem(injection))

    def problem(self, injection: State) -> MonotoneProblem:
        """z = relu(W z + b) as `restpoint.solvers.diagnose` takes it; the operator is assembled here, once.

        Raises:
            ValueError: the injection does not fit the operator, or the operator the splitting.
        """
        injection = _combine(lambda b: b.float() if b.dtype in (torch.float16, torch.bfloat16) else b, injection)
        leaves, structure = pytree.tree_flatten(injection)
        device = leaves[0].device.type if leaves else "cpu"
        with torch.autocast(device, enabled=False):
            weights = self.operator.assemble(injection)
            splitting = self.splitting
            if splitting is None:
                splitting = ForwardBackward() if weights.resolvent is None else PeacemanRachford()
            step = splitting.step(self.operator, weights)

        def exactly(function: Step) -> Callable[..., State]:
            def evaluate(z: State, *b: Tensor) -> State:
                with torch.autocast(device, enabled=False):
                    return function(z, pytree.tree_unflatten(list(b), structure))

            return evaluate

        def equation(z: State, b: State) -> State:
            return _combine(lambda wz, b: torch.relu(wz + b), weights.apply(z), b)

        return MonotoneProblem(
            exactly(equation), splitting.start(injection), tuple(leaves), exactly(step), splitting.rest_point
        )

    def solve_problem(self, problem: Problem) -> Solution[Any]:
        """The solution of what `problem` returned.

        Raises:
            TypeError: the problem is of another layer.
        """
        if not isinstance(problem, MonotoneProblem):
            raise TypeError(f"MonotoneDEQ: expected a problem of its own; got {type(problem).__name__}.")
        solution = fixed_point(
            problem.step,
            problem.z0,
            problem.args,
            solver=self.solver,
            adjoint=self.adjoint,
            rtol=self.rtol,
            atol=self.atol,
            max_steps=self.max_steps,
        )
        # The solver's memory is of the iterate and no start for another solve from z.
        solution.value, solution.warm = problem.rest_point(solution.value), None
        return solution

    def certificate(self) -> Certificate:
        """Margin, norm bound and sensitivity of the operator: see `Certificate`."""
        return self.operator.certificate()

    def extra_repr(self) -> str:
        """The options, for repr()."""
        names = ("splitting", "solver", "adjoint", "rtol", "atol", "max_steps")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
