"""Factor graphs: discrete variables, and factors that weigh some of them together."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ..transforms import all_true, any_true, plain
from . import checks


@dataclasses.dataclass(frozen=True)
class Group:
    """All factors of as many variables.

    Attributes:
        scopes: (factors, arity), the variables of each.
        tables: log-potentials (batch, factors, states, ..., states), minus infinity where a variable has fewer states.
    """

    scopes: Tensor
    tables: Tensor

    @property
    def arity(self) -> int:
        """Variables of each factor."""
        return self.scopes.shape[1]


class FactorGraph:
    """A distribution over discrete variables: the log-weight of an assignment is the sum of its factors' entries.

    Args:
        cardinalities: states of each variable.
        scopes: for each factor the variables that it weighs, different ones, counted from 0.
        tables: for each factor its log-potentials (batch, states of the first variable, states of the second, ...).

    Attributes:
        cardinalities: as given.
        own: what factors of one variable add up to, (batch, variables, states); minus infinity where a variable has
            fewer states than the largest.
        groups: the factors of two variables and more, by how many they have.

    Raises:
        TypeError: tables that are no tensors of floating-point numbers.
        ValueError: not a factor graph: a scope that is empty, repeats a variable or names one that there is not; a
            table of another shape than its variables'; tables of different batches, dtypes or devices; NaN or plus
            infinity; states that exclude one another so that a variable has none left.

    Source: Kschischang, Frey and Loeliger 2001.
    """

    def __init__(
        self,
        cardinalities: Sequence[int],
        scopes: Sequence[Sequence[int] | Tensor],
        tables: Sequence[Float[Tensor, "..."]],
    ) -> None:
        names = _rows(scopes)
        self.cardinalities = tuple(checks.count(c, f"cardinalities[{i}]") for i, c in enumerate(cardinalities))
        if len(names) != len(tables) or not tables:
            raise ValueError(f"expected a table for every scope, and at least one; got {len(tables)} for {len(names)}.")
        states = max(self.cardinalities, default=0)
        by_arity: dict[int, tuple[list[tuple[int, ...]], list[Tensor]]] = {}
        first = checks.potentials(tables[0], "tables[0]", ("batch", *self._shape(names[0], 0)))
        for i, (scope, table) in enumerate(zip(names, tables, strict=True)):
            table = checks.potentials(table, f"tables[{i}]", (len(first), *self._shape(scope, i)))
            checks.alike(table, f"tables[{i}]", first, "tables[0]")
            table = checks.finite(table, f"tables[{i}]")
            pads = [p for size in reversed(table.shape[1:]) for p in (0, states - size)]
            kept = by_arity.setdefault(len(scope), ([], []))
            kept[0].append(tuple(scope))
            kept[1].append(torch.nn.functional.pad(table, pads, value=-math.inf))
        self.own = self._padding(first, states)
        for scope, table in zip(*by_arity.pop(1, ([], [])), strict=True):
            self.own = self.own.index_add(1, torch.tensor(scope, device=first.device), table.unsqueeze(1))
        self.groups = tuple(
            Group(torch.tensor(kept, device=first.device), torch.stack(padded, 1))
            for _, (kept, padded) in sorted(by_arity.items())
        )
        self._finish()

    @classmethod
    def pairwise(
        cls, unary: Float[Tensor, "..."], edges: Sequence[Sequence[int]] | Tensor, potentials: Float[Tensor, "..."]
    ) -> FactorGraph:
        """A graph whose variables have equally many states and whose factors join two.

        Args:
            unary: log-potentials of single variables, (batch, variables, states).
            edges: pairs of variables, also as a tensor (edges, 2).
            potentials: (batch, edges, states of the first, states of the second).

        Raises:
            TypeError, ValueError: as the class.
        """
        graph = cls.__new__(cls)
        pairs = _rows(edges)
        unary = checks.potentials(unary, "unary", ("batch", "variables", "states"))
        batch, variables, states = unary.shape
        graph.cardinalities = (states,) * variables
        for i, edge in enumerate(pairs):
            if len(graph._shape(edge, i)) != 2:
                raise ValueError(f"edges[{i}]: expected two variables, got {tuple(edge)}.")
        potentials = checks.potentials(potentials, "potentials", (batch, len(pairs), states, states))
        checks.alike(potentials, "potentials", unary, "unary")
        graph.own = checks.finite(unary, "unary")
        scopes = torch.tensor([tuple(edge) for edge in pairs], dtype=torch.int64, device=unary.device).reshape(-1, 2)
        graph.groups = (Group(scopes, checks.finite(potentials, "potentials")),)
        graph._finish()
        return graph

    def _shape(self, scope: Sequence[int], i: int) -> tuple[int, ...]:
        """Of the table of a scope, without the batch."""
        variables = len(self.cardinalities)
        if not scope or len(set(scope)) != len(scope):
            raise ValueError(f"scopes[{i}]: expected different variables, at least one; got {tuple(scope)}.")
        for v in scope:
            if isinstance(v, bool) or not isinstance(v, int) or not 0 <= v < variables:
                raise ValueError(f"scopes[{i}]: expected variables from 0 to {variables - 1}; got {tuple(scope)}.")
        return tuple(self.cardinalities[v] for v in scope)

    def _padding(self, like: Tensor, states: int) -> Tensor:
        """Zero for states that there are, minus infinity for others: (batch, variables, states)."""
        sizes = torch.tensor(self.cardinalities, device=like.device).unsqueeze(1)
        pad = like.new_zeros(len(self.cardinalities), states)
        return pad.masked_fill(torch.arange(states, device=like.device) >= sizes, -math.inf).expand(len(like), -1, -1)

    def _finish(self) -> None:
        self.possible = self._consistent()
        empty = ~self.possible.any(2)
        if any_true(empty):
            sample, variable = plain(empty).nonzero()[0].tolist()[-2:]
            raise ValueError(f"the potentials leave no state to variable {variable} of sample {sample}.")

    def _consistent(self) -> Tensor:
        """States (batch, variables, states) that every factor allows together with some possible states of others.

        What minus infinity excludes is known before any number is looked at; the messages about the rest are finite.
        """
        possible = ~torch.isneginf(self.own.detach())
        allowed = [~torch.isneginf(g.tables.detach()) for g in self.groups]
        while True:
            before = possible
            for group, table in zip(self.groups, allowed, strict=True):
                for slot in range(group.arity):
                    joint = table
                    for other in range(group.arity):
                        joint = joint & along(possible[:, group.scopes[:, other]], other, group.arity)
                    rest = [d + 2 for d in range(group.arity) if d != slot]
                    some = joint.any(rest) if rest else joint
                    none = torch.zeros_like(possible, dtype=torch.int64)
                    denied = none.index_add(1, group.scopes[:, slot], (~some).long())
                    possible = possible & (denied == 0)
            if all_true(before == possible):
                return possible

    def __repr__(self) -> str:
        factors = sum(g.scopes.shape[0] for g in self.groups)
        return f"FactorGraph({len(self.cardinalities)} variables, {factors} factors of two variables or more)"


def _rows(scopes: Sequence[Sequence[int] | Tensor] | Tensor) -> list[Sequence[int]]:
    """Scopes as sequences of numbers."""
    return [scope.tolist() if isinstance(scope, Tensor) else scope for scope in scopes]


def along(values: Tensor, slot: int, arity: int) -> Tensor:
    """Values (batch, factors, states) of one variable of each factor, in the dimensions of the factors' tables."""
    shape = [1] * arity
    shape[slot] = values.shape[2]
    return values.reshape(*values.shape[:2], *shape)
