"""One differentiable solve as a function of all the tensors that its result depends on."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..solution import SolverError, Stats, Status
from ..transforms import autocast_to
from .adjoint import Outcome, Task, taped
from .externals import Externals
from .problem import Run


class Solve(abc.ABC):
    """One solve whose backward pass is not autograd's own.

    Second and higher derivatives, for which the backward pass itself is recorded, are taken through one recording of
    all accepted steps, whatever the first ones are taken through.

    Attributes:
        task: what is solved.
        inner: the right-hand side with leaves of its own in place of the arguments that require a gradient.
        shared: these leaves, then the tensors that the field closes over: what every step's derivative reaches.
        externals: finds and checks the latter.
        timed: whether derivatives with respect to the first or last time are wanted.
        leaf: the initial matrix from which `externals.recorded` was recorded.
        unchanged: the tensors that the field uses and that no derivative is wanted of.
        recomputes: whether the backward pass evaluates the field anew and would not notice other values.
        inputs: of the function: first and last time if wanted, y0, tensors of args, tensors closed over.
        run: what the driver found, once it has.
    """

    recomputes = False

    def __init__(self, task: Task) -> None:
        problem = task.problem
        self.task, self.problem = task, problem
        cut = _cut_args(problem.rhs.args)
        self.inner = problem.rhs.with_args(cut)
        leaves = tensor_leaves(cut)
        start = problem.times.values[..., 0]
        if problem.per_sample:
            start = start.expand(len(problem.y0))
        with torch.enable_grad():
            y = problem.y0.detach().requires_grad_()
            self.externals = Externals(lambda: self.inner(start, y), problem.rhs.field, [y, *leaves])
        self.unchanged = _Unchanged([*pytree.tree_leaves(problem.rhs.args), *self.externals.constants])
        self.leaf = y
        self.shared = [*leaves, *self.externals.tensors]
        self.ends = (task.start, task.end)
        times = [x for x in self.ends if x is not None]
        self.timed = len(times) > 0
        self.inputs = [*times, problem.y0, *tensor_leaves(problem.rhs.args), *self.externals.tensors]
        self.run: Run | None = None

    def outcome(self) -> Outcome:
        """Solve; the outcome carries derivatives if any input does."""
        if not any(x.requires_grad for x in self.inputs):
            run = self.task.run()
            return Outcome(run.y, run.dense, run)
        tensors = _Function.apply(self, *self.inputs)
        self.externals.recorded = None
        assert self.run is not None
        return self.wrap(tensors)

    def wrap(self, tensors: tuple[Tensor, ...]) -> Outcome:
        """The outcome made of the function's results."""
        assert self.run is not None
        return Outcome(tensors[0], tensors[1] if len(tensors) > 1 else None, self.run)

    @abc.abstractmethod
    def forward(self) -> tuple[Tensor, ...]:
        """Run the driver, set `run`, and return new tensors: the final matrix, and the dense outputs if any."""

    @abc.abstractmethod
    def backward(self, bars: tuple[Tensor, ...]) -> Cotangents:
        """First derivatives, from the cotangents of the results of `forward`."""

    def recorded(self, bars: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> list[Tensor | None]:
        """Cotangents of the inputs, themselves differentiable."""
        count = len(inputs) - len(self.externals.tensors)
        boxes = [_Box() for _ in range(count)]
        with torch.enable_grad():
            own = [_Cut.apply(x, box) if x.requires_grad else x for x, box in zip(inputs, boxes)]
            results = self.replayed(own)
            pairs = [(x, bar) for x, bar in zip(results, bars) if x.requires_grad]
            pulled = torch.autograd.grad(
                [x for x, _ in pairs],
                [x for x in inputs if x.requires_grad],
                [bar for _, bar in pairs],
                create_graph=True,
                allow_unused=True,
            )
        found = iter(pulled)
        outer = [next(found) if x.requires_grad else None for x in inputs]
        # What was cut off from its history keeps its cotangent in a box.
        for box in boxes:
            box.closed = False
        return [box.bar for box in boxes] + outer[count:]

    def replayed(self, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        """The results of `forward` by a recording of all steps, from `inputs` but those closed over."""
        assert self.run is not None
        rest = list(inputs)
        start, end = (None if x is None else rest.pop(0) for x in self.ends)
        y0, given = rest.pop(0), self.problem.rhs.args
        leaves = iter(rest)
        args = pytree.tree_map(lambda x: next(leaves) if isinstance(x, Tensor) and x.requires_grad else x, given)
        problem = dataclasses.replace(self.problem, y0=y0, rhs=self.problem.rhs.with_args(args))
        outcome = taped(problem, self.run, start, end)
        return (outcome.y,) if outcome.dense is None else (outcome.y, outcome.dense)


class _Unchanged:
    """Notices which of some tensors are changed in place."""

    def __init__(self, things: Iterable[object]) -> None:
        # A tensor of inference mode has no version, and cannot be changed outside of it.
        tensors = (thing for thing in things if isinstance(thing, Tensor) and not thing.is_inference())
        self._versions = [(tensor, tensor._version) for tensor in tensors]

    def settle(self) -> None:
        """The solve is over: what it has changed itself is its own affair."""
        self._versions = [(tensor, version) for tensor, version in self._versions if tensor._version == version]

    def check(self) -> None:
        """Make sure that none was changed.

        Raises:
            SolverError: one was.
        """
        for tensor, version in self._versions:
            if tensor._version != version:
                raise SolverError(
                    f"solve_ode: a tensor of shape {tuple(tensor.shape)} among args, or that the field closes over, "
                    f"was changed in place between the solve and its backward pass, which evaluates the field again: "
                    f"the gradient would be wrong. Change a copy of it."
                )


@dataclasses.dataclass
class Cotangents:
    """Of a solve's inputs.

    Attributes:
        start, end: of the first and last time, where wanted.
        y0: of the initial matrix.
        shared: of arguments and what the field closes over, None where nothing arrives.
        evaluations: of the field in the backward pass.
        steps: taken in the backward pass, (batch,) or one number for all samples.
        rejected: likewise.
    """

    start: Tensor | None
    end: Tensor | None
    y0: Tensor
    shared: list[Tensor | None]
    evaluations: int
    steps: int | Tensor
    rejected: int | Tensor = 0


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, solve: Solve, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.solve = solve
        ctx.save_for_backward(*inputs)
        results = solve.forward()
        solve.unchanged.settle()
        return results

    @staticmethod
    def backward(ctx: Any, *bars: Tensor) -> Any:
        # Unpacking raises where an input was changed in place since the solve.
        inputs, solve = ctx.saved_tensors, ctx.solve
        if solve.recomputes or torch.is_grad_enabled():
            solve.unchanged.check()
        with autocast_to(None, solve.problem.y0.device):
            if torch.is_grad_enabled():
                return (None, *solve.recorded(bars, inputs))
            pulled = solve.backward(bars)
        times = [x for x, wanted in zip((pulled.start, pulled.end), solve.ends) if wanted is not None]
        solve.task.report(_stats(solve.run, pulled))
        return (None, *times, pulled.y0, *pulled.shared)


class _Box:
    """Takes a cotangent while it is closed."""

    def __init__(self) -> None:
        self.closed = True
        self.bar: Tensor | None = None


class _Cut(torch.autograd.Function):
    """The identity, whose cotangent goes into a box and, while the box is closed, no further."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, box: _Box) -> Tensor:
        ctx.box = box
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, bar: Tensor) -> tuple[Tensor | None, None]:
        if not ctx.box.closed:
            return bar, None
        ctx.box.bar = bar
        return None, None


def tensor_leaves(args: object) -> list[Tensor]:
    """The tensors in args that require a gradient."""
    return [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor) and leaf.requires_grad]


def _cut_args(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same arguments with tensors that require a gradient replaced by leaves of the same value."""

    def cut(leaf: Any) -> Any:
        wants = isinstance(leaf, Tensor) and leaf.requires_grad
        return leaf.detach().requires_grad_() if wants else leaf

    cut_args: tuple[Any, ...] = pytree.tree_map(cut, args)
    return cut_args


def _stats(run: Run, pulled: Cotangents) -> Stats:
    def full(count: int | Tensor) -> Tensor:
        return torch.zeros_like(run.status) + count

    return Stats(
        steps=full(pulled.steps) + pulled.rejected,
        evaluations=full(pulled.evaluations),
        residual=torch.zeros_like(run.ratio),
        status=full(int(Status.CONVERGED)),
        accepted=full(pulled.steps),
        rejected=full(pulled.rejected),
    )
