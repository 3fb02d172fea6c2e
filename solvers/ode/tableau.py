"""Butcher tableaus that derive their own properties: order, embedded order, interpolant and its order."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

Tree = tuple[Any, ...]
Row = tuple[float, ...]

_EXACT = 1e-12
_HIGHEST_ORDER = 9


@functools.cache
def rooted_trees(order: int) -> tuple[Tree, ...]:
    """All rooted trees with `order` vertices; a tree is the sorted tuple of its root's subtrees.

    Source: Hairer, Norsett, Wanner 1993, section II.2.
    """
    return tuple(_forests(order - 1, order - 1))


def _forests(vertices: int, largest: int) -> Iterator[Tree]:
    """Multisets of trees with `vertices` vertices in all, none of them larger than `largest`."""
    if vertices == 0:
        yield ()
        return
    for size in range(min(vertices, largest), 0, -1):
        for first in rooted_trees(size):
            for rest in _forests(vertices - size, size):
                # Trees of one size are counted once: in the order in which `rooted_trees` lists them.
                if not rest or _rank(rest[0]) <= _rank(first):
                    yield (first, *rest)


@functools.cache
def tree_order(tree: Tree) -> int:
    """The number of vertices."""
    return 1 + sum(map(tree_order, tree))


@functools.cache
def tree_density(tree: Tree) -> int:
    """gamma: the product over all vertices of the size of the subtree that grows from it."""
    return tree_order(tree) * math.prod(map(tree_density, tree))


@functools.cache
def _rank(tree: Tree) -> tuple[int, tuple]:
    return tree_order(tree), tuple(map(_rank, tree))


@dataclasses.dataclass(frozen=True)
class Tableau:
    """The coefficients of a Runge-Kutta method with s stages.

    Stage i is k_i = f(t + c_i h, y + h sum_j a_ij k_j), the step y1 = y + h sum_i b_i k_i, its error estimate
    h sum_i error_i k_i. Row sums of `a` are c. Dense output takes the first s stages and those of `extra`, which are
    evaluated only where it is asked for: y(theta) = y + h sum_p theta^p sum_i interpolant[p - 1][i] k_i.

    Attributes:
        a: s rows; row i of an explicit method has i entries, of a diagonally implicit one i + 1.
        b: s weights.
        error: s weights, b minus those of the embedded method; None without one.
        extra: further rows, each as long as there are stages before it.
        weights: the rows of a method's own interpolant, one for each power of theta from 1; None takes the cubic
            Hermite interpolant.

    Source: Hairer, Norsett, Wanner 1993, chapter II.
    """

    a: tuple[Row, ...]
    b: Row
    error: Row | None = None
    extra: tuple[Row, ...] = ()
    weights: tuple[Row, ...] | None = None

    @functools.cached_property
    def stages(self) -> int:
        """s, without the extra ones of the dense output."""
        return len(self.b)

    @functools.cached_property
    def c(self) -> Row:
        """The stages' times, the extra ones included, as fractions of the step."""
        return tuple(_tidy(math.fsum(row)) for row in self.rows)

    @functools.cached_property
    def explicit(self) -> bool:
        """Whether every stage depends on earlier ones only."""
        return all(len(row) <= i or not any(row[i:]) for i, row in enumerate(self.a))

    @functools.cached_property
    def fsal(self) -> bool:
        """Whether the first stage is the derivative at the start and the last one that at the end of the step."""
        last = self.a[-1] + (0.0,) * (self.stages - len(self.a[-1]))
        return not any(self.a[0]) and _close(last, self.b) and abs(math.fsum(last) - 1) < _EXACT

    @functools.cached_property
    def rows(self) -> tuple[Row, ...]:
        """The rows of all stages, extra ones included.

        Without first-same-as-last the first extra stage is the derivative at the end of the step: the dense output
        needs it, and the next step takes it over.
        """
        end = () if self.fsal else (self.b,)
        return self.a + end + self.extra

    @functools.cached_property
    def end(self) -> int:
        """Which stage is the derivative at the end of the step."""
        return self.stages - 1 if self.fsal else self.stages

    @functools.cached_property
    def interpolant(self) -> tuple[Row, ...]:
        """The dense output's rows, one for each power of theta from 1, all stages wide."""
        width = len(self.rows)
        if self.weights is not None:
            return tuple(row + (0.0,) * (width - len(row)) for row in self.weights)
        b = self.b + (0.0,) * (width - self.stages)
        start, end = _unit(0, width), _unit(self.end, width)
        return (
            start,
            tuple(3 * x - 2 * s - e for x, s, e in zip(b, start, end)),
            tuple(-2 * x + s + e for x, s, e in zip(b, start, end)),
        )

    def order_defects(self, order: int) -> list[float]:
        """What the weights `b` miss of each order condition with exactly `order` vertices."""
        return [_dot(self.b, self._elementary(tree)) - 1 / tree_density(tree) for tree in rooted_trees(order)]

    def embedded_defects(self, order: int) -> list[float]:
        """The same for the embedded weights b - error."""
        assert self.error is not None
        weights = tuple(b - e for b, e in zip(self.b, self.error))
        return [_dot(weights, self._elementary(tree)) - 1 / tree_density(tree) for tree in rooted_trees(order)]

    def interpolant_defects(self, order: int) -> list[float]:
        """The same for the dense output, coefficient by coefficient of its powers of theta.

        The weights must satisfy sum_i b_i(theta) Phi_i(tree) = theta^order / gamma(tree) for every theta.
        """
        degree = len(self.interpolant)
        return [
            _dot(row, self._elementary(tree)) - (1 / tree_density(tree) if power == order else 0.0)
            for tree in rooted_trees(order)
            for power, row in enumerate(self.interpolant, start=1)
        ] + ([1.0] if degree < order else [])

    @functools.cached_property
    def order(self) -> int:
        """Of y1: the largest order whose conditions hold up to rounding."""
        return _satisfied(self.order_defects)

    @functools.cached_property
    def embedded_order(self) -> int:
        """Of the embedded solution."""
        return _satisfied(self.embedded_defects)

    @functools.cached_property
    def interpolant_order(self) -> int:
        """Of the dense output, for every theta."""
        return _satisfied(self.interpolant_defects)

    @functools.cached_property
    def twins(self) -> tuple[int, int] | None:
        """Two late stages at the same time, by whose difference one tells how fast the field changes with the state."""
        for second in range(self.stages - 1, 1, -1):
            for first in range(second - 1, 0, -1):
                if self.c[first] == self.c[second]:
                    return first, second
        return None

    @functools.cached_property
    def apart(self) -> Row:
        """The weights of the stages in the difference of the twins' arguments, over h."""
        assert self.twins is not None
        first, second = (self.rows[i] for i in self.twins)
        return tuple(b - (first[i] if i < len(first) else 0.0) for i, b in enumerate(second[: self.twins[1]]))

    @functools.cached_property
    def reach(self) -> float:
        """The longest step h, of an explicit method, for which y' = -y does not grow."""
        powers, terms = (1.0,) * self.stages, [1.0]
        for _ in range(self.stages):
            terms.append(_dot(self.b, powers))
            powers = tuple(_dot(row, powers) for row in self.a)
        h = 0.0
        while abs(sum(term * (-h) ** k for k, term in enumerate(terms))) <= 1 + _EXACT:
            h += 1e-3
        return h

    def _elementary(self, tree: Tree) -> Row:
        return _elementary_weights(self, tree)


@functools.lru_cache(maxsize=20000)
def _elementary_weights(tableau: Tableau, tree: Tree) -> Row:
    """Phi_i(tree) of every stage: the product over the root's subtrees of sum_j a_ij Phi_j(subtree)."""
    factors = [_elementary_weights(tableau, child) for child in tree]
    return tuple(math.prod(_dot(row, weights) for weights in factors) for row in tableau.rows)


def _satisfied(defects: object) -> int:
    assert callable(defects)
    for order in range(1, _HIGHEST_ORDER + 1):
        if any(abs(defect) > _EXACT for defect in defects(order)):
            return order - 1
    return _HIGHEST_ORDER


def _dot(row: Sequence[float], values: Sequence[float]) -> float:
    return math.fsum(x * v for x, v in zip(row, values))


def _unit(index: int, width: int) -> Row:
    return tuple(float(i == index) for i in range(width))


def _close(left: Row, right: Row) -> bool:
    return len(left) == len(right) and all(abs(x - y) < _EXACT for x, y in zip(left, right))


def _tidy(value: float) -> float:
    """A row sum without its rounding, where it is a whole number."""
    return float(round(value)) if abs(value - round(value)) < _EXACT else value
