"""What a solver may integrate: one function of time and state that holds still while a solve runs."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .. import norms
from ..dropout import MaskShape, active_dropouts, inside_solve, recording, replaying

Field = Callable[..., Any]


def takes_time(field: Field) -> bool:
    """Whether `field` is a function of (t, y) and not of y alone, by the positional arguments that it requires.

    Raises:
        TypeError: it cannot be called, or takes no positional argument.
    """
    if not callable(field):
        raise TypeError(f"The field must be an nn.Module or a function of (t, y) or y; got {type(field).__name__}.")
    function = field.forward if isinstance(field, nn.Module) else field
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError:  # a builtin without a signature, such as torch.sin
        return False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for p in positional if p.default is p.empty]
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return True
    if not positional:
        raise TypeError(f"The field must take (t, y) or y; {function!r} takes no positional argument.")
    return len(required) > 1


def refuse_unsteady(field: Field, layer: str) -> None:
    """Refuse modules whose output is no function of time and state sample by sample.

    Raises:
        ValueError: the field contains torch's dropout or batch normalisation; the message names the place.
    """
    if not isinstance(field, nn.Module):
        return
    for name, module in field.named_modules():
        where = f"{layer}: the field's {name or 'root'}, {type(module).__name__},"
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            raise ValueError(f"{where} draws a new mask at every evaluation; use restpoint.models.VariationalDropout.")
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"{where} mixes samples, and states of different times in its running statistics; use nn.GroupNorm."
            )


def hold(field: Field, timed: bool, t0: float, y0: Any, args: tuple[Any, ...]) -> tuple[Field, tuple[Any, ...]]:
    """The field as `solve_ode` takes it, and its arguments, for one solve.

    Parametrised weights are computed once, and dropout masks are drawn once and go through the arguments, so that
    all evaluations, those of the backward pass included, see the same function.

    Args:
        field: a function of (t, y, *args), or of (y, *args) where `timed` is False.
        timed: whether it takes the time.
        t0: the start.
        y0: the state there.
        args: further arguments.
    """
    function: Field = field if timed else functools.partial(_without_time, field)
    if not isinstance(field, nn.Module):
        return function, args
    weights = norms.compute_weights(field)
    if weights:
        function = functools.partial(_with_weights, function, weights)
    if not active_dropouts(field):
        return function, args
    if inside_solve():
        raise NotImplementedError(
            "NeuralODE: dropout in a field inside another solve would redraw its masks at every evaluation; set it "
            "to 0 in the inner one."
        )
    masks = tuple(shape.draw(len(pytree.tree_leaves(y0)[0])) for shape in _mask_shapes(function, t0, y0, args))
    return functools.partial(_with_masks, function, len(args)), (*args, *masks)


def _without_time(field: Field, t: Tensor, y: Any, *args: Any) -> Any:
    return field(y, *args)


def _with_weights(field: Field, weights: norms.Weights, t: Tensor, y: Any, *args: Any) -> Any:
    with norms.holding(weights):
        return field(t, y, *args)


def _with_masks(field: Field, count: int, t: Tensor, y: Any, *args: Any) -> Any:
    with replaying(args[count:]):
        return field(t, y, *args[:count])


def _mask_shapes(field: Field, t0: float, y0: Any, args: tuple[Any, ...]) -> list[MaskShape]:
    # The first sample alone is enough to learn the shapes, and costs next to nothing.
    leaves = pytree.tree_leaves(y0)
    batch = len(leaves[0])

    def first(leaf: Any) -> Any:
        return leaf[:1] if isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == batch else leaf

    time = torch.full((), t0, dtype=leaves[0].dtype, device=leaves[0].device)
    with torch.no_grad(), recording() as shapes:
        field(time, pytree.tree_map(first, y0), *pytree.tree_map(first, args))
    return shapes
