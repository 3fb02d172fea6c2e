"""Loopy belief propagation and mean field: approximate marginals as fixed points."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ..fixed_point import FixedPointSolver, Picard, fixed_point
from ..solution import Solution
from .graph import FactorGraph, along
from .semiring import LogSumExp


@dataclasses.dataclass
class Beliefs:
    """Approximate marginals of a factor graph.

    Attributes:
        variables: (batch, variables, states); zero for states that a variable does not have.
        factors: for each number of variables from two on that factors have, in ascending order, their beliefs
            (batch, factors, states, ..., states) in the order of the graph.
        log_partition: (batch,): Bethe's approximation, or mean field's lower bound.
        solution: of the fixed point: status, residual and steps of every sample.
    """

    variables: Tensor
    factors: tuple[Tensor, ...]
    log_partition: Tensor
    solution: Solution[Any] = dataclasses.field(repr=False)

    @property
    def converged(self) -> Tensor:
        """Boolean mask (batch,)."""
        return self.solution.converged


def belief_propagation(
    graph: FactorGraph,
    *,
    solver: FixedPointSolver | None = None,
    adjoint: Any = None,
    rtol: float = 1e-6,
    atol: float = 1e-9,
    max_steps: int = 200,
    throw: bool | str = "warn",
) -> Beliefs:
    """Marginals by sum-product messages: exact on trees, an approximation where the graph has loops.

    The messages, logarithms with mean zero, are a fixed point, and the result is differentiated through it, not through
    the steps that found it. On loopy graphs with strong potentials there may be several fixed points, or none that the
    steps reach: `converged` says so per sample; more damping may help.

    Args:
        graph: the factors; at least one has two variables.
        solver: None takes `Picard(0.7)`, damped messages.
        adjoint: as in `fixed_point`; None takes `ImplicitAdjoint()`.
        rtol: on the messages.
        atol: on the messages.
        max_steps: the largest number of rounds, in each of which every factor sends to all of its variables.
        throw: "warn" warns, True raises, where messages do not converge; False does nothing.

    Returns:
        Beliefs, with Bethe's log-partition, whose derivative the beliefs are.

    Raises:
        ValueError: no factor has two variables.
        SolverError: see `throw`.

    Source: Pearl 1988; Kschischang et al. 2001; Yedidia, Freeman and Weiss 2005 (the Bethe free energy).
    """
    _connected(graph)
    tables = tuple(g.tables for g in graph.groups)
    scopes = tuple(g.scopes for g in graph.groups)
    own = graph.own.masked_fill(~graph.possible, 0.0)
    start = tuple(t.new_zeros(*t.shape[:2], s.shape[1], own.shape[2]) for t, s in zip(tables, scopes, strict=True))

    def send(messages: tuple[Tensor, ...], own: Tensor, possible: Tensor, *tables: Tensor) -> tuple[Tensor, ...]:
        total = _collect(own, scopes, messages)
        sent = []
        for scope, table, message in zip(scopes, tables, messages, strict=True):
            joint, arity = _joint(scope, table, message, total, possible)
            rows = []
            for slot in range(arity):
                incoming = joint - along(_cavity(scope, message, total, possible, slot), slot, arity)
                rows.append(_without(incoming, slot, arity))
            new, there = torch.stack(rows, 2), possible[:, scope]
            new = new.masked_fill(~there, 0.0)
            mean = new.sum(3, keepdim=True) / there.sum(3, keepdim=True)
            sent.append((new - mean).masked_fill(~there, 0.0))
        return tuple(sent)

    solution = fixed_point(
        send, start, (own, graph.possible, *tables), solver=Picard(0.7) if solver is None else solver, adjoint=adjoint,
        rtol=rtol, atol=atol, max_steps=max_steps, throw=throw,
    )  # fmt: skip
    messages = solution.value
    total = _collect(own, scopes, messages)
    variables = total.masked_fill(~graph.possible, -torch.inf).softmax(2)
    factors = []
    degree = torch.ones(len(graph.cardinalities), dtype=own.dtype, device=own.device)
    value = _average(variables, own) + 0.0
    for scope, table, message in zip(scopes, tables, messages, strict=True):
        joint, _ = _joint(scope, table, message, total, graph.possible)
        belief = joint.flatten(2).softmax(2).reshape(joint.shape)
        factors.append(belief)
        value = value + _average(belief, table) + _entropy(belief).flatten(1).sum(1)
        degree = degree.index_add(0, scope.flatten(), degree.new_full((scope.numel(),), -1.0))
    value = value + (_entropy(variables).sum(2) * degree).sum(1)
    return Beliefs(variables, tuple(factors), value, solution)


def mean_field(
    graph: FactorGraph,
    *,
    solver: FixedPointSolver | None = None,
    adjoint: Any = None,
    rtol: float = 1e-6,
    atol: float = 1e-9,
    max_steps: int = 200,
    throw: bool | str = "warn",
) -> Beliefs:
    """Marginals of the product distribution that bounds the log-partition best, as far as the steps find it.

    Args:
        graph: the factors; at least one has two variables. Minus infinity may exclude states of single variables, but
            no combinations, which no product can exclude alone.
        solver: None takes `Picard(0.5)`.
        adjoint, rtol, atol, max_steps, throw: as in `belief_propagation`.

    Returns:
        Beliefs; those of factors are products. `log_partition` is a lower bound.

    Raises:
        ValueError: no factor has two variables; a factor of two variables or more excludes combinations.
        SolverError: see `throw`.

    Source: Jordan, Ghahramani, Jaakkola and Saul 1999; Wainwright and Jordan 2008, section 5.3.
    """
    _connected(graph)
    scopes = tuple(g.scopes for g in graph.groups)
    start = graph.own.detach().softmax(2)
    tables = []
    for group in graph.groups:
        real = torch.ones_like(group.tables, dtype=torch.bool)
        for slot in range(group.arity):
            real = real & along(graph.possible[:, group.scopes[:, slot]], slot, group.arity)
        if bool((real & torch.isneginf(group.tables)).any()):
            raise ValueError(
                f"mean_field: a factor of {group.arity} variables excludes combinations by minus infinity, and a "
                "product distribution cannot; use belief_propagation, or a large negative number."
            )
        tables.append(group.tables.masked_fill(~real, 0.0))
    own = graph.own.masked_fill(~graph.possible, 0.0)

    def update(q: Tensor, own: Tensor, possible: Tensor, *tables: Tensor) -> Tensor:
        total = own
        for scope, table in zip(scopes, tables, strict=True):
            arity = scope.shape[1]
            for slot in range(arity):
                joint = table
                for other in range(arity):
                    if other != slot:
                        joint = joint * along(q[:, scope[:, other]], other, arity)
                rest = [d + 2 for d in range(arity) if d != slot]
                total = total.index_add(1, scope[:, slot], joint.sum(rest))
        return total.masked_fill(~possible, -torch.inf).softmax(2)

    solution = fixed_point(
        update, start, (own, graph.possible, *tables), solver=Picard(0.5) if solver is None else solver,
        adjoint=adjoint, rtol=rtol, atol=atol, max_steps=max_steps, throw=throw,
    )  # fmt: skip
    q = solution.value
    value = _average(q, own) + _entropy(q).flatten(1).sum(1)
    factors = []
    for scope, table in zip(scopes, tables, strict=True):
        belief = torch.ones_like(table)
        for slot in range(scope.shape[1]):
            belief = belief * along(q[:, scope[:, slot]], slot, scope.shape[1])
        factors.append(belief)
        value = value + _average(belief, table)
    return Beliefs(q, tuple(factors), value, solution)


def _connected(graph: FactorGraph) -> None:
    if not any(len(g.scopes) for g in graph.groups):
        raise ValueError("the graph has no factor of two variables or more: its variables are independent.")


def _collect(own: Tensor, scopes: tuple[Tensor, ...], messages: tuple[Tensor, ...]) -> Tensor:
    """What every variable hears: (batch, variables, states)."""
    for scope, message in zip(scopes, messages, strict=True):
        own = own.index_add(1, scope.flatten(), message.flatten(1, 2))
    return own


def _cavity(scope: Tensor, message: Tensor, total: Tensor, possible: Tensor, slot: int) -> Tensor:
    """What a variable of each factor heard from elsewhere; zero for states that it cannot have."""
    there = possible[:, scope[:, slot]]
    return (total[:, scope[:, slot]] - message[:, :, slot]).masked_fill(~there, 0.0)


def _joint(scope: Tensor, table: Tensor, message: Tensor, total: Tensor, possible: Tensor) -> tuple[Tensor, int]:
    """Log-weights of each factor's assignments in the light of what its variables heard, and its variables' number."""
    arity = scope.shape[1]
    for slot in range(arity):
        there = along(possible[:, scope[:, slot]], slot, arity)
        heard = along(_cavity(scope, message, total, possible, slot), slot, arity)
        table = (table + heard).masked_fill(~there, -torch.inf)
    return table, arity


def _without(joint: Tensor, slot: int, arity: int) -> Tensor:
    """Sum (batch, factors, states) over all variables of each factor but one."""
    out: Tensor = LogSumExp.apply(joint.movedim(slot + 2, 2).flatten(3), -1)
    return out


def _average(belief: Tensor, table: Tensor) -> Tensor:
    """(batch,): what is excluded has no weight."""
    return (belief * table.masked_fill(torch.isneginf(table), 0.0)).flatten(1).sum(1)


def _entropy(belief: Tensor) -> Tensor:
    """-p log p, with derivatives where p is zero."""
    positive = belief > 0
    return -belief * torch.where(positive, belief, 1.0).log()
