"""Exact inference in factor graphs, by eliminating one variable after the other."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .distribution import Parts, Structured
from .graph import FactorGraph
from .semiring import Semiring

LIMIT = 1 << 22
"""Entries of the largest table, for each sample, that is worth trying."""


class AssignmentMarginals(NamedTuple):
    """Marginals of a factor graph.

    Attributes:
        variables: (batch, variables, states); zero for states that a variable does not have.
        factors: as in `Beliefs`, by the number of variables from two on: (batch, factors, states, ..., states).
    """

    variables: Tensor
    factors: tuple[Tensor, ...]


class Assignments(Structured):
    """The assignments of a factor graph, exactly: the reference for `belief_propagation` and `mean_field`.

    A structure is a tensor of states (batch, variables); marginals are `AssignmentMarginals`. Time and memory grow with
    the states to the power of the largest number of variables that are ever joined, the graph's treewidth and one more:
    two for a tree, whatever its size. The order is by the least number of neighbours.

    Args:
        graph: the factors.

    Raises:
        ValueError: some table would have more than 2^22 entries a sample; the message says over how many variables.

    Source: Dechter 1999 (bucket elimination); Rose 1970 (the order).
    """

    def __init__(self, graph: FactorGraph) -> None:
        self.graph = graph
        self.lengths = None
        self._parts = (graph.own, *(g.tables for g in graph.groups))
        self._names = ("own", *(f"factors of {g.arity} variables" for g in graph.groups))
        self._scopes = [scope for g in graph.groups for scope in map(tuple, g.scopes.tolist())]
        self._order = self._plan()

    def _plan(self) -> list[int]:
        """Which variable to eliminate first, second, ..."""
        variables, states = self.graph.own.shape[1:]
        neighbours: dict[int, set[int]] = {v: set() for v in range(variables)}
        for scope in self._scopes:
            for v in scope:
                neighbours[v] |= set(scope) - {v}
        order = []
        while neighbours:
            v = min(neighbours, key=lambda u: (len(neighbours[u]), u))
            others = neighbours.pop(v)
            if states ** (len(others) + 1) > LIMIT:
                raise ValueError(
                    f"Assignments: the graph joins {len(others) + 1} variables of {states} states, which takes a table "
                    f"of more than {LIMIT:,} entries a sample; use belief_propagation."
                )
            for u in others:
                neighbours[u] |= others - {u}
                neighbours[u].discard(v)
            order.append(v)
        return order

    def _recursion(self, semiring: Semiring, parts: Parts) -> Tensor:
        own, *groups = parts
        tables: list[tuple[tuple[int, ...], Tensor]] = [((v,), table) for v, table in enumerate(own.unbind(2))]
        scopes = iter(self._scopes)
        tables += [(next(scopes), table) for group in groups for table in group.unbind(2)]
        total = semiring.ones(own.shape[1:2], own)
        for v in self._order:
            joined = [(scope, table) for scope, table in tables if v in scope]
            tables = [(scope, table) for scope, table in tables if v not in scope]
            # The variable to sum out comes last.
            scope = (*sorted({u for s, _ in joined for u in s} - {v}), v)
            product = semiring.times(*[_aligned(table, s, scope) for s, table in joined])
            rest = semiring.sum(product, -1)
            if len(scope) == 1:
                total = semiring.times(total, rest)
            else:
                tables.append((scope[:-1], rest))
        return total

    def _pack(self, parts: Parts) -> AssignmentMarginals:
        return AssignmentMarginals(parts[0], parts[1:])

    def _decode(self, indicators: Parts) -> Tensor:
        return indicators[0].argmax(-1)

    def _encode(self, structure: Any) -> Parts:
        own = self._parts[0]
        batch, variables, states = own.shape
        if not isinstance(structure, Tensor) or structure.is_floating_point():
            raise ValueError("structure: expected a tensor of integers, the states (batch, variables).")
        if tuple(structure.shape) != (batch, variables):
            raise ValueError(f"structure: expected states of shape {(batch, variables)}, got {tuple(structure.shape)}.")
        sizes = torch.tensor(self.graph.cardinalities, device=structure.device)
        wrong = (structure < 0) | (structure >= sizes)
        if bool(wrong.any()):
            place = tuple(wrong.nonzero()[0].tolist())
            raise ValueError(
                f"structure: the state at {place} is {int(structure[place])}; expected 0 to {int(sizes[place[1]]) - 1}."
            )
        chosen = torch.nn.functional.one_hot(structure, states).to(own.dtype)
        used = []
        for group in self.graph.groups:
            joint = chosen.new_ones(())
            for slot in range(group.arity):
                row = chosen[:, group.scopes[:, slot]]
                joint = joint.unsqueeze(-1) * row.reshape(*row.shape[:2], *(1,) * slot, states) if slot else row
            used.append(joint)
        return chosen, *used

    def _comparable(self, other: Any) -> bool:
        return bool(self._scopes == other._scopes and self.graph.cardinalities == other.graph.cardinalities)


def _aligned(table: Tensor, scope: tuple[int, ...], wanted: tuple[int, ...]) -> Tensor:
    """A table (size, batch, ...) over `scope` with its dimensions in the order of `wanted`, one where it has none."""
    present = [v for v in wanted if v in scope]
    table = table.permute(0, 1, *(scope.index(v) + 2 for v in present))
    return table.reshape(*table.shape[:2], *(table.shape[present.index(v) + 2] if v in scope else 1 for v in wanted))
