"""Sudoku: boards to fill in."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...solvers.options import options
from ..data.batches import generator_of
from ..data.sudoku import Boards, reveal
from .task import Outcome, Task

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MORE = (8,)
"""Clues that large boards are measured with, too, beyond their own."""


SHOWN, COUNTED = 4, 128
"""Boards in a picture, and boards whose share of solved ones is followed."""


@options
class SudokuSolving(Task):
    """The model's own loss; measured is the share of boards without a fault.

    A model offers `loss(puzzles, boards)` and `fill(puzzles)`; digits count from 1, and empty cells are 0.
    """

    kind = "sudoku"
    metric = "solved"

    def losses(self, model: nn.Module, batch: Boards, step: int) -> Outcome:
        """The loss of a batch."""
        loss = model.loss(*batch)  # type: ignore[operator]
        return Outcome(loss, {"loss": float(loss.detach())})

    def evaluate(self, model: nn.Module, batches: Iterable[Boards]) -> dict[str, float]:
        """How often boards are filled in without a fault, in one go and without any search.

        Returns:
            solved, the share of boards; cells, the share of the cells that were empty. For boards larger than 4 x 4
            also solved_more_8: the share where so many cells more were given, drawn at random.
        """
        was_training = model.training
        model.eval()
        more: tuple[int, ...] = (0,)
        solved: dict[int, int] = {}
        count = right = empty = 0
        for puzzles, boards in batches:
            more = (0, *MORE) if boards.shape[1] > 4 else (0,)
            for extra in more:
                given = _with_more(puzzles, boards, extra, count) if extra else puzzles
                hit = model.fill(given) == boards  # type: ignore[operator]
                solved[extra] = solved.get(extra, 0) + int(hit.flatten(1).all(1).sum())
                if not extra:
                    right += int((hit & (puzzles == 0)).sum())
                    empty += int((puzzles == 0).sum())
            count += len(boards)
        model.train(was_training)
        result: dict[str, Any] = {"solved": solved[0] / count, "cells": right / empty}
        return result | {f"solved_more_{extra}": solved[extra] / count for extra in more if extra}

    def draw(self, model: nn.Module, source: Any) -> Figure:
        """Puzzles as the model fills them in: of an equilibrium one of them round by round, and shares of solved ones.

        What is given is black, what is right blue, and what is wrong red.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9.4, 2.9), layout="constrained", facecolor="white")
        puzzles, boards = next(iter(source.test_batches(COUNTED, COUNTED, str(next(model.parameters()).device))))
        if not hasattr(model, "scores"):
            axes: Any = figure.subplots(1, SHOWN)
            filled = model.fill(puzzles)  # type: ignore[operator]
            for axis, puzzle, board, own in zip(axes, puzzles, boards, filled, strict=False):
                _draw_board(axis, puzzle, own, board)
            solved = float((filled == boards).flatten(1).all(1).double().mean())
            figure.suptitle(f"test set of {source.name}: {solved:.1%} of {len(boards)} boards solved", fontsize=11)
            return figure
        rounds, shares, filled = [1, 2, 4, 8, 16, 32, 64, 96], [], {}
        for count in rounds:
            scores = model.scores(model.solve(puzzles, count).value)  # type: ignore[operator]
            filled[count] = torch.where(puzzles > 0, puzzles, scores.argmax(-1) + 1)
            shares.append(float((filled[count] == boards).flatten(1).all(1).double().mean()))
        # One that takes a while: solved after 32 rounds and not after 8.
        slow = ((filled[32] == boards) & (filled[8] != boards).flatten(1).any(1)[:, None, None]).flatten(1).all(1)
        place = int(slow.double().argmax())
        axes = figure.subplots(1, SHOWN + 1)
        for axis, count in zip(axes, (2, 8, 16, 32), strict=False):
            _draw_board(axis, puzzles[place], filled[count][place], boards[place])
            axis.set_title(f"after {count} rounds", fontsize=9)
        axes[-1].plot(rounds, shares, "o-", color="#1d4e89", markersize=3)
        axes[-1].set(xscale="log", xlabel="rounds", ylim=(-0.03, 1.03))
        axes[-1].set_title(f"share solved, of {len(boards)}", fontsize=9)
        figure.suptitle(f"test set of {source.name}", fontsize=11)
        return figure


def _with_more(puzzles: Tensor, boards: Tensor, extra: int, first: int) -> Tensor:
    """The puzzles with `extra` cells more given; which these are depends on the place of the puzzle in the test set,
    `first` for the first, and not on the batch that it is in.
    """
    number = torch.tensor([extra])
    pairs = zip(puzzles.cpu().split(1), boards.cpu().split(1))
    given = [reveal(*pair, number, generator_of(extra, first + i)) for i, pair in enumerate(pairs)]
    return torch.cat(given).to(puzzles.device)


def _draw_board(axis: Axes, puzzle: Any, filled: Any, board: Any) -> None:
    side = len(board)
    block = round(side**0.5)
    for row in range(side):
        for column in range(side):
            given, right = bool(puzzle[row, column]), bool(filled[row, column] == board[row, column])
            axis.text(
                column + 0.5, row + 0.55, str(int(filled[row, column])), ha="center", va="center",
                fontsize=60 / (side + 3), color="black" if given else "#3a7ca5" if right else "#c1121f",
                fontweight="bold" if given else "normal",
            )  # fmt: skip
    for line in range(side + 1):
        width = 1.2 if line % block == 0 else 0.3
        axis.plot([line, line], [0, side], color="black", linewidth=width)
        axis.plot([0, side], [line, line], color="black", linewidth=width)
    axis.set(xlim=(0, side), ylim=(side, 0), aspect="equal")
    axis.axis("off")
