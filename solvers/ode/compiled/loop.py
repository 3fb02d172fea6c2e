"""A loop over a traced body, as one compiled program."""

from __future__ import annotations

import contextlib
import contextvars
import enum
import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from .reasons import Unfit
from .replayed import Replayed
from .trace import Traced, first_line, trace


class Mode(enum.Enum):
    """How loops run.

    Attributes:
        COMPILED: by programs of inductor: on a CPU a loop in C++, on a GPU a pass that is replayed as a CUDA graph.
        INTERPRETED: their traced graphs, one operation after another.
        REPLAYED: as on a GPU, but for compilation and capture.
    """

    COMPILED = enum.auto()
    INTERPRETED = enum.auto()
    REPLAYED = enum.auto()


_mode = contextvars.ContextVar("mode", default=Mode.COMPILED)


@contextlib.contextmanager
def interpreted(mode: Mode = Mode.INTERPRETED) -> Iterator[None]:
    """Solves inside are traced and not compiled, to test them or to look for a fault."""
    token = _mode.set(mode)
    try:
        yield
    finally:
        _mode.reset(token)


def current_mode() -> Mode:
    """How loops that are made now will run."""
    return _mode.get()


class Loop:
    """Repeats a body on carried tensors while a condition holds; fixed tensors may be written in place."""

    def __init__(
        self,
        functions: tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, ...]]],
        carried: Sequence[Tensor],
        fixed: Sequence[Tensor],
        known: Sequence[Tensor],
        written: range = range(0),
        mode: Mode = Mode.COMPILED,
    ) -> None:
        """Trace and compile.

        Args:
            functions: condition and body, of the carried tensors and then the fixed ones.
            carried, fixed: such as the loop will be given.
            known: other tensors that the body may use.
            written: which of the fixed ones the body writes to.
            mode: how it is to run.

        Raises:
            Unfit: the body cannot be traced, or not be compiled here.
        """
        self._functions, self._count, self._written, self._mode = functions, len(carried), written, mode
        self._run: Callable[..., Sequence[Tensor]]
        inputs = [*carried, *fixed]
        if mode is Mode.REPLAYED or (mode is Mode.COMPILED and inputs[0].is_cuda):
            self._run = self._replayed(inputs, known)
        else:
            self._run = self._looped(inputs, known)
        del self._functions

    def _looped(self, inputs: list[Tensor], known: Sequence[Tensor]) -> Callable[..., Sequence[Tensor]]:
        """The loop as part of the program."""
        condition, body = self._functions
        traced = trace(body, inputs, known)
        self._places, self._constants = traced.places, traced.constants
        count = len(inputs)

        def test(*tensors: Tensor) -> Tensor:
            return condition(*tensors[:count])

        inputs = [*inputs, *self._further(known)]
        program = _program(trace(test, inputs, ()), traced, self._count, len(inputs), self._written)
        return _compiled(program, inputs) if self._mode is Mode.COMPILED else program

    def _replayed(self, inputs: list[Tensor], known: Sequence[Tensor]) -> Callable[..., Sequence[Tensor]]:
        """A pass as the program, which is replayed."""
        condition, body = self._functions
        count = self._count

        def once(*tensors: Tensor) -> tuple[Tensor, ...]:
            goes_on = condition(*tensors)
            new = [torch.where(goes_on, new, old) for new, old in zip(body(*tensors), tensors[:count])]
            return (*new, condition(*new, *tensors[count:]))

        traced = trace(once, inputs, known)
        self._places, self._constants = traced.places, traced.constants
        inputs = [*inputs, *self._further(known)]
        program = _compiled(traced.graph, inputs) if self._mode is Mode.COMPILED else traced.graph
        try:
            return Replayed(program, count, inputs, self._written)
        except RuntimeError as error:
            raise Unfit(f"its steps cannot be captured as a CUDA graph: {first_line(error)}") from error

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

    for module in program.modules():
        if isinstance(module, fx.GraphModule):
            _without_alpha(module)
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


def _without_alpha(program: fx.GraphModule) -> None:
    """Write x + alpha y in two operations: where y is a product of matrices, inductor fuses it with the sum, and in
    torch 2.14 forgets alpha.
    """
    for node in program.graph.find_nodes(op="call_function", target=torch.ops.aten.add.Tensor):
        if "alpha" in node.kwargs:
            with program.graph.inserting_before(node):
                scaled = program.graph.call_function(torch.ops.aten.mul.Tensor, (node.args[1], node.kwargs["alpha"]))
            node.args, node.kwargs = (node.args[0], scaled), {}
    program.recompile()
