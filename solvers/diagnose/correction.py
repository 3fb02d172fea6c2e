"""Fixed-point correction: a loss on a few states on the way to the rest point."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils import _pytree as pytree

from .recording import problem_of


def correction_weights(count: int, gamma: float = 0.8) -> Float[Tensor, "count"]:
    """gamma^(count - 1 - i) for i = 0, ..., count - 1: the last state has weight one, the earlier ones less.

    Raises:
        ValueError: count below 1, or gamma not in (0, 1].

    Source: Teed and Deng 2020, RAFT (supervision of the sequence of estimates), with gamma = 0.8.
    """
    if count < 1:
        raise ValueError(f"correction_weights: count must be at least 1; got {count}.")
    if not 0 < gamma <= 1:
        raise ValueError(f"correction_weights: gamma must be in (0, 1]; got {gamma}.")
    return gamma ** torch.arange(count - 1, -1, -1, dtype=torch.get_default_dtype())


def correction_indices(steps: Int[Tensor, "batch"], count: int) -> Int[Tensor, "count batch"]:
    """Where `count` states lie that are spread evenly over the steps that each sample took, both ends left out.

    Args:
        steps: `solution.stats.steps`.
        count: number of states a sample.

    Returns:
        Places in `solution.trajectory`, for `intermediate_states`.

    Raises:
        ValueError: count below 1.
    """
    if count < 1:
        raise ValueError(f"correction_indices: count must be at least 1; got {count}.")
    shares = torch.arange(1, count + 1, device=steps.device).unsqueeze(1)
    return steps.unsqueeze(0) * shares // (count + 1)


def intermediate_states(
    f: Callable[..., Any],
    trajectory: Any,
    args: tuple[Any, ...] | list[Any] = (),
    *,
    indices: Sequence[int] | Int[Tensor, "count *batch"],
    steps: int = 1,
    damping: float = 1.0,
) -> list[Any]:
    """States of a solve's way to its rest point, each with the gradient of `steps` evaluations from there on.

    A loss on them teaches the map to approach its rest point directly; see `correction_loss`.

    Args:
        f: the function that was solved; takes the state and `args`.
        trajectory: `solution.trajectory` of `fixed_point(..., trajectory=True)`: tensors (steps + 1, batch, ...).
        args: passed on to `f`.
        indices: which states: the same for all samples, or (count, batch) as of `correction_indices`.
        steps: number of recorded evaluations; 1 is the Jacobian-free gradient, more a phantom gradient.
        damping: share of the image in each, in (0, 1].

    Returns:
        `len(indices)` states of the structure of the trajectory, (batch, ...) tensors, in the order of `indices`.

    Raises:
        ValueError: steps or damping out of range, or indices of another shape.
        IndexError: an index outside of the trajectory.

    Source: Bai, Geng, Savani and Kolter 2022, Deep equilibrium optical flow estimation (sparse fixed-point
    correction); Geng et al. 2021 for the phantom gradient.
    """
    if steps < 1:
        raise ValueError(f"intermediate_states: steps must be at least 1; got {steps}.")
    if not 0 < damping <= 1:
        raise ValueError(f"intermediate_states: damping must be in (0, 1]; got {damping}.")
    tensors = [t for t in pytree.tree_leaves(trajectory) if isinstance(t, Tensor) and t.ndim >= 2]
    if not tensors or len(tensors) != len(pytree.tree_leaves(trajectory)):
        raise ValueError("intermediate_states: trajectory must hold tensors (steps + 1, batch, ...); got others.")
    length, batch = tensors[0].shape[:2]
    device = tensors[0].device
    places = torch.as_tensor(indices, device=device)
    if places.ndim == 1:
        places = places.unsqueeze(1).expand(len(places), batch)
    if places.ndim != 2 or places.shape[1] != batch:
        raise ValueError(
            f"intermediate_states: indices must have shape (count,) or (count, batch = {batch}); "
            f"got {tuple(places.shape)}."
        )
    if bool(((places < -length) | (places >= length)).any()):
        raise IndexError(f"intermediate_states: indices reach outside of the trajectory's {length} states.")
    rows = torch.arange(batch, device=device)
    states = []
    for place in places:
        state = pytree.tree_map(lambda t, place=place: t.detach()[place, rows], trajectory)
        problem, z = problem_of(f, state, args, root=False)
        for _ in range(steps):
            z = torch.add(z, problem.residual(z), alpha=damping)
        states.append(problem.spec.unflatten(z))
    return states


def correction_loss(loss: Callable[[Any], Tensor], states: Sequence[Any], *, gamma: float = 0.8) -> Tensor:
    """The sum over i of gamma^(k - 1 - i) loss(states[i]), k = len(states).

    Args:
        loss: maps a state to a scalar, or to a value a sample.
        states: intermediate states in the order of the solve, and last of all the rest point.
        gamma: how much less the next earlier state counts, in (0, 1].

    Returns:
        Of the shape of what `loss` returns.

    Raises:
        ValueError: no states, or gamma out of range.

    Source: Bai, Geng, Savani and Kolter 2022, Deep equilibrium optical flow estimation.

    Example:
        >>> solution = fixed_point(cell, z0, (x,), trajectory=True)
        >>> places = correction_indices(solution.stats.steps, 2)
        >>> states = intermediate_states(cell, solution.trajectory, (x,), indices=places)
        >>> correction_loss(criterion, [*states, solution.value]).backward()
    """
    weights = correction_weights(len(states), gamma).tolist()
    total = weights[0] * loss(states[0])
    for weight, state in zip(weights[1:], states[1:], strict=True):
        total = total + weight * loss(state)
    return total
