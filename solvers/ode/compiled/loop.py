"""A loop over a traced body, as one compiled program."""

from __future__ import annotations

import contextlib
import contextvars
import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from .reasons import Unfit
from .trace import Traced, first_line, trace

_interpreted = contextvars.ContextVar("interpreted", default=False)


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Solves inside run their traced graphs one operation after another, as a test of these or to look for a fault."""
    token = _interpreted.set(True)
    try:
        yield
    finally:
        _interpreted.reset(token)


def is_interpreted() -> bool:
    """Whether solves do so."""
    return _interpreted.get()


class Loop:
    """Repeats a body on carried tensors while a condition holds; fixed tensors may be written in place."""

    def __init__(
        self,
        functions: tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, ...]]],
        carried: Sequence[Tensor],
        fixed: Sequence[Tensor],
        known: Sequence[Tensor],
        written: range = range(0),
        compiled: bool = True,
    ) -> None:
        """Trace and compile.

        Args:
            functions: condition and body, of the carried tensors and then the fixed ones.
            carried, fixed: such as the loop will be given.
            known: other tensors that the body may use.
            written: which of the fixed ones the body writes to.
            compiled: whether to compile the traced graph, or to run it one operation after another.

        Raises:
            Unfit: the body cannot be traced, or not be compiled here.
        """
        condition, body = functions
        traced = trace(body, [*carried, *fixed], known)
        self._places, self._constants = traced.places, traced.constants
        count = len(self._places) + len(self._constants)

        def test(*tensors: Tensor) -> Tensor:
            return condition(*tensors[: len(tensors) - count])

        inputs = [*carried, *fixed, *self._further(known)]
        program = _program(trace(test, inputs, ()), traced, len(carried), len(inputs), written)
        self._run = _compiled(program, inputs) if compiled else program

    def __call__(self, carried: Sequence[Tensor], fixed: Sequence[Tensor], known: Sequence[Tensor]) -> list[Tensor]:
        """The carried tensors when the condition holds no more."""
        return list(self._run(*carried, *fixed, *self._further(known)))

    def _further(self, known: Sequence[Tensor]) -> list[Tensor]:
        return [*(known[place].detach() for place in self._places), *self._constants]


def _program(test: Traced, body: Traced, carried: int, count: int, written: range) -> fx.GraphModule:
    """The loop as a graph of one operation."""
    graph, root = fx.Graph(), nn.Module()
    root.condition, root.body = test.graph, body.graph
    inputs = [graph.placeholder(f"input_{i}") for i in range(count)]
    parts = graph.get_attr("condition"), graph.get_attr("body")
    indices: dict[str, Any] = {"mutated_arg_indices": ",".join(str(carried + i) for i in written)} if written else {}
    loop = graph.call_function(
        torch.ops.higher_order.while_loop, (*parts, tuple(inputs[:carried]), tuple(inputs[carried:])), indices
    )
    graph.output(tuple(graph.call_function(operator.getitem, (loop, i)) for i in range(carried)))
    return fx.GraphModule(root, graph)


def _compiled(program: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Sequence[Tensor]]:
    """By inductor, with the loop in C++ on a CPU."""
    import torch._inductor

    fake = FakeTensorMode(shape_env=ShapeEnv())
    # Of each its own copy: tensors that are the same here need not be so next time.
    examples: list[Any] = [fake.from_tensor(tensor.detach(), static_shapes=True) for tensor in inputs]
    options = {"cpp_wrapper": all(tensor.device.type == "cpu" for tensor in inputs)}
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            run = torch._inductor.compile(program, examples, options=options)
    except Exception as error:
        raise Unfit(f"the compiler gave up: {first_line(error)}") from error
    return run
