"""SparseMAP: marginals that are a mixture of few structures."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..solution import Solution, Stats, Status
from ..transforms import no_derivatives
from .active_structures import ActiveStructures
from .distribution import Parts, Structured
from .elimination import Assignments
from .graph import FactorGraph


@dataclasses.dataclass
class SparseMarginals:
    """A mixture of few structures.

    Attributes:
        marginals: of every part, in the layout of the distribution's own marginals; differentiable.
        structures: those of the mixture, stacked in front: (support, batch, ...). Where a weight is zero they mean
            nothing.
        weights: of the structures, (support, batch); not negative, and one in sum over the support; differentiable.
        objective: what is maximised, (batch,); its derivative by the potentials is the marginals.
        solution: status, steps and residual (the duality gap, relative to the scores) of every sample.
    """

    marginals: Any
    structures: Any
    weights: Float[Tensor, "support batch"]
    objective: Float[Tensor, " batch"]
    solution: Solution[Any] = dataclasses.field(repr=False)

    @property
    def converged(self) -> Tensor:
        """Boolean mask (batch,)."""
        return self.solution.converged


def sparse_map(
    distribution: Structured | FactorGraph, *, max_steps: int = 500, throw: bool | str = "warn"
) -> SparseMarginals:
    """The structured relative of sparsemax: marginals that are zero for all but a few structures.

    Between the most probable structure and the marginals of all: the maximum of <potentials, mu> - |mu|^2 / 2 over the
    marginals mu that a distribution can have. The square is over what a structure is made of: states of chains,
    segments of semi-Markov chains, arcs, spans, moves, the variables of factor graphs; transitions and factors of
    several variables enter linearly.

    The active set method needs the best structure for changed potentials, once a step, and ends at the exact solution
    after finitely many. Most samples take a few steps; scaling the potentials up makes solutions sparser. Derivatives
    are the closed form on the support, where the solution is linear in the potentials, to every order and under all
    transforms of torch.func; under vmap there are as many structures as the largest support of all examples has.

    Args:
        distribution: whose potentials; or a factor graph, whose best assignment is found by elimination.
        max_steps: the largest number of structures to try.
        throw: "warn" warns, True raises, where the steps do not suffice; False does nothing.

    Raises:
        ValueError: a sample has no structure; a factor graph that joins too many variables (see `Assignments`).
        SolverError: see `throw`.

    Source: Niculae, Martins, Blondel and Cardie 2018, equations 4 and 8 and section 3 (active set); Nocedal and Wright
    2006, section 16.5.
    """
    problem = Assignments(distribution) if isinstance(distribution, FactorGraph) else distribution
    with no_derivatives():
        found = _Search.apply(problem, max_steps, problem.lengths, *(p.detach() for p in problem._parts))
    weights, slope, steps, residual, status, *rest = found
    stats, indicators = Stats(steps, steps.clone(), residual, status), tuple(rest)
    # On the support the weights are linear in the scores.
    scores = _scores(problem._parts, indicators)
    p = weights + (slope @ (scores - scores.detach()).unsqueeze(2)).squeeze(2)
    # The square of what is regularised, as a matrix over the support.
    squares = torch.stack([i.double().flatten(2) @ i.double().flatten(2).mT for i in _squared(problem, indicators)])
    value = (p * scores).sum(1) - (p * (squares.sum(0) @ p.unsqueeze(2)).squeeze(2)).sum(1) / 2
    dtype = problem._parts[0].dtype
    mixed = tuple((p.to(dtype).unsqueeze(1) @ i.flatten(2)).reshape(i.shape[:1] + i.shape[2:]) for i in indicators)
    marginals = problem._pack(mixed)
    solution = Solution(marginals, stats)
    solution.check(throw, "sparse_map")
    structures = problem._decode(tuple(i.transpose(0, 1) for i in indicators))
    return SparseMarginals(marginals, structures, p.T.to(dtype), value.to(dtype), solution)


class _Search(torch.autograd.Function):
    """The search as one operation, so that vmap hands over all of its examples at once, as a larger batch.

    Returns weights, slope and what is in `Stats`, and then the indicators of `ActiveStructures.summary`.
    """

    @staticmethod
    def forward(problem: Structured, max_steps: int, lengths: Tensor | None, *parts: Tensor) -> Parts:
        """Of a copy of `problem` with these lengths and parts."""
        batch = copy.copy(problem)
        batch.__dict__.pop("_lazy", None)
        batch.lengths = lengths
        active, stats = _search(batch, parts, max_steps)
        weights, slope, indicators = active.summary()
        return weights, slope, stats.steps, stats.residual, stats.status, *indicators

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Parts) -> None:
        """Nothing here is differentiated."""
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """Nothing, of each result."""
        return (None,) * (len(tangents) + 2)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], problem: Structured, max_steps: int, *tensors: Any) -> Any:
        """The examples one behind the other."""
        count = info.batch_size

        def joined(x: Tensor | None, dim: int | None) -> Tensor | None:
            if x is None:
                return None
            return (x.expand(count, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1)

        found = _Search.apply(problem, max_steps, *(joined(x, d) for x, d in zip(tensors, in_dims[2:], strict=True)))
        return tuple(x.unflatten(0, (count, -1)) for x in found), (0,) * len(found)


def _search(problem: Structured, parts: Parts, max_steps: int) -> tuple[ActiveStructures, Stats]:
    oracle = copy.copy(problem)
    oracle.__dict__.pop("_lazy", None)
    shapes = [part.shape[1:] for part in _squared(problem, parts)]
    sizes = [shape.numel() for shape in shapes]

    def best(batch: Tensor, pull: Tensor | None) -> tuple[Parts, Tensor, Tensor]:
        """The best structure of some samples where the potentials of squared parts are lower by `pull`.

        Returns its indicators, those of squared parts in a row, and its score by the original potentials.
        """
        original = tuple(part[batch] for part in parts)
        changed = list(original)
        if pull is not None:
            for k, shift, shape in zip(problem._squared, pull.split(sizes, 1), shapes, strict=True):
                changed[k] = changed[k] - shift.to(changed[k].dtype).reshape(-1, *shape)
        oracle._parts = tuple(changed)
        oracle.lengths = None if problem.lengths is None else problem.lengths[batch]
        found = tuple(part.detach() for part in oracle._argmax())
        score = _scores(original, tuple(i.unsqueeze(1) for i in found)).squeeze(1)
        return found, torch.cat([i.flatten(1) for i in _squared(problem, found)], 1).double(), score

    batch = torch.arange(len(parts[0]), device=parts[0].device)
    found, rows, scores = best(batch, None)
    problem._exists(scores)
    active = ActiveStructures(found, rows, scores)
    steps = torch.ones_like(batch)
    status = torch.full_like(batch, Status.MAX_STEPS)
    residual = torch.full_like(scores, torch.inf)
    tolerance = 64 * torch.finfo(parts[0].dtype).eps
    for _ in range(max_steps - 1):
        mean = active.mean(batch)
        found, rows, scores = best(batch, mean)
        gained = scores - (rows * mean).sum(1) - active.value(batch, mean)
        gap = (gained / (1 + active.scale(batch) + scores.abs())).clamp(min=0)
        residual[batch] = gap
        # One that is in the support already could only win by rounding.
        done = (gap <= tolerance) | active.holds(batch, rows)
        status[batch[done]] = Status.CONVERGED
        batch = batch[~done]
        if not len(batch):
            break
        steps[batch] += 1
        active.add(batch, tuple(i[~done] for i in found), rows[~done], scores[~done])
    return active, Stats(steps, steps.clone(), residual, status)


def _squared(problem: Structured, parts: Parts) -> Parts:
    return tuple(parts[k] for k in problem._squared)


def _scores(parts: Parts, indicators: Parts) -> Tensor:
    """Log-weights (batch, support) in float64, of indicators (batch, support, ...)."""
    used = [torch.where(i > 0, p.unsqueeze(1), 0.0) for i, p in zip(indicators, parts, strict=True)]
    return torch.stack([u.double().flatten(2).sum(2) for u in used]).sum(0)
