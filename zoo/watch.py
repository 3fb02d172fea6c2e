"""The solves inside a model, whatever the model does with them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from ..solvers import Solution


@contextlib.contextmanager
def watched(model: nn.Module) -> Iterator[list[Solution[Any]]]:
    """Within the block every solve of an implicit layer of `model` is noted, in the list that is yielded.

    A layer is what has a `solver`, and a method `solve` that returns a Solution.
    """
    found: list[Solution[Any]] = []
    layers: list[Any] = [m for m in model.modules() if hasattr(m, "solver") and callable(getattr(m, "solve", None))]

    def noting(solve: Any) -> Any:
        def solve_and_note(*args: Any, **kwargs: Any) -> Any:
            solution = solve(*args, **kwargs)
            if isinstance(solution, Solution) and all(solution is not other for other in found):
                found.append(solution)
            return solution

        return solve_and_note

    for layer in layers:
        layer.__dict__["solve"] = noting(layer.solve)
    try:
        yield found
    finally:
        for layer in layers:
            layer.__dict__.pop("solve", None)


def effort(solutions: list[Solution[Any]]) -> tuple[Int[Tensor, " batch"], Bool[Tensor, " batch"]]:
    """Of one batch's solves: the evaluations of each sample in all of them, and whether all converged."""
    evaluations = torch.stack([solution.stats.evaluations for solution in solutions]).sum(dim=0)
    return evaluations, torch.stack([solution.converged for solution in solutions]).all(dim=0)
