"""Knobs of adjoints that rest points and trajectories share; each side brings its own way of obeying them."""

from __future__ import annotations

import numbers

from ..options import check_integer, options


@options
class CheckpointAdjoint:
    """Exact derivatives of the solver's own steps, from a few kept states between which steps are recomputed.

    Memory grows like the square root of the number of steps, or like its logarithm with `recursive=True`, for one
    more evaluation a step, or for log2 of the number of segments more.

    Attributes:
        segments: number of kept states; None takes the square root of the number of steps.
        recursive: halve recursively instead.

    Raises:
        ValueError: segments is below 1.

    Source: Griewank and Walther 2008, Evaluating derivatives, chapter 12; Chen et al. 2016, Training deep nets with
    sublinear memory cost.
    """

    segments: int | None = None
    recursive: bool = False

    def __post_init__(self) -> None:
        if self.segments is not None:
            check_integer("CheckpointAdjoint: ", "segments", self.segments)


@options
class ReversibleAdjoint:
    """Exact derivatives of a reversible iteration, whose backward pass reconstructs every state from the next one.

    No state is kept, whatever the number of steps. The reconstruction amplifies rounding, so it is checked at the
    end against the initial state.

    For a rest point the iteration is the two-state one of reversible equilibrium models, damped by the `damping` of
    `Picard`, which has to be below 1 (and is 0.5 where no solver is named). For a trajectory it is that of a
    reversible method.

    Attributes:
        drift: relative error of the reconstructed initial state, times the share of the gradient that reaches it,
            above which the backward pass warns; None takes the square root of the type's resolution.

    Raises:
        ValueError: drift is not positive.

    Source: McCallum, Arora and Foster 2025, Reversible deep equilibrium models; McCallum and Foster 2024, Efficient,
    accurate and stable gradients for neural ODEs.
    """

    drift: float | None = None

    def __post_init__(self) -> None:
        if self.drift is not None and not (isinstance(self.drift, numbers.Real) and self.drift > 0):
            raise ValueError(f"ReversibleAdjoint: drift must be positive; got {self.drift!r}.")
