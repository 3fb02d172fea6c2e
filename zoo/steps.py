"""How a model behaves when its solves are longer."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import nn

from ..solvers.fixed_point import FixedPointSolver
from ..solvers.ode import ConstantController, Controller

REFERENCE = 16


@contextlib.contextmanager
def forced_steps(model: nn.Module, steps: int) -> Iterator[int]:
    """Within the block every solve inside `model` takes so many steps, whatever its tolerances say.

    Rest points are iterated on beyond their tolerance; trajectories are cut into equal steps. Where a layer has fixed
    steps already, these are multiplied by `steps` / 16.

    Yields:
        How many layers are told so; layers of another kind, such as quadratic programmes, are left as they are.
    """
    before: list[tuple[Any, dict[str, Any]]] = []
    for layer in model.modules():
        change = _change(layer, steps)
        if change:
            before.append((layer, {name: getattr(layer, name) for name in change}))
            for name, value in change.items():
                setattr(layer, name, value)
    try:
        yield len(before)
    finally:
        for layer, values in before:
            for name, value in values.items():
                setattr(layer, name, value)


def _change(layer: Any, steps: int) -> dict[str, Any]:
    if isinstance(getattr(layer, "solver", None), FixedPointSolver) and hasattr(layer, "max_steps"):
        knobs = {"rtol": 0.0, "atol": 0.0, "max_steps": steps}
        return {name: value for name, value in knobs.items() if hasattr(layer, name)}
    controller = getattr(layer, "controller", None)
    if isinstance(controller, ConstantController):
        return {"controller": dataclasses.replace(controller, dt=controller.dt * REFERENCE / steps)}
    span = _span(layer)
    if isinstance(controller, Controller) and span is not None:
        return {"controller": ConstantController(dt=span / steps)}
    return {}


def _span(layer: Any) -> float | None:
    """How long a layer's trajectories are, where it says so: by `t`, their start and end, or by `time`."""
    t, time = getattr(layer, "t", None), getattr(layer, "time", None)
    if isinstance(t, tuple):
        return abs(t[1] - t[0])
    return float(time) if isinstance(time, int | float) else None
