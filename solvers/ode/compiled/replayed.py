"""A loop on a GPU: one pass through its body, captured as a CUDA graph and replayed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# The condition is looked at, which waits for the GPU, after so many passes.
_PASSES = 8
# Before a capture everything must have been allocated and tuned.
_WARM_UP = 3


class Replayed:
    """Repeats a pass on memory of its own, which stays where it is.

    Capturing needs a GPU. Elsewhere the passes are made one by one, in the same order on the same memory.
    """

    def __init__(self, once: Callable[..., Sequence[Tensor]], carried: int, inputs: Sequence[Tensor], written: range):
        """Capture.

        Args:
            once: of all inputs, to the carried ones after a pass and whether another one follows. A pass that is not to
                be made leaves the carried ones as they are.
            carried: how many of the inputs come first and are carried.
            inputs: such as will be given.
            written: which of the other inputs are written to.
        """
        self._once, self._carried = once, carried
        self._written = [carried + i for i in written]
        self._static = [tensor.clone() for tensor in inputs]
        self._goes_on = torch.ones((), dtype=torch.bool, device=inputs[0].device)
        self._replay = self._captured() if inputs[0].is_cuda else self._make_pass

    def _make_pass(self) -> None:
        *carried, goes_on = self._once(*self._static)
        for static, new in zip(self._static, carried):
            static.copy_(new)
        self._goes_on.copy_(goes_on)

    def _captured(self) -> Callable[[], None]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self._make_pass()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._make_pass()
        return graph.replay

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """The carried tensors when the condition holds no more."""
        for static, given in zip(self._static, inputs):
            static.copy_(given)
        while True:
            for _ in range(_PASSES):
                self._replay()
            if not bool(self._goes_on):
                break
        for place in self._written:
            inputs[place].copy_(self._static[place])
        return [tensor.clone() for tensor in self._static[: self._carried]]
