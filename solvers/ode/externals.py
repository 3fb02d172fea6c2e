"""Which tensors, besides its arguments, a function's derivative reaches: parameters and whatever it closes over."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..solution import SolverError

Edge = tuple[Node, int]


class Externals:
    """The tensors that a function uses without being given them, found by walking a recorded evaluation.

    The walk stops at leaves and at tensors that were computed before the evaluation. Where such a tensor depends on
    another one of them, it is replaced by the leaves behind it, so that no derivative is counted twice.

    Attributes:
        tensors: none of them depends on another.
        retain: whether derivatives reach through graphs recorded before the evaluation, which must then be kept.
        evaluations: how many it took to find them.
        recorded: the derivative as the last of these found it; None once it is not needed any more.
        constants: what the function closes over besides, see `constants`.
    """

    def __init__(self, evaluate: Callable[[], Tensor], field: Callable[..., Any], inputs: Iterable[Tensor]) -> None:
        """Record `evaluate()` and look through `field`; `inputs` are the leaves made for the evaluation itself."""
        mine = {_edge(tensor)[0] for tensor in inputs}
        found, self.evaluations = self._discover(evaluate, mine)
        search = _Search()
        search.visit(field, 0, False)
        for tensor in search.found.values():
            found.setdefault(_edge(tensor), tensor)
        self.constants = list(search.constants.values())
        self.tensors, self.retain = _independent(found)
        self._known = mine | {edge[0] for edge in map(_edge, self.tensors)}

    def _discover(self, evaluate: Callable[[], Tensor], mine: set[Node]) -> tuple[dict[Edge, Tensor], int]:
        start = clock()
        self.recorded: Tensor | None = evaluate()
        edges = _outer_edges(self.recorded, mine, start)
        found = {edge: variable for edge in edges if (variable := _variable(edge[0])) is not None}
        if len(found) == len(edges):
            return found, 1
        with _Sightings() as sightings:
            self.recorded = evaluate()
        edges = _outer_edges(self.recorded, mine, start)
        for edge in edges:
            tensor = _variable(edge[0])
            if tensor is None:
                tensor = sightings.seen.get(edge)
            if tensor is not None:
                found[edge] = tensor
            else:
                found |= {_edge(leaf): leaf for leaf in _leaves_behind(edge[0])}
        return found, 2

    def check(self, out: Tensor, own: tuple[Tensor, ...], start: int, where: Callable[[], str]) -> None:
        """Make sure that a recorded evaluation `out`, begun at clock `start`, uses no others than these and `own`.

        Raises:
            SolverError: it does, and its derivative with respect to them would be lost.
        """
        if self.retain or not self._reaches_others(out, own, start):
            return
        raise SolverError(
            f"{where()} the field used a tensor that requires a gradient and that it did not use at the start, so this "
            f"adjoint would miss its derivative. Pass it through args, make the field an nn.Module that owns it, or "
            f"choose adjoint=DirectAdjoint()."
        )

    def _reaches_others(self, out: Tensor, own: tuple[Tensor, ...], start: int) -> bool:
        # As `_outer_edges`, for the inner loop of a backward pass.
        known, leaf, time, seen = self._known, own[0], own[-1], set()
        root = out.grad_fn
        if root is None or root in known or root._sequence_nr() < start:
            return _edge(out)[0] not in known
        stack = [root]
        while stack:
            for child, _ in stack.pop().next_functions:
                if child is None or child in known or child in seen:
                    continue
                seen.add(child)
                if type(child) is _LEAF:
                    variable = _variable(child)
                    if variable is not leaf and variable is not time:
                        return True
                elif child._sequence_nr() < start:
                    return True
                else:
                    stack.append(child)
        return False


def clock() -> int:
    """A number larger than that of every autograd node recorded so far, and at most that of every later one."""
    with torch.enable_grad():
        probe = torch.zeros((), requires_grad=True).clone()
    assert probe.grad_fn is not None
    return probe.grad_fn._sequence_nr()


# The node in which a derivative reaches a leaf.
_LEAF = type(torch.zeros((), requires_grad=True).view(()).grad_fn.next_functions[0][0])  # type: ignore[union-attr]


def computed_attributes(field: Any) -> list[Tensor]:
    """Tensors requiring a gradient that objects within a callable hold as attributes, and that are no leaves."""
    search = _Search()
    search.visit(field, 0, False)
    return list(search.computed.values())


def constants(field: Any) -> list[Tensor]:
    """Tensors that a callable closes over, or is given, and that the derivative does not reach as leaves.

    Neither buffers nor other attributes of objects, which may change without a meaning for the callable.
    """
    search = _Search()
    search.visit(field, 0, False)
    return list(search.constants.values())


_DEEPEST, _LONGEST = 8, 1000
_MODULE = frozenset(vars(nn.Module()))


class _Search:
    """A walk through what a callable holds.

    Attributes:
        found: parameters, what functions close over, and leaves among attributes.
        computed: the other attributes, which may be left over from earlier work, and the graphs behind them be gone.
        constants: no attributes, and no leaves that require a gradient.
    """

    def __init__(self) -> None:
        self.constants: dict[int, Tensor] = {}
        self.found: dict[int, Tensor] = {}
        self.computed: dict[int, Tensor] = {}
        self._seen: set[int] = set()

    def visit(self, thing: Any, depth: int, attribute: bool) -> None:
        """Look at `thing`; `attribute` says whether the way to it led through an object's attributes."""
        if id(thing) in self._seen or depth > _DEEPEST:
            return
        self._seen.add(id(thing))
        if isinstance(thing, Tensor):
            if not attribute and not (thing.requires_grad and thing.is_leaf):
                self.constants[id(thing)] = thing
            if thing.requires_grad:
                (self.computed if attribute and not thing.is_leaf else self.found)[id(thing)] = thing
        elif isinstance(thing, nn.Module):
            for parameter in thing.parameters():
                self.visit(parameter, depth, attribute)
            for module in thing.modules():
                self._attributes(module, depth)
        elif isinstance(thing, functools.partial):
            for part in (thing.func, *thing.args, *thing.keywords.values()):
                self.visit(part, depth + 1, attribute)
        elif isinstance(thing, (list, tuple, dict)):
            for part in thing.values() if isinstance(thing, dict) else thing:
                if len(thing) <= _LONGEST:
                    self.visit(part, depth + 1, attribute)
        elif callable(thing):
            for part in _held(thing):
                self.visit(part, depth + 1, attribute)
            for holder in (thing, getattr(thing, "__self__", None)):
                self._attributes(holder, depth)

    def _attributes(self, thing: Any, depth: int) -> None:
        """Look at what an object holds, but not at all that a class or a module of Python holds."""
        if isinstance(thing, (type, types.ModuleType)):
            return
        for name, value in getattr(thing, "__dict__", {}).items():
            if name not in _MODULE:
                self.visit(value, depth + 1, True)


def _held(thing: Any) -> list[Any]:
    """What a function or method refers to."""
    held = [owner] if callable(owner := getattr(thing, "__self__", None)) else []
    wrapped = getattr(thing, "__wrapped__", None) or getattr(thing, "__func__", None)
    held += [wrapped] if wrapped is not None else []
    for cell in getattr(thing, "__closure__", None) or ():
        try:
            held.append(cell.cell_contents)
        except ValueError:
            continue
    code, names = getattr(thing, "__code__", None), getattr(thing, "__globals__", None)
    if code is not None and names is not None:
        kinds = (Tensor, nn.Module)
        held += [names[name] for name in code.co_names if isinstance(names.get(name), kinds)]
    held += list(getattr(thing, "__defaults__", None) or ())
    return held


class _Sightings(TorchFunctionMode):
    """Remembers every non-leaf tensor that is handed to a torch function, by its place in the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[Edge, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in pytree.tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and tensor.requires_grad and not tensor.is_leaf:
                self.seen.setdefault((tensor.grad_fn, tensor.output_nr), tensor)  # type: ignore[arg-type]
        return func(*args, **(kwargs or {}))


def _edge(tensor: Tensor) -> Edge:
    edge = get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def _variable(node: Node) -> Tensor | None:
    """The leaf that a node accumulates into, or None for any other node."""
    return getattr(node, "variable", None)  # as only AccumulateGrad has it


def leaves_since(out: Tensor, start: int) -> list[Tensor]:
    """The leaves that a recording made since clock `start` reaches without passing through an older node."""
    leaves = [_variable(node) for node, _ in _outer_edges(out, set(), start)] if out.requires_grad else []
    return [leaf for leaf in leaves if leaf is not None]


def _outer_edges(out: Tensor, mine: set[Node], start: int) -> list[Edge]:
    """Edges from nodes recorded since clock `start` to leaves and to older nodes, without those in `mine`."""
    edges: dict[Edge, None] = {}
    if out.grad_fn is None:
        return [_edge(out)] if out.requires_grad and _edge(out)[0] not in mine else []
    stack, seen = [(out.grad_fn, out.output_nr)], {out.grad_fn}
    while stack:
        node, number = stack.pop()
        # Leaves count as recorded last of all.
        if node._sequence_nr() < start or not node.next_functions:
            if node not in mine:
                edges[node, number] = None
            continue
        for child in node.next_functions:
            if child[0] is not None and (child[0] not in seen or child[0]._sequence_nr() < start):
                seen.add(child[0])
                stack.append(child)  # type: ignore[arg-type]
    return list(edges)


def _ancestors(node: Node) -> set[Node]:
    stack, seen = [node], {node}
    while stack:
        for child, _ in stack.pop().next_functions:
            if child is not None and child not in seen:
                seen.add(child)
                stack.append(child)
    return seen


def _leaves_behind(node: Node) -> list[Tensor]:
    return [leaf for ancestor in _ancestors(node) if (leaf := _variable(ancestor)) is not None]


def _independent(found: dict[Edge, Tensor]) -> tuple[list[Tensor], bool]:
    """The tensors, those that depend on others of them replaced by the leaves behind, and whether any were."""
    retain = False
    result = dict(found)
    again = True
    while again:
        again = False
        nodes = {edge[0] for edge in result}
        for edge, tensor in list(result.items()):
            if tensor.is_leaf or not (_ancestors(edge[0]) - {edge[0]}) & nodes:
                continue
            del result[edge]
            result |= {_edge(leaf): leaf for leaf in _leaves_behind(edge[0])}
            retain = again = True
            break
    return list(result.values()), retain
