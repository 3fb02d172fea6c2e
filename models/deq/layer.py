"""The equilibrium layer: any module or function f(z, x) becomes a layer whose output is its rest point."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...solvers import Anderson, ImplicitAdjoint, Solution, StateError, Status, fixed_point
from ...solvers.diagnose import correction_indices, intermediate_states
from ...solvers.fixed_point import FixedPointSolver
from ...solvers.fixed_point.api import AnyAdjoint, check_options, default_solver
from ...solvers.options import check_integer, check_real, spelled
from ...solvers.transforms import any_true, not_compiled
from .. import norms
from ..dropout import MaskShape, active_dropouts, inside_solve, recording, replaying

State = Any
Start = Callable[[Any], State]


@dataclasses.dataclass(frozen=True)
class Problem:
    """One fixed-point problem as the solver sees it: z = f(z, *args), from z0."""

    f: Callable[..., State]
    z0: State
    args: tuple[Any, ...]


class DEQ(nn.Module):
    """A deep equilibrium layer: x is mapped to the z with z = cell(z, x).

    train() and eval() find the same rest point (dropout apart) and both have gradients. The layer keeps nothing from
    one call to the next, so it may be used several times in one graph; `solve` returns how a solve went.

    Args:
        cell: f(z, x) -> z, an nn.Module or a function. z and x are tensors, or tuples, lists or dicts of them, with
            the batch in front; sample i of the result depends on sample i of z and x alone.
        solver: a fixed-point solver of `restpoint.solvers`; None takes `Anderson()`, or what the adjoint needs.
        adjoint: how the rest point is differentiated.
        rtol: tolerance on |f(z) - z|, relative to |f(z)|, per sample.
        atol: absolute tolerance, added to it.
        max_steps: budget of solver steps.
        state: where a solve starts: None for zeros like x, a shape without the batch for zeros of that shape, or a
            function of x that returns z0.
        norm: "weight" or "spectral" normalises every linear and convolution weight of the cell by torch's
            parametrizations; the weights are then computed once a solve.
        dropout: probability of variational dropout on the state that the cell sees: one mask a solve, drawn anew at
            every forward pass in training. For dropout inside the cell use `VariationalDropout` there.
        supervise: number of intermediate states, spread over each sample's own steps, that `solve` returns as
            `solution.trajectory` for a loss of their own. Each carries the gradient of one evaluation.
        throw: what to do when samples do not converge: True raises, "warn" warns, False leaves it to the statistics.

    Raises:
        TypeError: the cell cannot be called, or `solver` or `adjoint` is not one.
        ValueError: an option out of range, or a cell with torch's dropout or batch normalisation, which are not one
            map per sample.

    Source: Bai, Kolter and Koltun 2019; variational dropout section 4 there; intermediate states with one-step
    gradients: Bai et al. 2022 (fixed-point correction, equation 7).

    Example:
        >>> layer = DEQ(lambda z, x: torch.tanh(0.5 * z + x))
        >>> layer(torch.ones(4, 3)).shape
        torch.Size([4, 3])
    """

    @spelled
    def __init__(
        self,
        cell: Callable[[State, Any], State],
        *,
        solver: FixedPointSolver | None = None,
        adjoint: AnyAdjoint | None = None,
        rtol: float = 1e-4,
        atol: float = 0.0,
        max_steps: int = 50,
        state: tuple[int, ...] | Start | None = None,
        norm: str | None = None,
        dropout: float = 0.0,
        supervise: int = 0,
        throw: bool | str = False,
    ) -> None:
        super().__init__()
        if not callable(cell):
            raise TypeError(f"DEQ: cell must be an nn.Module or a function f(z, x); got {type(cell).__name__}.")
        check_real("DEQ: ", "dropout", dropout, lambda p: 0 <= p < 1, "in [0, 1)")
        if norm is not None and not isinstance(cell, nn.Module):
            raise ValueError(f"DEQ: norm={norm!r} needs a cell that is an nn.Module; got {type(cell).__name__}.")
        if isinstance(cell, nn.Module):
            _refuse_unsteady(cell)
        self.cell = cell
        self.adjoint = ImplicitAdjoint() if adjoint is None else adjoint
        self.solver = default_solver(self.adjoint, Anderson()) if solver is None else solver
        budget = check_options(self.solver, self.adjoint, rtol, atol, max_steps, throw)
        self.rtol, self.atol, self.max_steps = budget.rtol, budget.atol, budget.max_steps
        self.state = state
        self.norm = norm
        self.dropout = dropout
        self.supervise = check_integer("DEQ: ", "supervise", supervise, least=0)
        self.throw = throw
        self._normalised = norms.normalise(cell, norm) if norm is not None and isinstance(cell, nn.Module) else []

    @not_compiled
    def forward(self, x: Any, z0: State | Solution[Any] | None = None) -> State:
        """The rest point of cell(., x).

        Args:
            x: what the cell sees besides the state; batch in front.
            z0: where to start, or an earlier Solution to start from; None for what the option `state` says.

        Returns:
            z*, of the structure of z0, differentiable as the adjoint allows. A sample whose solve met a NaN or an
            infinity is NaN, since no statistics come along to tell; `solve` has both.
        """
        solution = self.solve(x, z0)
        broken = solution.stats.status == int(Status.NON_FINITE)
        if not any_true(broken):
            return solution.value
        return pytree.tree_map(
            lambda z: torch.where(broken.view(-1, *[1] * (z.ndim - 1)), float("nan"), z), solution.value
        )

    @not_compiled
    def solve(self, x: Any, z0: State | Solution[Any] | None = None) -> Solution[Any]:
        """The rest point with its statistics; arguments as of `forward`.

        Returns:
            The Solution of `fixed_point`. With `supervise=k` its `trajectory` holds k intermediate states (k, batch,
            ...) instead of all of them.

        Raises:
            ValueError: no z0 was given and none can be inferred; the message says what to give.
            SolverError: samples did not converge and `throw` is True.
        """
        problem = self.problem(x, z0)
        try:
            return self.solve_problem(problem)
        except StateError as error:
            if z0 is not None or self.state is not None:
                raise
            raise StateError(
                f"{error} The solve started from zeros like x; if the state has another shape than x, give it as "
                "DEQ(cell, state=shape without the batch) or DEQ(cell, state=function of x)."
            ) from error

    def solve_problem(self, problem: Problem) -> Solution[Any]:
        """The solution of what `problem` returned; `solve(x, z0)` is `solve_problem(problem(x, z0))`.

        Useful to diagnose or regularise at the rest point the very problem that was solved, dropout masks included.
        """
        solution = fixed_point(
            problem.f,
            problem.z0,
            problem.args,
            solver=self.solver,
            adjoint=self.adjoint,
            rtol=self.rtol,
            atol=self.atol,
            max_steps=self.max_steps,
            throw=self.throw,
            trajectory=self.supervise > 0,
        )
        if self.supervise > 0:
            indices = correction_indices(solution.stats.steps, self.supervise)
            states = intermediate_states(problem.f, solution.trajectory, problem.args, indices=indices)
            solution.trajectory = pytree.tree_map(lambda *leaves: torch.stack(leaves), *states)
        return solution

    def problem(self, x: Any, z0: State | Solution[Any] | None = None) -> Problem:
        """The problem that `solve` would solve, for diagnosis: in training with dropout masks freshly drawn."""
        leaves, structure = pytree.tree_flatten(x)
        start = self._start(x) if z0 is None else z0
        cell = self.cell
        weights = norms.compute_weights(cell) if isinstance(cell, nn.Module) else []

        def evaluate(z: State, *leaves: Any) -> State:
            with norms.holding(weights) if weights else contextlib.nullcontext():
                return cell(z, pytree.tree_unflatten(list(leaves), structure))

        here = start.value if isinstance(start, Solution) else start
        masks = self._masks(evaluate, here, leaves) if self.training else None
        if masks is None:
            return Problem(evaluate, start, tuple(leaves))
        over_state, inside = masks
        # The masks go through args, so that they are compacted together with the samples they belong to.
        held, kept = len(leaves), len(over_state)

        def evaluate_masked(z: State, *args: Any) -> State:
            if kept:
                parts, tree = pytree.tree_flatten(z)
                z = pytree.tree_unflatten([p * m for p, m in zip(parts, args[held:], strict=False)], tree)
            with replaying(args[held + kept :]):
                return evaluate(z, *args[:held])

        return Problem(evaluate_masked, start, (*leaves, *over_state, *inside))

    def _start(self, x: Any) -> State:
        if callable(self.state):
            return self.state(x)
        first = next((leaf for leaf in pytree.tree_leaves(x) if isinstance(leaf, Tensor)), None)
        if first is None or first.ndim == 0:
            raise ValueError("DEQ: x holds no tensor with a batch dimension, so z0 cannot be inferred: give z0.")
        if self.state is not None:
            return first.new_zeros(len(first), *self.state)
        if not isinstance(x, Tensor):
            raise ValueError(
                f"DEQ: x is a {type(x).__name__}, so the state's shape cannot be inferred from it: give z0, or "
                "DEQ(cell, state=shape without the batch) or DEQ(cell, state=function of x)."
            )
        if not x.is_floating_point():
            raise ValueError(f"DEQ: x has dtype {x.dtype}, and the state must be floating-point: give z0 or state=.")
        return torch.zeros_like(x)

    def _masks(
        self, evaluate: Callable, z0: State, leaves: list
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]] | None:
        """Masks over the state's leaves, and for the dropouts inside the cell; None where nothing is dropped."""
        inside_cell = isinstance(self.cell, nn.Module) and active_dropouts(self.cell)
        if not inside_cell and self.dropout == 0.0:
            return None
        if inside_solve():
            raise NotImplementedError(
                "DEQ: dropout in a DEQ that is part of another DEQ's cell would redraw its masks at every evaluation "
                "of the outer cell; set it to 0 in the inner one."
            )
        parts = pytree.tree_leaves(z0)
        batch = len(parts[0])
        over_state: tuple[Tensor, ...] = ()
        if self.dropout > 0.0:
            over_state = tuple(
                MaskShape(tuple(p.shape[1:]), p.dtype, p.device, self.dropout).draw(batch) for p in parts
            )
        shapes: list[MaskShape] = []
        if inside_cell:
            # The first sample alone is enough to learn the shapes, and costs next to nothing.
            def first(t: Any) -> Any:
                return t[:1] if isinstance(t, Tensor) and t.ndim > 0 and len(t) == batch else t

            with torch.no_grad(), recording() as shapes:
                evaluate(pytree.tree_map(first, z0), *map(first, leaves))
        return over_state, tuple(shape.draw(batch) for shape in shapes)

    def extra_repr(self) -> str:
        """The options, for repr()."""
        always = ("solver", "adjoint", "rtol", "atol", "max_steps")
        shown = [f"{name}={getattr(self, name)!r}" for name in always]
        return ", ".join(
            shown + [f"{n}={getattr(self, n)!r}" for n in ("norm", "dropout", "supervise") if getattr(self, n)]
        )

    # torch refuses to pickle parametrised modules; a normalised cell travels bare, with the parametrization's tensors.
    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if self._normalised:
            bare, *parametrization = norms.unnormalised(self.cell, self._normalised)  # type: ignore[arg-type]
            state["_modules"] = {**state["_modules"], "cell": bare}
            state["_parametrization"] = parametrization
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        parametrization = state.pop("_parametrization", None)
        super().__setstate__(state)
        if parametrization is not None:
            norms.renormalise(self.cell, self._normalised, str(self.norm), *parametrization)  # type: ignore[arg-type]


def _refuse_unsteady(cell: nn.Module) -> None:
    for name, module in cell.named_modules():
        where = f"DEQ: the cell's {name or 'root'}, {type(module).__name__},"
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            raise ValueError(f"{where} draws a new mask at every evaluation; use restpoint.models.VariationalDropout.")
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"{where} couples the samples of a batch and is another map in train() than in eval(), so that the "
                "two have different rest points; use GroupNorm or LayerNorm."
            )
