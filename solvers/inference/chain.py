"""Linear chains and hidden Markov models."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..transforms import inside_transform
from . import checks
from .chain_kernel import MODERATE, LogPartition, Marginals, forward_scores, sample_states
from .chain_shared import SharedLogPartition, at_every_step
from .distribution import Parts, Structured
from .lazy import lazy
from .semiring import Semiring, draw
from .sparing import Carry, walk


class ChainMarginals(NamedTuple):
    """Marginals of a chain.

    Attributes:
        transitions: of two states in a row, (batch, length - 1, states, states), [.., t, i, j] for i at t, j at t + 1.
        states: (batch, length, states).
    """

    transitions: Tensor
    states: Tensor


class LinearChain(Structured):
    """Sequences of states whose log-weight is a sum over transitions and states: a linear-chain CRF.

    A structure is a tensor of states (batch, length), -1 beyond the length; marginals are `ChainMarginals`.

    Log-partition and marginals come from a scaled forward-backward pass whose first and second derivatives are in
    closed form: nothing but the marginals is stored for them. Where transitions are the same at every step, the
    log-partition stores length x states. On a CUDA device everything is a parallel scan instead, of logarithmic depth,
    which costs `states` times as many operations.

    Args:
        potentials: of transitions (batch, length - 1, states, states), [.., t, i, j] for i at t and j at t + 1.
            Together with `unary` also (states, states) or (batch, states, states), the same at every t; None for zero.
        unary: of states, (batch, length, states); None for zero. One of the two is needed.
        lengths: (batch,), from 1 to `length`; None for the full length.
        mask: allowed states, (batch, length, states); a dimension of 1 is broadcast.
        parallel: whether to scan in parallel; None decides by the device.

    Raises:
        TypeError: potentials that are no tensors of floating-point numbers.
        ValueError: shapes that do not fit, NaN or plus infinity, a length of zero or beyond the potentials.

    Source: Lafferty, McCallum and Pereira 2001; Rabiner 1989, section V (scaling); Sarkka and Garcia-Fernandez 2021
    (parallel scan).
    """

    _names = ("potentials", "unary")
    _squared = (1,)

    def __init__(
        self,
        potentials: Float[Tensor, "..."] | None = None,
        unary: Float[Tensor, "..."] | None = None,
        lengths: Int[Tensor, "..."] | None = None,
        mask: Bool[Tensor, "..."] | None = None,
        *,
        parallel: bool | None = None,
    ) -> None:
        edges, own = _both(potentials, unary)
        batch, length, _ = own.shape
        self.lengths = checks.lengths(lengths, batch, length, own)
        padding = None if self.lengths is None else ~self._within(length)
        edges = checks.finite(edges, "potentials", None if padding is None else padding[:, 1:, None, None])
        own = checks.finite(own, "unary", None if padding is None else padding[:, :, None])
        self._parts = (edges, checks.masked(own, mask, "the states"))
        # Transitions that stand for those of all steps, as long as the parts are these.
        self._shared = (shared_by_steps(potentials, "potentials", own), edges)
        self._has_mask = mask is not None
        self.parallel = own.is_cuda if parallel is None else parallel

    @lazy
    def _moderate(self) -> bool:
        """Whether all potentials, those in the padding too, can do without logarithms."""
        edges, own = self._parts
        shared = self._same()
        bounds = [p.detach().aminmax() for p in (edges if shared is None else shared, own) if p.numel()]
        return all(bool((low >= -MODERATE) & (high <= MODERATE)) for low, high in bounds)

    def _same(self) -> Tensor | None:
        """The transitions of every step, where there are steps and they share them."""
        shared, of = self._shared
        return shared if of is self._parts[0] and of.numel() else None

    def _valid(self) -> Tensor | None:
        return None if self.lengths is None else self._within(self._parts[1].shape[1]).T.contiguous()

    def _recursion(self, semiring: Semiring, parts: Parts) -> Tensor:
        edges, own = parts
        valid = self._valid()
        if self.parallel:
            return self._scan(semiring, edges, own, valid)
        here, edge = own.unbind(2), edges.unbind(2)

        def step(carry: Carry, t: int) -> tuple[Carry, None]:
            (scores,) = carry
            following = semiring.times(semiring.sum(semiring.times(scores.unsqueeze(-1), edge[t - 1]), -2), here[t])
            return (following if valid is None else torch.where(valid[t].unsqueeze(1), following, scores),), None

        (scores,), _ = walk(step, here[:1], range(1, len(here)), self._sparing)
        return semiring.sum(scores, -1)

    def _scan(self, semiring: Semiring, edges: Tensor, own: Tensor, valid: Tensor | None) -> Tensor:
        """Products of neighbouring transition matrices until one is left."""
        states = own.shape[-1]
        steps = semiring.times(edges, own[:, :, 1:].unsqueeze(3))
        if valid is not None:
            diagonal = torch.eye(states, dtype=torch.bool, device=own.device)
            shape = (1, 1, states, states)
            one = torch.where(diagonal, semiring.ones(shape, own), semiring.zeros(shape, own))
            steps = torch.where(valid[1:].T[:, :, None, None], steps, one)
        while steps.shape[2] > 1:
            pairs = semiring.matmul(steps[:, :, :-1:2], steps[:, :, 1::2])
            steps = torch.cat([pairs, steps[:, :, -1:]], 2) if steps.shape[2] % 2 else pairs
        scores = own[:, :, 0]
        if steps.shape[2]:
            scores = semiring.sum(semiring.times(scores.unsqueeze(-1), steps[:, :, 0]), -2)
        return semiring.sum(scores, -1)

    @property
    def _closed(self) -> bool:
        """Whether the closed forms serve: torch.func cannot look into them."""
        return not (self.parallel or inside_transform() or torch.autograd.forward_ad._current_level >= 0)

    def _log_partition(self) -> Tensor:
        if not self._closed:
            return super()._log_partition()
        edges, own = self._parts
        if torch.is_grad_enabled() and (edges.requires_grad or own.requires_grad):
            shared = self._same()
            if shared is not None:
                return SharedLogPartition.apply(shared, own, self._valid(), self._moderate, self._weigh)
            return LogPartition.apply(edges, own, self._valid(), self._moderate, self._weigh)
        with torch.no_grad():
            return forward_scores(edges, own, self._valid())[0]

    def _marginals(self) -> Parts:
        if not self._closed:
            return super()._marginals()
        return Marginals.apply(*self._parts, self._valid(), self._moderate, self._weigh)

    def _sample(self, n: int, generator: torch.Generator | None) -> Tensor:
        edges, own = (p.detach() for p in self._parts)
        valid = self._valid()
        scores = forward_scores(edges, own, valid)[1]
        return sample_states(edges, scores, valid, n, lambda logits: draw(logits, generator))

    def _pack(self, parts: Parts) -> ChainMarginals:
        return ChainMarginals(*parts)

    def _decode(self, indicators: Parts) -> Tensor:
        states = indicators[1].argmax(-1)
        if self.lengths is None:
            return states
        return states.masked_fill(~self._within(states.shape[-1]), -1)

    def _encode(self, structure: Any) -> Parts:
        own = self._parts[1]
        batch, length, states = own.shape
        if not isinstance(structure, Tensor) or structure.is_floating_point():
            raise ValueError("structure: expected a tensor of integers, the states (batch, length).")
        if tuple(structure.shape) != (batch, length):
            raise ValueError(f"structure: expected states of shape {(batch, length)}, got {tuple(structure.shape)}.")
        used = torch.ones_like(structure, dtype=torch.bool) if self.lengths is None else self._within(length)
        wrong = used & ((structure < 0) | (structure >= states))
        if bool(wrong.any()):
            place = tuple(wrong.nonzero()[0].tolist())
            raise ValueError(f"structure: the state at {place} is {int(structure[place])}; expected 0 to {states - 1}.")
        chosen = torch.nn.functional.one_hot(structure.clamp(0, states - 1), states) * used.unsqueeze(2)
        chosen = chosen.to(own.dtype)
        return chosen[:, :-1].unsqueeze(3) * chosen[:, 1:].unsqueeze(2), chosen


def _both(potentials: Tensor | None, unary: Tensor | None) -> tuple[Tensor, Tensor]:
    """Transitions (batch, length - 1, states, states) and states (batch, length, states)."""
    if unary is None:
        if potentials is None:
            raise ValueError("LinearChain: expected potentials, unary or both; got neither.")
        edges = checks.potentials(potentials, "potentials", ("batch", "length - 1", "states", "states"))
        batch, steps, states, _ = edges.shape
        return edges, edges.new_zeros(batch, steps + 1, states)
    own = checks.potentials(unary, "unary", ("batch", "length", "states"))
    return stationary(potentials, "potentials", own, "unary"), own


def stationary(given: Tensor | None, name: str, own: Tensor, own_name: str) -> Tensor:
    """Transitions (batch, length - 1, states, states) of what may be the same at every step or in every sample.

    Args:
        given: (states, states), (batch, states, states) or in full; None for zero.
        name: how errors call it.
        own: whatever has shape (batch, length, ..., states), dtype and device.
        own_name: how errors call that.
    """
    batch, length, states = own.shape[0], own.shape[1], own.shape[-1]
    shape = (batch, length - 1, states, states)
    shared = shared_by_steps(given, name, own)
    edges = checks.potentials(given, name, shape) if shared is None else at_every_step(shared, batch, length)
    checks.alike(edges, name, own, own_name)
    return edges


def shared_by_steps(given: Tensor | None, name: str, own: Tensor) -> Tensor | None:
    """Transitions (states, states) or (batch, states, states) that hold at every step, or None; as `stationary`."""
    batch, states = own.shape[0], own.shape[-1]
    if given is None:
        return own.new_zeros(states, states)
    if isinstance(given, Tensor) and tuple(given.shape) in ((states, states), (batch, states, states)):
        return checks.potentials(given, name, tuple(given.shape))
    return None


class HiddenMarkov(LinearChain):
    """States of a hidden Markov model given what was observed; the log-partition is the log-likelihood.

    Args:
        initial: log-probabilities of the first state, (states,) or (batch, states).
        transition: log-probabilities, from rows to columns: (states, states), (batch, states, states) or, one for every
            step, (batch, length - 1, states, states).
        emission: log-probability of what was observed under each state, (batch, length, states); or with `observations`
            a table (states, symbols) to look it up in.
        observations: symbols, (batch, length) integers.
        lengths, mask, parallel: as in `LinearChain`.

    Nothing is normalised here: any log-weights will do.

    Raises:
        TypeError, ValueError: as `LinearChain`; a symbol that the table does not have.

    Source: Rabiner 1989.
    """

    def __init__(
        self,
        initial: Float[Tensor, "..."],
        transition: Float[Tensor, "..."],
        emission: Float[Tensor, "..."],
        observations: Int[Tensor, "..."] | None = None,
        lengths: Int[Tensor, "..."] | None = None,
        mask: Bool[Tensor, "..."] | None = None,
        *,
        parallel: bool | None = None,
    ) -> None:
        if observations is not None:
            emission = _look_up(emission, observations, lengths)
        emission = checks.potentials(emission, "emission", ("batch", "length", "states"))
        batch, _, states = emission.shape
        shape = (states,) if isinstance(initial, Tensor) and initial.ndim == 1 else (batch, states)
        initial = checks.finite(checks.potentials(initial, "initial", shape), "initial")
        checks.alike(initial, "initial", emission, "emission")
        first = emission[:, :1] + initial.reshape(-1, 1, states)
        unary = torch.cat([first, emission[:, 1:]], 1)
        super().__init__(transition, unary, lengths, mask, parallel=parallel)


def _look_up(table: Tensor, observations: Tensor, lengths: Tensor | None) -> Tensor:
    table = checks.potentials(table, "emission", ("states", "symbols"))
    if observations.ndim != 2 or observations.is_floating_point():
        raise ValueError(
            f"observations: expected integers of shape (batch, length), got {observations.dtype} "
            f"{tuple(observations.shape)}."
        )
    symbols = table.shape[1]
    wrong = (observations < 0) | (observations >= symbols)
    lengths = checks.lengths(lengths, observations.shape[0], observations.shape[1], observations)
    if lengths is not None:
        wrong = wrong & (torch.arange(observations.shape[1], device=wrong.device) < lengths.unsqueeze(1))
    if bool(wrong.any()):
        place = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(
            f"observations: the symbol at {place} is {int(observations[place])}; expected 0 to {symbols - 1}."
        )
    return table.T[observations.clamp(0, symbols - 1)]
