"""Functions of tensors as graphs of primitive operations, in which every tensor that they close over is an input."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from ...tree import StateError
from .reasons import Unfit

_FRESH = (torch.ops.aten.lift_fresh.default, torch.ops.aten.lift_fresh_copy.default)


# A product that contracts so few numbers, and has so few, is cheaper as sums, which the compiler fuses with the rest.
_FEW, _SMALL = 4, 2048


def _few_products(left: Tensor, right: Tensor) -> Any:
    if not 0 < left.shape[1] <= _FEW or len(left) * right.shape[1] > _SMALL:
        return NotImplemented
    columns, rows = left.split(1, 1), right.split(1)
    total = columns[0] * rows[0]
    for column, row in zip(columns[1:], rows[1:]):
        total = total + column * row
    return total


def _few_products_added(bias: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    product = _few_products(left, right) if beta == alpha == 1 else NotImplemented
    return product if product is NotImplemented else bias + product


_DECOMPOSED: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.mm.default: _few_products,
    torch.ops.aten.addmm.default: _few_products_added,
}


@dataclasses.dataclass(frozen=True)
class Traced:
    """A graph and what it takes beside its arguments.

    Attributes:
        graph: a module of the arguments and then of the tensors in `places` and `constants`.
        places: where in the list of known tensors those that the function uses are found.
        constants: tensors that the function makes from numbers.
    """

    graph: GraphModule
    places: tuple[int, ...]
    constants: tuple[Tensor, ...]


def trace(function: Callable[..., Any], inputs: Sequence[Tensor], known: Sequence[Tensor]) -> Traced:
    """The operations of `function` on `inputs`.

    It is run once, so that its choices between branches are those made for these inputs; where one depends on the
    values of tensors it is refused.

    Args:
        function: of tensors, to a tuple of tensors.
        inputs: what it is run on.
        known: the tensors that it may use beside them.

    Raises:
        Unfit: the function cannot be traced, draws random numbers, changes one of its tensors, or uses one that is not
            known.
    """
    versions = [_version(tensor) for tensor in known]
    try:
        graph = make_fx(function, _DECOMPOSED)(*inputs)
    except StateError:
        raise
    except Exception as error:
        raise Unfit(f"the field cannot be traced: {first_line(error)}") from error
    if any(_version(tensor) != version for tensor, version in zip(known, versions)):
        raise Unfit("the field changes a tensor that it closes over")
    for node in graph.graph.nodes:
        if node.op == "call_function" and torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise Unfit(f"the field draws random numbers ({node.target})")
    return _lifted(graph, known)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _lifted(graph: GraphModule, known: Sequence[Tensor]) -> Traced:
    """`graph` with inputs in place of the tensors that it holds."""
    indices = {id(tensor): place for place, tensor in enumerate(known)}
    graph.graph.eliminate_dead_code()
    places: dict[int, list[Node]] = {}
    constants: dict[str, list[Node]] = {}
    for node in graph.graph.find_nodes(op="get_attr"):
        tensor = getattr(graph, str(node.target))
        if id(tensor) in indices:
            places.setdefault(indices[id(tensor)], []).append(node)
        elif all(user.target in _FRESH for user in node.users):
            constants.setdefault(str(node.target), []).append(node)
        else:
            raise Unfit(
                f"the field uses a tensor of shape {tuple(tensor.shape)} that is found neither in its arguments nor in "
                f"its closure, attributes or globals"
            )
    values = tuple(getattr(graph, name) for name in constants)
    held = {str(node.target) for nodes in (*places.values(), *constants.values()) for node in nodes}
    after = graph.graph.find_nodes(op="placeholder")[-1]
    for number, nodes in enumerate(itertools.chain(places.values(), constants.values())):
        with graph.graph.inserting_after(after):
            after = graph.graph.placeholder(f"further_{number}")
        after.meta = dict(nodes[0].meta)
        for node in nodes:
            node.replace_all_uses_with(after)
            graph.graph.erase_node(node)
    for name in held:
        delattr(graph, name)
    graph.recompile()
    return Traced(graph, tuple(places), values)


def first_line(error: BaseException) -> str:
    """What an exception says, in short."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
