"""OptNet's Sudoku: the rules of the game as the equations of a quadratic programme, learnt from solved boards alone."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ...solvers.optimize import QPSolver
from ..registry import register_model
from .quadratic import QPLayer


class OptNetSudoku(nn.Module):
    """Fills in boards of side k^2: x minimises ridge/2 |x|^2 - puzzle'x subject to Ax = b and x >= 0, with A learnt.

    Nothing of the rules is built in: neither rows, columns and blocks nor that a cell holds one digit.

    Args:
        block: k, the side of a block; 2 for boards of 4 x 4.
        equations: rows of A; the rules of a 4 x 4 board have rank 40.
        ridge: of the objective.
        solver: None takes `InteriorPoint()`.

    Source: Amos and Kolter 2017, OptNet, section 4.4.
    """

    def __init__(
        self, block: int = 2, *, equations: int = 40, ridge: float = 0.1, solver: QPSolver | None = None
    ) -> None:
        super().__init__()
        self.side = block * block
        self.layer = QPLayer(
            self.side**3, equalities=equations, nonnegative=True, quadratic=False, ridge=ridge, solver=solver
        )
        # Where every digit is as likely as any other.
        nn.init.constant_(self.layer.point, -math.log(self.side))

    def forward(
        self, puzzles: Float[Tensor, "batch side side digits"] | Int[Tensor, "batch side side"]
    ) -> Float[Tensor, "batch side side digits"]:
        """Weights of the digits of every cell.

        Puzzles are one-hot with empty cells zero, or digits from 1 on with empty cells 0.
        """
        given = puzzles if puzzles.is_floating_point() else self._one_hot(puzzles)
        return self.layer(given.flatten(1)).reshape(given.shape)

    def fill(self, puzzles: Int[Tensor, "batch side side"]) -> Int[Tensor, "batch side side"]:
        """The digit of largest weight in each empty cell; digits count from 1, and empty cells are 0."""
        with torch.no_grad():
            return torch.where(puzzles > 0, puzzles, self(puzzles).argmax(-1) + 1)

    def loss(self, puzzles: Int[Tensor, "batch side side"], boards: Int[Tensor, "batch side side"]) -> Tensor:
        """Mean squared error of the weights against the solved boards, one-hot; digits count from 1."""
        return (self(puzzles) - self._one_hot(boards)).square().mean()

    def _one_hot(self, digits: Tensor) -> Tensor:
        if tuple(digits.shape[1:]) != (self.side, self.side):
            raise ValueError(f"puzzles: expected shape (batch, {self.side}, {self.side}); got {tuple(digits.shape)}.")
        return nn.functional.one_hot(digits, self.side + 1)[..., 1:].to(self.layer.point.dtype)


@register_model(family="optimization", task="sudoku", accepts=OptNetSudoku)
def optnet_sudoku(**arguments: Any) -> OptNetSudoku:
    """OptNet's layer for 4 x 4 Sudoku, which learns the rules from puzzles and solutions alone."""
    return OptNetSudoku(**arguments)


def boards(block: int = 2) -> Int[Tensor, "count side side"]:
    """Every solved board of side k^2 with digits from 0 on; for k = 2 there are 288.

    Raises:
        ValueError: block is neither 1 nor 2: there are 6.67e21 boards of 9 x 9.
    """
    if block not in (1, 2):
        raise ValueError(f"boards: all boards can be listed for a block of 1 or 2; got {block}.")
    side = block * block
    rows = list(itertools.permutations(range(side)))
    found: list[list[tuple[int, ...]]] = [[]]
    for _ in range(side):
        found = [[*board, row] for board in found for row in rows if _fits(board, row, block)]
    return torch.tensor(found)


def _fits(board: list[tuple[int, ...]], row: tuple[int, ...], block: int) -> bool:
    if any(above[j] == digit for above in board for j, digit in enumerate(row)):
        return False
    begun = board[len(board) - len(board) % block :]
    return not any(
        digit in above[j // block * block : j // block * block + block]
        for above in begun
        for j, digit in enumerate(row)
    )
