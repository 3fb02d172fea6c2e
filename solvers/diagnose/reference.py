"""The converged float64 gradient that others are measured against."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..adjoint import ImplicitAdjoint
from ..fixed_point import Anderson, Newton, fixed_point
from ..linear import GMRES, Auto
from .recording import with_gradients

RTOL = 1e-12


def reference_gradients(
    f: Callable[..., Any],
    z0: Any,
    args: tuple[Any, ...] | list[Any],
    shared: list[Tensor],
    loss: Callable[[Any], Tensor],
) -> list[Tensor]:
    """Implicit gradients in float64 at a residual of 1e-12, by the floating-point tensors of args and by `shared`.

    Raises:
        SolverError: neither Anderson's nor Newton's method reaches that residual.
        TypeError: `f` cannot be evaluated in float64.
    """
    with _in_double([*shared, *_reached(f)]):
        start, inputs = _double(z0), with_gradients(_double(tuple(args)))
        try:
            with torch.no_grad():
                probe = f(start, *inputs)
        except RuntimeError as error:
            raise TypeError(_ADVICE.format(problem=str(error).splitlines()[0])) from error
        if any(t.dtype == torch.float32 for t in pytree.tree_leaves(probe) if isinstance(t, Tensor)):
            raise TypeError(_ADVICE.format(problem="it returned float32"))
        adjoint = ImplicitAdjoint(Auto(iterative=GMRES(rtol=RTOL, max_steps=1000)))
        with torch.no_grad():
            near = fixed_point(f, start, inputs, solver=Anderson(), rtol=RTOL, max_steps=500)
        with torch.enable_grad():
            solution = fixed_point(
                f, near.value, inputs, solver=Newton(), adjoint=adjoint, rtol=RTOL, max_steps=100, throw=True
            )
            targets = [t for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor) and t.requires_grad]
            value = loss(solution.value).sum()
            return list(torch.autograd.grad(value, [*targets, *shared], materialize_grads=True, allow_unused=True))


_ADVICE = (
    "compare_adjoints: f cannot be evaluated in float64, which the reference needs ({problem}). The modules and "
    "tensors that f names are converted; where it computes with others, give f and args in float64."
)


def _double(tree: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: t.detach().double() if t.is_floating_point() else t, tree)


def _reached(f: Callable[..., Any]) -> list[Tensor]:
    """Floating-point leaves of the modules that f is, belongs to or names, and such tensors that it names itself."""
    found: list[Tensor] = []
    pending: list[Any] = [f]
    seen: set[int] = set()
    while pending:
        thing = pending.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, nn.Module):
            found += [*thing.parameters(), *thing.buffers()]
        elif isinstance(thing, Tensor):
            found.append(thing)
        elif isinstance(thing, functools.partial):
            pending += [thing.func, *thing.args, *thing.keywords.values()]
        elif inspect.ismethod(thing):
            pending += [thing.__self__, thing.__func__]
        elif inspect.isfunction(thing) and not thing.__module__.startswith("torch."):
            names = inspect.getclosurevars(thing)
            pending += [*names.nonlocals.values(), *names.globals.values()]
    return [t for t in found if t.is_floating_point() and t.is_leaf]


@contextlib.contextmanager
def _in_double(tensors: list[Tensor]) -> Iterator[None]:
    """The same tensors in float64 inside, and as they were afterwards."""
    unique = list({id(t): t for t in tensors}.values())
    before = [t.data for t in unique]
    try:
        for t in unique:
            t.data = t.data.double()
        yield
    finally:
        for t, data in zip(unique, before, strict=True):
            t.data = data
