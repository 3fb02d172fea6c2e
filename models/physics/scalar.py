"""A perceptron with one output, and its gradient in closed form."""

from __future__ import annotations

import itertools

import torch
from jaxtyping import Float
from torch import Tensor, nn


class ScalarMLP(nn.Module):
    """A function of `inputs` numbers: linear layers with tanh between them, and one number at the end.

    Its gradient is written out, so that a field made of it is differentiated once in training, not twice.

    Args:
        inputs: of the function.
        hidden: width of each hidden layer.

    Raises:
        ValueError: there is no hidden layer.
    """

    def __init__(self, inputs: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        if not hidden:
            raise ValueError("ScalarMLP: hidden must name the width of one layer at least.")
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise((inputs, *hidden)))
        self.last = nn.Linear(hidden[-1], 1, bias=False)  # a constant is no force
        for layer in (*self.layers, self.last):
            nn.init.orthogonal_(layer.weight)

    def forward(self, x: Float[Tensor, "*batch inputs"]) -> Float[Tensor, " *batch"]:
        """The function."""
        for layer in self.layers:
            x = layer(x).tanh()
        return self.last(x).squeeze(-1)

    def gradient(self, x: Float[Tensor, "*batch inputs"]) -> Float[Tensor, "*batch inputs"]:
        """Its gradient."""
        passed: list[tuple[Tensor, Tensor]] = []
        for layer in self.layers:
            x = layer(x).tanh()
            passed.append((1 - x * x, layer.get_parameter("weight")))
        back = self.last.weight.expand(*x.shape[:-1], -1)
        for slope, weight in reversed(passed):
            back = torch.matmul(back * slope, weight)
        return back
