"""How a model behaves when its solves are longer."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from ..solvers.fixed_point import FixedPointSolver
from ..solvers.ode import ConstantController, Controller, ODESolution

REFERENCE = 16


@contextlib.contextmanager
def forced_steps(model: nn.Module, steps: int, spans: Mapping[nn.Module, float] | None = None) -> Iterator[int]:
    """Within the block every solve inside `model` takes so many steps, whatever its tolerances say.

    Rest points are iterated on beyond their tolerance; trajectories are cut into equal steps. Where a layer has fixed
    steps already, these are multiplied by `steps` / 16. How long the trajectories of a layer are it says itself, by `t`
    or `time`, or `spans` does, where its caller says how long.

    Yields:
        How many layers are told so; layers of another kind, such as quadratic programmes, are left as they are.
    """
    before: list[tuple[Any, dict[str, Any]]] = []
    for layer in model.modules():
        change = _change(layer, steps, (spans or {}).get(layer))
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


def seen_spans(model: nn.Module, run: Callable[[], Any]) -> dict[nn.Module, float]:
    """How long the trajectories of each layer of `model` with a method `solve` are when `run` uses it."""
    found: dict[nn.Module, float] = {}
    layers: list[Any] = [m for m in model.modules() if callable(getattr(m, "solve", None))]

    def noting(layer: nn.Module, solve: Any) -> Any:
        def solve_and_note(*args: Any, **kwargs: Any) -> Any:
            solution = solve(*args, **kwargs)
            if isinstance(solution, ODESolution):
                found[layer] = float((solution.ts[..., -1] - solution.ts[..., 0]).abs().max())
            return solution

        return solve_and_note

    for layer in layers:
        layer.__dict__["solve"] = noting(layer, layer.solve)
    try:
        run()
    finally:
        for layer in layers:
            layer.__dict__.pop("solve", None)
    return found


def _change(layer: Any, steps: int, seen: float | None) -> dict[str, Any]:
    if isinstance(getattr(layer, "solver", None), FixedPointSolver) and hasattr(layer, "max_steps"):
        knobs = {"rtol": 0.0, "atol": 0.0, "max_steps": steps}
        return {name: value for name, value in knobs.items() if hasattr(layer, name)}
    controller, span = getattr(layer, "controller", None), _span(layer) or seen
    if isinstance(controller, ConstantController):
        return {"controller": dataclasses.replace(controller, dt=controller.dt * REFERENCE / steps)}
    if isinstance(controller, Controller) and span is not None:
        return {"controller": ConstantController(dt=span / steps)}
    return {}


def _span(layer: Any) -> float | None:
    """How long a layer's trajectories are, where it says so: by `t`, their start and end, or by `time`."""
    t, time = getattr(layer, "t", None), getattr(layer, "time", None)
    if isinstance(t, tuple):
        return abs(t[1] - t[0])
    return float(time) if isinstance(time, int | float) else None
