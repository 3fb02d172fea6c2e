"""Every structure of small distributions, written out: the reference that the recursions are compared with."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from restpoint.solvers import inference

D = torch.float64
Indices = tuple[list[tuple[int, ...]], ...]


@dataclasses.dataclass(frozen=True)
class Case:
    """A distribution at a small size.

    Attributes:
        name: of the case.
        shapes: of the parts, without the batch.
        lengths: of the samples.
        longest: the length without padding.
        build: (parts, lengths) -> distribution.
        structures: length -> every structure, as the indices of the parts that it uses, one list per tensor of parts.
        indices: (structure of one sample, length) -> the same for what the library returned.
    """

    name: str
    shapes: tuple[tuple[int, ...], ...]
    lengths: tuple[int, ...]
    build: Callable[..., Any]
    structures: Callable[[int], Iterator[Indices]]
    indices: Callable[[Any, int], Indices]

    @property
    def batch(self) -> int:
        return len(self.lengths)

    def parts(self, scale: float = 1.0, seed: int = 0, dtype: torch.dtype = D) -> tuple[Tensor, ...]:
        rng = torch.Generator().manual_seed(seed)
        return tuple((scale * torch.randn(self.batch, *s, generator=rng, dtype=D)).to(dtype) for s in self.shapes)

    def distribution(self, parts: tuple[Tensor, ...], **options: Any) -> Any:
        return self.build(parts, torch.tensor(self.lengths), **options)

    def matrix(self, sample: int) -> Tensor:
        """(structures, all parts flattened) of 0 and 1."""
        rows = []
        for structure in self.structures(self.lengths[sample]):
            row = [torch.zeros(s, dtype=D) for s in self.shapes]
            for tensor, used in zip(row, structure, strict=True):
                for index in used:
                    tensor[index] += 1
            rows.append(torch.cat([t.flatten() for t in row]))
        return torch.stack(rows)

    def scores(self, parts: tuple[Tensor, ...], sample: int) -> Tensor:
        """Log-weights of every structure; minus infinity where a part is excluded."""
        flat = self.flat(parts)[sample]
        matrix = self.matrix(sample)
        return torch.where(matrix > 0, matrix * flat, 0.0).sum(1)

    def flat(self, parts: Any) -> Tensor:
        parts = (parts,) if isinstance(parts, Tensor) else parts
        return torch.cat([p.flatten(1) for p in parts], 1)

    def row(self, structure: Any, sample: int) -> Tensor:
        """The indicators (all parts,) of a structure that the library returned."""
        out = [torch.zeros(s, dtype=D) for s in self.shapes]
        for tensor, used in zip(out, self.indices(structure, self.lengths[sample]), strict=True):
            for index in used:
                tensor[index] += 1
        return torch.cat([t.flatten() for t in out])


def pick(structure: Any, *index: int) -> Any:
    """One sample of a structure, which may be a tuple of tensors."""
    if isinstance(structure, Tensor):
        return structure[index]
    return type(structure)(*[s[index] for s in structure])


# Chains


def _states(states: tuple[int, ...]) -> Indices:
    pairs = [(t, a, b) for t, (a, b) in enumerate(itertools.pairwise(states))]
    return pairs, list(enumerate(states))


def chain(length: int, states: int, lengths: tuple[int, ...], **options: Any) -> Case:
    return Case(
        "chain" + "".join(f" {k}" for k in options),
        ((length - 1, states, states), (length, states)),
        lengths,
        lambda parts, lengths: inference.LinearChain(parts[0], parts[1], lengths, **options),
        lambda n: (_states(s) for s in itertools.product(range(states), repeat=n)),
        lambda structure, n: _states(tuple(structure[:n].tolist())),
    )


# Segmentations


def _segments(cuts: list[int], labels: tuple[int, ...]) -> Indices:
    used = [(a, b - a - 1, c) for a, b, c in zip(cuts, cuts[1:], labels)]
    return used, [(cut - 1, a, b) for cut, (a, b) in zip(cuts[1:], itertools.pairwise(labels))]


def _segmentations(n: int, durations: int, labels: int) -> Iterator[Indices]:
    for inner in itertools.product([False, True], repeat=n - 1):
        cuts = [0, *(i + 1 for i, cut in enumerate(inner) if cut), n]
        if max(b - a for a, b in itertools.pairwise(cuts)) <= durations:
            for named in itertools.product(range(labels), repeat=len(cuts) - 1):
                yield _segments(cuts, named)


def _read_segments(structure: Any, n: int) -> Indices:
    starts = [i for i in range(n) if structure.starts[i]]
    assert not structure.starts[n:].any()
    return _segments([*starts, n], tuple(int(structure.labels[i]) for i in starts))


def semi_markov(length: int, durations: int, labels: int, lengths: tuple[int, ...]) -> Case:
    return Case(
        f"semi-Markov {length}",
        ((length, durations, labels), (length - 1, labels, labels)),
        lengths,
        lambda parts, lengths: inference.SemiMarkov(parts[0], parts[1], lengths),
        lambda n: _segmentations(n, durations, labels),
        _read_segments,
    )


# Binary trees


def _bracketings(i: int, j: int) -> Iterator[list[tuple[int, int]]]:
    if i == j:
        yield [(i, i)]
    for k in range(i, j):
        for left in _bracketings(i, k):
            for right in _bracketings(k + 1, j):
                yield [(i, j), *left, *right]


def _labelled(n: int, labels: int) -> Iterator[Indices]:
    for spans in _bracketings(0, n - 1):
        for named in itertools.product(range(labels), repeat=len(spans)):
            yield ([(i, j, c) for (i, j), c in zip(spans, named)],)


def _read_spans(structure: Tensor, n: int) -> Indices:
    return ([(*index, int(structure[index])) for index in map(tuple, (structure >= 0).nonzero().tolist())],)


def constituency(length: int, labels: int, lengths: tuple[int, ...]) -> Case:
    return Case(
        f"constituency {labels}",
        ((length, length, labels),),
        lengths,
        lambda parts, lengths: inference.Constituency(parts[0], lengths),
        lambda n: _labelled(n, labels),
        _read_spans,
    )


# Alignments


def _paths(i: int, j: int) -> Iterator[list[tuple[int, int, int]]]:
    if i == j == 0:
        yield []
    for move, (a, b) in enumerate(((i - 1, j - 1), (i - 1, j), (i, j - 1))):
        if a >= 0 and b >= 0:
            for path in _paths(a, b):
                yield [*path, (i, j, move)]


def alignment(n: int, m: int, lengths: tuple[int, ...]) -> Case:
    """The second sequence is a fixed amount shorter than the first."""

    def build(parts: tuple[Tensor, ...], lengths: Tensor) -> Any:
        pairs = lengths if lengths.shape != (len(parts[0]),) else torch.stack([lengths, lengths + m - n], 1)
        return inference.Alignment(parts[0], pairs)

    return Case(
        "alignment",
        ((n + 1, m + 1, 3),),
        lengths,
        build,
        lambda length: ((path,) for path in _paths(length, length + m - n)),
        _read_spans,
    )


# Dependency trees


def _is_tree(heads: tuple[int, ...]) -> bool:
    for node in range(1, len(heads) + 1):
        for _ in heads:
            node = heads[node - 1] if node else 0
        if node:
            return False
    return True


def _crosses(heads: tuple[int, ...]) -> bool:
    arcs = [tuple(sorted((h, m))) for m, h in enumerate(heads, 1)]
    return any(a < c < b < d for a, b in arcs for c, d in arcs)


def _arcs(heads: tuple[int, ...]) -> Indices:
    return ([(h, m) for m, h in enumerate(heads, 1)],)


def dependency(length: int, lengths: tuple[int, ...], projective: bool, single_root: bool) -> Case:
    def trees(n: int) -> Iterator[Indices]:
        for heads in itertools.product(range(n + 1), repeat=n):
            if _is_tree(heads) and not (projective and _crosses(heads)) and not (single_root and heads.count(0) > 1):
                yield _arcs(heads)

    return Case(
        ("projective" if projective else "spanning") + (" single" if single_root else " multi"),
        ((length + 1, length + 1),),
        lengths,
        lambda parts, lengths: inference.DependencyTree(
            parts[0], lengths, projective=projective, single_root=single_root
        ),
        trees,
        lambda structure, n: _arcs(tuple(structure[:n].tolist())),
    )


CASES = [
    chain(4, 3, (4, 2, 1)),
    chain(5, 2, (4, 5), parallel=True),
    chain(1, 3, (1,)),
    semi_markov(5, 3, 2, (5, 3, 1)),
    semi_markov(3, 5, 2, (3, 3)),
    constituency(4, 2, (4, 3, 1)),
    constituency(5, 1, (5, 2)),
    alignment(4, 3, (4, 2)),
    dependency(4, (4, 3, 1), projective=True, single_root=True),
    dependency(4, (4, 2), projective=True, single_root=False),
    dependency(4, (4, 3, 1), projective=False, single_root=True),
    dependency(4, (4, 2), projective=False, single_root=False),
]
