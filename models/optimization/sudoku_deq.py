"""Sudoku of any size by an equilibrium: candidates that talk to each other along the rules until they agree."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ...solvers import PhantomAdjoint, Picard, Solution, fixed_point
from ...solvers.fixed_point import FixedPointSolver
from ...solvers.fixed_point.api import AnyAdjoint
from ...solvers.options import check_integer, check_real
from ..registry import register_model

# A candidate is open, given, or excluded by the given digit of its cell.
KINDS = 3


class RuleCell(nn.Module):
    """One round of messages between the k^6 candidates (a digit in a cell) of a board of side k^2.

    Candidates belong to four rules each: one digit a cell, and every digit once a row, column and block. A candidate
    sends the same message to all of them, a rule answers with a function of the sum of its messages, and what the rules
    of a candidate answer changes its state. Three candidates that share both a row (or column) and a block also have a
    sum of their own, by which a digit that is tied to one row of a block is told from one that is not.

    All weights are shared: the map commutes with every symmetry of the game, which are the permutations of the digits,
    of the rows in a band, of the bands, of columns and stacks in the same way, and the transposition.

    Args:
        channels: of a candidate's state.
        hidden: of its update.
        answers: channels of a rule's answer.
    """

    def __init__(self, channels: int, hidden: int, answers: int) -> None:
        super().__init__()
        self.message = nn.Linear(channels, channels)
        self.rules = nn.ModuleDict(
            {name: nn.Sequential(nn.Linear(channels, answers), nn.ReLU(), nn.Linear(answers, hidden, bias=False))
             for name in ("cell", "line", "block")}
        )  # fmt: skip
        self.segment = nn.Linear(channels, hidden, bias=False)
        self.own = nn.Linear(2 * channels, hidden)
        self.update = nn.Linear(hidden, channels)
        self.norm = nn.LayerNorm(channels)

    def forward(
        self, z: Float[Tensor, "batch bands rows stacks columns digits channels"],
        x: Float[Tensor, "batch bands rows stacks columns digits hidden"],
    ) -> Float[Tensor, "batch bands rows stacks columns digits channels"]:  # fmt: skip
        """f(z, x); every mean square of a candidate's state stays of the order of one."""
        message = self.message(z).relu()
        across, down = message.sum(4), message.sum(2)
        row = self.rules["line"](across.sum(3))[:, :, :, None, None]
        column = self.rules["line"](down.sum(1))[:, None, None]
        block = self.rules["block"](across.sum(2))[:, :, None, :, None]
        cell = self.rules["cell"](message.sum(5)).unsqueeze(5)
        # Terms are added where they are smallest: few of the sums are as large as the board.
        by_row = self.segment(across).unsqueeze(4) + (row + block)
        by_column = (self.segment(down) + column.squeeze(2)).unsqueeze(2)
        hidden = self.own(torch.cat([z, message], -1)) + by_row + by_column + cell + x
        return self.norm(z + self.update(hidden.relu()))


class SudokuDEQ(nn.Module):
    """Fills in boards of side k^2: the rest point of a `RuleCell` says how likely each digit is in each cell.

    Training goes along the way to the rest point: from wherever up to `lead` rounds without a gradient lead, each state
    of the next `window` rounds is to give the solution, and the gradient goes through these rounds alone. That makes
    the solution's state a rest point that attracts, as one-step and phantom gradients do.

    Args:
        block: k, the side of a block: 3 for the usual 9 x 9.
        channels, hidden, answers: of the `RuleCell`.
        lead: most rounds before the window.
        window: rounds that are differentiated through.
        solver: None takes `Picard()`, by which it was trained.
        adjoint: how `forward` is differentiated; None takes the gradient of `window` rounds from the rest point.
        rtol, max_steps: of the solve; boards that have come to rest take no further rounds.

    Source: the rounds follow Palm, Paquet and Winther 2018, Recurrent relational networks; training in windows from
    detached states, Wang et al. 2025 (HRM) and Jolicoeur-Martineau 2025 (TRM); the gradient, Geng et al. 2021.
    """

    def __init__(
        self,
        block: int = 3,
        *,
        channels: int = 24,
        hidden: int = 48,
        answers: int = 32,
        lead: int = 16,
        window: int = 8,
        solver: FixedPointSolver | None = None,
        adjoint: AnyAdjoint | None = None,
        rtol: float = 1e-2,
        max_steps: int = 96,
    ) -> None:
        super().__init__()
        self.block, self.side = check_integer("SudokuDEQ: ", "block", block), block * block
        self.lead = check_integer("SudokuDEQ: ", "lead", lead, least=0)
        self.window = check_integer("SudokuDEQ: ", "window", window)
        self.max_steps = check_integer("SudokuDEQ: ", "max_steps", max_steps)
        self.rtol = check_real("SudokuDEQ: ", "rtol", rtol, lambda t: t >= 0, "a finite number that is not negative")
        self.solver = Picard() if solver is None else solver
        self.adjoint = PhantomAdjoint(self.window, damping=1.0) if adjoint is None else adjoint
        self.cell = RuleCell(channels, hidden, answers)
        self.inject = nn.Embedding(KINDS, hidden)
        self.head = nn.Linear(channels, 1)

    def forward(self, puzzles: Int[Tensor, "batch side side"]) -> Float[Tensor, "batch side side digits"]:
        """Logits of the digits, 1 first, of every cell; empty cells of the puzzles are 0."""
        return self.scores(self.solve(puzzles).value)

    def solve(self, puzzles: Int[Tensor, "batch side side"], max_steps: int | None = None) -> Solution[Tensor]:
        """The rest point with its statistics; `max_steps` cuts it short."""
        x = self.injection(puzzles)
        steps = self.max_steps if max_steps is None else max_steps
        return fixed_point(
            self.cell, self.first(x), (x,), solver=self.solver, adjoint=self.adjoint, rtol=self.rtol, max_steps=steps
        )

    def fill(self, puzzles: Int[Tensor, "batch side side"]) -> Int[Tensor, "batch side side"]:
        """The most likely digit in each empty cell, without any search; what is given stays."""
        with torch.no_grad():
            return torch.where(puzzles > 0, puzzles, self(puzzles).argmax(-1) + 1)

    def loss(self, puzzles: Int[Tensor, "batch side side"], boards: Int[Tensor, "batch side side"]) -> Tensor:
        """Mean cross-entropy of the solutions' digits over cells and the states of the window, in nats."""
        x = self.injection(puzzles)
        z = self.first(x)
        with torch.no_grad():
            for _ in range(int(torch.randint(self.lead + 1, ()))):
                z = self.cell(z, x)
        total = z.new_zeros(())
        for _ in range(self.window):
            z = self.cell(z, x)
            total = total + F.cross_entropy(self.scores(z).flatten(0, 2), boards.flatten() - 1)
        return total / self.window

    def injection(self, puzzles: Int[Tensor, "batch side side"]) -> Float[Tensor, "batch k k k k digits hidden"]:
        """What the candidates hear of the given digits.

        Raises:
            ValueError: puzzles of another shape, or a digit that is none.
        """
        k, side = self.block, self.side
        if puzzles.ndim != 3 or tuple(puzzles.shape[1:]) != (side, side):
            raise ValueError(f"puzzles: expected shape (batch, {side}, {side}); got {tuple(puzzles.shape)}.")
        if len(puzzles) and not 0 <= int(puzzles.min()) <= int(puzzles.max()) <= side:
            raise ValueError(f"puzzles: digits are 1 to {side}, and 0 in empty cells; got {int(puzzles.max())}.")
        given = puzzles.long().view(-1, k, k, k, k, 1)
        digits = torch.arange(1, side + 1, device=puzzles.device)
        return self.inject(torch.where(given == 0, 0, torch.where(given == digits, 1, 2)))

    def first(self, x: Tensor) -> Tensor:
        """Where a solve starts: all candidates alike."""
        return x.new_zeros(*x.shape[:-1], self.cell.norm.normalized_shape[0])

    def scores(self, z: Tensor) -> Float[Tensor, "batch side side digits"]:
        """Logits of states."""
        return self.head(z).reshape(len(z), self.side, self.side, self.side)


@register_model(family="optimization", task="sudoku", accepts=SudokuDEQ)
def sudoku_deq(**arguments: Any) -> SudokuDEQ:
    """An equilibrium of candidates for 9 x 9 Sudoku, with the rules as its graph."""
    return SudokuDEQ(**arguments)


@register_model(family="optimization", task="sudoku", accepts=SudokuDEQ)
def test_sudoku_deq(**arguments: Any) -> SudokuDEQ:
    """A very small one for 4 x 4 boards."""
    return SudokuDEQ(**{"block": 2, "channels": 8, "hidden": 16, "answers": 8, "lead": 4, "window": 2, **arguments})
