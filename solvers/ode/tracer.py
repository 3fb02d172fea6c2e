"""Functions of a matrix, recorded so that cotangents can be pulled through them one by one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .externals import clock
from .tape import Sums, vector_jacobian


class Traced:
    """The value of a function, recorded as one of its argument and of all that every step shares.

    Attributes:
        value: without derivatives.
    """

    def __init__(self, out: Tensor, leaf: Tensor, sums: Sums) -> None:
        self.value, self._out, self._leaf, self._sums = out.detach(), out, leaf, sums

    def pull(self, bar: Tensor) -> Tensor:
        """The argument's cotangent, from that of the value; those of what is shared are added up."""
        if not self._out.requires_grad:
            return torch.zeros_like(bar)
        inputs = (self._leaf, *self._sums.inputs)
        grads = vector_jacobian((self._out,), inputs, (bar,), self._sums.externals.retain)
        self._sums.add(grads[1:])
        return torch.zeros_like(bar) if grads[0] is None else grads[0]


class Tracer:
    """Records functions, each as one of a leaf of its own."""

    def __init__(self, sums: Sums) -> None:
        """`sums` takes the cotangents of what every step shares."""
        self._sums, self._began = sums, clock()

    def __call__(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Traced:
        """`function` at x (batch, n).

        Raises:
            SolverError: it uses a tensor that requires a gradient and was not used at the start of the solve.
        """
        leaf = x.detach().requires_grad_()
        with torch.enable_grad():
            out = function(leaf)
        if out.requires_grad:
            self._sums.externals.check(out, (leaf,), self._began, lambda: "In a step of the backward pass")
        return Traced(out, leaf, self._sums)
