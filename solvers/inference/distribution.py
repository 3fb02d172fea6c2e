"""What every structured distribution can be asked, from one recursion in several semirings."""

from __future__ import annotations

import abc
import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from ..transforms import any_true, inside_transform, plain
from . import checks
from .lazy import lazy
from .semiring import Divergence, Entropy, KMax, Log, Max, Sample, Semiring

Parts = tuple[Tensor, ...]
S = TypeVar("S", bound="Structured")


class Structured(abc.ABC):
    """A distribution over discrete structures: the log-weight of one is the sum of its parts' log-potentials.

    Sequences, trees and alignments differ in which sets of parts are structures, and so in their recursion; what they
    can be asked is the same, and is computed when it is first asked for. Log-potentials may be of any scale, and minus
    infinity excludes a part. Results are in the dtype of the potentials, float32 for half precision, and differentiable
    to every order unless they are discrete. Padding beyond `lengths` is never looked at.

    How a structure, and how the parts are laid out, is said in each class. A structure's indicators have the layout of
    the marginals, with 1 where a part is used.

    Attributes:
        batch: samples.
        lengths: (batch,), or None where all are of the full length.
    """

    _parts: Parts
    _names: tuple[str, ...]
    _has_mask: bool = False
    # The parts that other regularisers than the entropy see; the rest follow from them.
    _squared: tuple[int, ...] = (0,)
    _sparing: bool = False
    lengths: Tensor | None

    @abc.abstractmethod
    def _recursion(self, semiring: Semiring, parts: Parts) -> Tensor:
        """The sum over all structures (size, batch), of lifted parts (size, batch, ...)."""

    @abc.abstractmethod
    def _decode(self, indicators: Parts) -> Any:
        """The structure whose parts have indicator 1, of indicators with any leading dimensions before the batch."""

    @abc.abstractmethod
    def _encode(self, structure: Any) -> Parts:
        """The indicators of a structure of this batch.

        Raises:
            ValueError: it has another shape, or what cannot be indexed.
        """

    def _pack(self, parts: Parts) -> Any:
        """What has the layout of the parts, as the user sees it."""
        return parts[0]

    def checkpointed(self: S) -> S:
        """The same distribution, whose recursions keep the square root of their steps for backward passes.

        The steps between are taken twice, with the same results to the last bit. It helps first derivatives, marginals
        that are computed by them included, of long sequences and large trees, wherever the recursion is what is
        differentiated: in all queries but the log-partition and the marginals of chains, whose closed forms keep no
        more than that. Not in parallel scans, in `Assignments`, nor inside transforms of torch.func.
        """
        other = copy.copy(self)
        other.__dict__.pop("_lazy", None)
        other._sparing = True
        return other

    @property
    def batch(self) -> int:
        """Samples."""
        return len(self._parts[0])

    @lazy
    def log_partition(self) -> Float[Tensor, " batch"]:
        """Logarithm of the sum of all structures' weights, (batch,); minus infinity where there is no structure.

        Raises:
            ValueError: a mask excludes every structure of a sample.
        """
        value = self._log_partition()
        if self._has_mask:
            self._exists(value)
        return value

    @lazy
    def marginals(self) -> Any:
        """The probability of every part, in the layout of the potentials; zero in the padding.

        Raises:
            ValueError: a sample has no structure.
        """
        self._exists(self.log_partition)
        return self._pack(self._marginals())

    @lazy
    def entropy(self) -> Float[Tensor, " batch"]:
        """Entropy in nats, (batch,).

        Raises:
            ValueError: a sample has no structure.
        """
        self._exists(self.log_partition)
        return self._entropy()

    @lazy
    def argmax(self) -> Any:
        """The most probable structure; of equals, any one.

        Raises:
            ValueError: a sample has no structure.
        """
        self._exists(self.log_partition)
        return self._decode(self._argmax())

    def kbest(self, k: int) -> tuple[Any, Float[Tensor, "k batch"]]:
        """The k most probable structures, best first.

        Returns:
            The structures, stacked in front, and their log-probabilities (k, batch). Where a sample has fewer than k
            structures the rest has log-probability minus infinity, and the structures there mean nothing.

        Raises:
            ValueError: k is below 1; a sample has no structure.
        """
        checks.count(k, "k")
        self._exists(self.log_partition)
        indicators = self._kbest(k)
        present = torch.stack([i.flatten(2).any(2) for i in indicators]).any(0)
        scores = torch.stack([self._score(tuple(i[rank] for i in indicators)) for rank in range(k)])
        log_prob = (scores - self.log_partition).masked_fill(~present, -torch.inf)
        return self._decode(indicators), log_prob

    def sample(self, n: int = 1, generator: torch.Generator | None = None) -> Any:
        """n independent structures per sample of the batch, exact, stacked in front: (n, batch, ...).

        Args:
            n: how many.
            generator: where the randomness is from; None is torch's own.

        Raises:
            ValueError: n is below 1; a sample of the batch has no structure.
        """
        checks.count(n, "n")
        self._exists(self.log_partition)
        return self._sample(n, generator)

    def log_prob(self, structure: Any) -> Float[Tensor, " batch"]:
        """Log-probability (batch,) of one structure per sample, as `argmax` returns them.

        Raises:
            ValueError: what is given is no structure; the message names the first sample.
        """
        indicators = self._encode(structure)
        wrong = ~self._complete(indicators)
        if any_true(wrong):
            first = int(plain(wrong).nonzero()[0])
            raise ValueError(f"structure: sample {first} is not a structure of this {type(self).__name__}.")
        self._exists(self.log_partition)
        return self._score(indicators) - self.log_partition

    def indicators(self, structure: Any) -> Any:
        """One for the parts that a structure uses, zero for others, in the layout of the marginals.

        Args:
            structure: one per sample, as `argmax` returns them.

        Raises:
            ValueError: it has another shape, or names parts that there are not.
        """
        return self._pack(self._encode(structure))

    def kl(self, other: Structured) -> Float[Tensor, " batch"]:
        """Kullback-Leibler divergence of `other` from this distribution, E[log p - log q], (batch,) in nats.

        Infinite where `other` excludes what this one does not.

        Args:
            other: of the same class, shapes and lengths.

        Raises:
            ValueError: it is not; a sample of either has no structure.
        """
        if type(other) is not type(self) or not self._comparable(other):
            raise ValueError(f"kl: expected another {type(self).__name__} of the same kind, got {other!r}.")
        for name, mine, theirs in zip(self._names, self._parts, other._parts, strict=True):
            if mine.shape != theirs.shape or mine.dtype != theirs.dtype or mine.device != theirs.device:
                raise ValueError(
                    f"kl: expected {name} of shape {tuple(mine.shape)}, {mine.dtype} on {mine.device}; "
                    f"got {tuple(theirs.shape)}, {theirs.dtype} on {theirs.device}."
                )
        if not _equal(self.lengths, other.lengths):
            raise ValueError("kl: the two distributions have different lengths.")
        self._exists(self.log_partition)
        other._exists(other.log_partition)
        return self._kl(other)

    def _within(self, length: int) -> Tensor:
        """(batch, length), True up to the length of each sequence; only where there are lengths."""
        assert self.lengths is not None
        return torch.arange(length, device=self.lengths.device) < self.lengths.unsqueeze(1)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{n} {tuple(p.shape)}" for n, p in zip(self._names, self._parts, strict=True))
        return f"{type(self).__name__}({shapes}{'' if self.lengths is None else ', lengths'})"

    # How the queries are answered; a class that knows better overrides some of these.

    def _log_partition(self) -> Tensor:
        return self._weigh(*self._parts)

    def _weigh(self, *parts: Tensor) -> Tensor:
        """The log-partition as a function of the parts."""
        return self._in(Log(), parts)[0]

    def _marginals(self) -> Parts:
        return gradient(self._weigh, self._parts)

    def _entropy(self) -> Tensor:
        return self._in(Entropy(), self._parts)[1]

    def _kl(self, other: Structured) -> Tensor:
        semiring = Divergence()
        lifted = tuple(semiring.lift(p, q) for p, q in zip(self._parts, other._parts, strict=True))
        return self._recursion(semiring, lifted)[2]

    def _argmax(self) -> Parts:
        return self._walk(Max(), self._parts)

    def _kbest(self, k: int) -> Parts:
        return self._walk(KMax(k), self._parts, k)

    def _sample(self, n: int, generator: torch.Generator | None) -> Any:
        many = self._repeat(n)
        indicators = many._walk(Sample(generator), many._parts)
        return self._decode(tuple(i.reshape(n, -1, *i.shape[1:]) for i in indicators))

    def _comparable(self, other: Any) -> bool:
        """Whether a divergence from `other`, of the same class, makes sense."""
        return True

    def _in(self, semiring: Semiring, parts: Parts) -> Tensor:
        return self._recursion(semiring, tuple(semiring.lift(p) for p in parts))

    def _complete(self, indicators: Parts) -> Tensor:
        """Mask (batch,): whether the parts with indicator 1 are a structure."""
        # With 1 for these parts and all others excluded, the best structure uses all of them, or they are none.
        parts = tuple(torch.where(i > 0, 1.0, -torch.inf).to(i.dtype) for i in indicators)
        return self._in(Max(), parts)[0] == torch.stack([i.flatten(1).sum(1) for i in indicators]).sum(0)

    def _walk(self, semiring: Semiring, parts: Parts, k: int | None = None) -> Parts:
        """Indicators of what a semiring of choices chose, (k, batch, ...) for k answers; zero where there is none."""
        with _recordable():
            # Derivatives of a transform that encloses this one have nothing to say about a choice.
            parts = tuple(p.clone() if p.is_inference() else p.detach() for p in parts)
            if k is None:
                return gradient(lambda *p: self._in(semiring, p)[0], parts)
            points = [p.requires_grad_() for p in parts]
            scores = self._in(semiring, tuple(points)).unbind(0)
            found = [
                torch.autograd.grad(
                    score[~torch.isneginf(score)].sum(), points, retain_graph=True, materialize_grads=True
                )
                for score in scores
            ]
            return tuple(torch.stack(ranks) for ranks in zip(*found, strict=True))

    def _repeat(self, n: int) -> Structured:
        """Every sample n times, the repetitions outermost."""
        many = copy.copy(self)
        many.__dict__.pop("_lazy", None)
        many._parts = tuple(p.detach().expand(n, *p.shape).flatten(0, 1) for p in self._parts)
        if self.lengths is not None:
            many.lengths = self.lengths.expand(n, *self.lengths.shape).flatten(0, 1)
        return many

    def _score(self, indicators: Parts) -> Tensor:
        """The log-weight (batch,) of the parts with indicator 1."""
        terms = [torch.where(i > 0, p, 0.0).flatten(1).sum(1) for i, p in zip(indicators, self._parts, strict=True)]
        return torch.stack(terms).sum(0)

    def _exists(self, log_partition: Tensor) -> None:
        empty = torch.isneginf(log_partition)
        if any_true(empty):
            first = int(plain(empty).flatten().nonzero()[0])
            cause = "the mask and the potentials" if self._has_mask else "potentials of minus infinity"
            raise ValueError(f"{type(self).__name__}: {cause} leave no structure to sample {first}.")


def gradient(function: Callable[..., Tensor], parts: Parts) -> Parts:
    """The derivative of the sum of `function`'s (batch,) values, differentiable wherever derivatives are recorded."""
    if inside_transform():
        value, pull = torch.func.vjp(function, *parts)[:2]
        return pull(torch.ones_like(value))
    taped = torch.is_grad_enabled() and any(p.requires_grad for p in parts)
    with _recordable():
        points = [p if taped and p.requires_grad else _leaf(p) for p in parts]
        value = function(*points)
        if not value.requires_grad:
            return tuple(torch.zeros_like(p) for p in points)
        return torch.autograd.grad(value.sum(), points, create_graph=taped, materialize_grads=True)


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return not any_true(a != b)


def _leaf(part: Tensor) -> Tensor:
    return (part.clone() if part.is_inference() else part.detach()).requires_grad_()


@contextlib.contextmanager
def _recordable() -> Iterator[None]:
    """Where autograd can be used as a tool, whatever the caller's mode."""
    with torch.inference_mode(False), torch.enable_grad():
        yield
