"""Sudoku puzzles with their solutions: 4 x 4 boards made from the rules, and the 9 x 9 ones with 17 clues."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch
from jaxtyping import Int, Integer, UInt8
from torch import Tensor

from ...models.optimization.sudoku import boards as all_boards
from .batches import generator_of, part_of
from .source import DataError, register_data

Boards = tuple[Int[Tensor, "batch side side"], Int[Tensor, "batch side side"]]

TRAIN4, TEST4, TEST17 = 9_000, 1_000, 1_000
HELD_OUT4, HELD_OUT17 = 10, 20
"""One board in so many is kept for the test sets."""


@dataclasses.dataclass(frozen=True)
class BoardSet:
    """Puzzles and their solutions in memory; digits from 1 on, and 0 in empty cells."""

    puzzles: UInt8[Tensor, "n side side"]
    boards: UInt8[Tensor, "n side side"]

    def __len__(self) -> int:
        return len(self.boards)

    def take(self, indices: Tensor | slice) -> BoardSet:
        """The puzzles at `indices`."""
        return BoardSet(self.puzzles[indices], self.boards[indices])


class BoardBatches:
    """Batches of puzzles with their solutions.

    Args:
        data: the puzzles.
        batch_size: puzzles a batch. A last, smaller batch is dropped where `shuffle` is set and kept elsewhere.
        shuffle: a new order each epoch.
        easier: most clues that are added, to half of the puzzles, from their solutions; anew in every epoch.
        per_epoch: so many of the puzzles make an epoch, drawn anew; 0 takes all.
        seed: of the order and the clues.
        device: where the batches go.

    Raises:
        DataError: the batch size is below one, or shuffled data fill no batch.
    """

    def __init__(
        self, data: BoardSet, batch_size: int, *, shuffle: bool = False, easier: int = 0, per_epoch: int = 0,
        seed: int = 0, device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        if batch_size < 1 or (shuffle and len(data) < batch_size):
            raise DataError(f"{len(data)} puzzles do not fill one batch of {batch_size}.")
        self.data, self.batch_size, self.shuffle = data, batch_size, shuffle
        self.easier, self.seed, self.device = easier, seed, device
        self.count = min(per_epoch or len(data), len(data))

    def __len__(self) -> int:
        full, rest = divmod(self.count, self.batch_size)
        return full if self.shuffle or rest == 0 else full + 1

    def rows(self, place: int) -> int:
        """Puzzles in batch `place` of an epoch."""
        return min(self.batch_size, self.count - place * self.batch_size)

    def epoch(self, index: int = 0, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[Boards]:
        """The batches of epoch `index`, from batch `start` on; of each the part of process `rank` of `world`."""
        order = torch.arange(len(self.data))
        if self.shuffle:
            order = torch.randperm(len(self.data), generator=generator_of(self.seed, index, 0))
        for place in range(start, len(self)):
            rows = order[place * self.batch_size : (place + 1) * self.batch_size]
            part = self.data.take(rows)
            puzzles, solutions = part.puzzles.long(), part.boards.long()
            if self.easier:
                generator = generator_of(self.seed, index, place + 1)
                more = torch.randint(2 * self.easier, (len(rows),), generator=generator) - self.easier
                puzzles = reveal(puzzles, solutions, more.clamp_min(0), generator)
            mine = part_of(len(rows), rank, world)
            yield puzzles[mine].to(self.device), solutions[mine].to(self.device)

    def __iter__(self) -> Iterator[Boards]:
        return self.epoch(0)


def reveal(
    puzzles: Int[Tensor, "batch side side"], boards: Int[Tensor, "batch side side"], more: Int[Tensor, " batch"],
    generator: torch.Generator,
) -> Int[Tensor, "batch side side"]:  # fmt: skip
    """The puzzles with `more` of their empty cells filled in, chosen at random."""
    flat = puzzles.flatten(1)
    order = torch.rand(flat.shape, generator=generator).masked_fill(flat > 0, 2.0).argsort(1).argsort(1)
    return torch.where(order < more.unsqueeze(1), boards.flatten(1), flat).view_as(puzzles)


@dataclasses.dataclass(frozen=True)
class SudokuSource:
    """Sudoku puzzles with a fixed split and its papers.

    Attributes:
        name: by which recipes and cards call it.
        train: what models are trained on, and validation sets are carved from.
        test: what metrics are reported on, and nothing is chosen by.
        split: the two parts in words.
        licence: of the data.
        citation: where they come from.
        easier: most clues that are added to half of the puzzles in training.
        per_epoch: puzzles of an epoch, drawn anew; 0 takes all.
    """

    name: str
    train: BoardSet
    test: BoardSet
    split: str
    licence: str
    citation: str
    easier: int = 0
    per_epoch: int = 0

    @property
    def model_arguments(self) -> dict[str, int]:
        """What the data say about a model: the side of a block."""
        return {"block": round(self.test.boards.shape[1] ** 0.5)}

    @property
    def card_fields(self) -> dict[str, object]:
        """What the data say on a card."""
        return {}

    def batches(
        self, batch_size: int, eval_batch_size: int, validation: int, seed: int, device: str
    ) -> tuple[BoardBatches, BoardBatches]:
        """Puzzles to train on, and those to measure on: the test set, or the last `validation` of the others.

        Raises:
            DataError: the validation set is as large as the training set.
        """
        train, measured = self.train, self.test
        if validation:
            if not 0 < validation < len(train):
                raise DataError(f"data.validation must lie in [0, {len(train)}); got {validation}.")
            train, measured = train.take(slice(-validation)), train.take(slice(-validation, None))
        training = BoardBatches(
            train, batch_size, shuffle=True, easier=self.easier, per_epoch=self.per_epoch, seed=seed, device=device
        )
        return training, BoardBatches(measured, eval_batch_size, device=device)

    def test_batches(self, batch_size: int, limit: int | None = None, device: str = "cpu") -> BoardBatches:
        """The puzzles that metrics are reported on, or the first so many of them."""
        return BoardBatches(self.test.take(slice(limit)), batch_size, device=device)


@register_data
def sudoku4(data_dir: Path | None = None) -> SudokuSource:
    """10,000 different puzzles of 4 x 4, made from the rules, each with one solution; `data_dir` is not used.

    A puzzle is a solved board of which cells are emptied in random order, as long as the solution stays the only one,
    down to between 4 and 8 clues. The boards of the 1,000 test puzzles are solutions of none of the 9,000 others.

    Source: the setting is that of Amos and Kolter 2017, section 4.4, whose puzzles share their boards.
    """
    solved = all_boards().flatten(1).to(torch.uint8) + 1
    generator = generator_of(4, 4, 4)
    solved = solved[torch.randperm(len(solved), generator=generator)]
    held_out = len(solved) // HELD_OUT4
    parts = [
        _puzzles4(solved, rows, count, generator)
        for rows, count in ((range(held_out, len(solved)), TRAIN4), (range(held_out), TEST4))
    ]
    return SudokuSource(
        "sudoku4", parts[0], parts[1],
        split=f"{TRAIN4:,} puzzles of {len(solved) - held_out} boards train; {TEST4:,} of the other {held_out} boards "
        "are measured",
        licence="none needed: made from the rules",
        citation="after Amos and Kolter 2017, OptNet, section 4.4",
    )  # fmt: skip


def _puzzles4(solved: Tensor, rows: range, count: int, generator: torch.Generator) -> BoardSet:
    found: dict[tuple[int, ...], int] = {}
    while len(found) < count:
        row = rows[int(torch.randint(len(rows), (), generator=generator))]
        goal = int(torch.randint(4, 9, (), generator=generator))
        puzzle, clues = solved[row].clone(), 16
        # Boards that agree with the clues so far; an emptied cell may let others in.
        for cell in torch.randperm(16, generator=generator).tolist():
            if clues == goal:
                break
            puzzle[cell] = 0
            if int(((puzzle == 0) | (solved == puzzle)).all(1).sum()) == 1:
                clues -= 1
            else:
                puzzle[cell] = solved[row, cell]
        found[tuple(puzzle.tolist())] = row
    puzzles = torch.tensor(list(found), dtype=torch.uint8).view(-1, 4, 4)
    return BoardSet(puzzles, solved[list(found.values())].view(-1, 4, 4))


@register_data
def sudoku17(data_dir: Path | None = None) -> SudokuSource:
    """The 49,158 known 9 x 9 puzzles of 17 clues, the fewest that determine a board.

    A twentieth of the boards is held out, by a hash of the board that does not depend on the names of its digits, so
    that puzzles with one solution are on one side; the first 1,000 of these puzzles are measured. In training, up to 23
    clues are added to half of the puzzles.

    Args:
        data_dir: holds sudoku17.csv, or sudoku17/sudoku17.csv: a line "puzzle,solution" of 81 digits each, 0 for an
            empty cell, after a line of headings.

    Raises:
        DataError: no folder was given; the file is missing or damaged, or a solution does not solve its puzzle.
    """
    if data_dir is None:
        raise DataError("sudoku17: give the folder that holds sudoku17.csv as data_dir.")
    places = [data_dir / "sudoku17.csv", data_dir / "sudoku17" / "sudoku17.csv"]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise DataError(f"sudoku17: there is no {places[0]}.")
    lines = path.read_text().split()[1:]
    for number, line in enumerate(lines, 2):
        if len(line) != 163 or line[81] != "," or not (line[:81] + line[82:]).isdecimal():
            raise DataError(f"sudoku17: line {number} of {path} is not 81 digits, a comma and 81 digits.")
    digits = torch.frombuffer(bytearray("".join(lines), "ascii"), dtype=torch.uint8).view(-1, 163) - 48
    data = BoardSet(digits[:, :81].reshape(-1, 9, 9), digits[:, 82:].reshape(-1, 9, 9))
    wrong = ~(solves(data.boards) & ((data.puzzles == 0) | (data.puzzles == data.boards)).flatten(1).all(1))
    if wrong.any():
        raise DataError(f"sudoku17: the solution in line {int(wrong.nonzero()[0]) + 2} of {path} does not solve it.")
    # Digits are renamed so that the first row counts from 1 to 9.
    renamed = data.boards[:, 0].long().argsort(1).gather(1, data.boards.flatten(1).long() - 1).to(torch.uint8)
    held_out = torch.tensor([hashlib.sha256(bytes(row)).digest()[0] % HELD_OUT17 == 0 for row in renamed.tolist()])
    shuffled = torch.randperm(len(data), generator=generator_of(17))
    train, test = (data.take(shuffled[part[shuffled]]) for part in (~held_out, held_out))
    kept = len(test)
    test = test.take(slice(TEST17))
    return SudokuSource(
        "sudoku17", train, test,
        split=f"{len(train):,} puzzles train; {len(test):,} of {kept:,} with other solutions are measured",
        licence="none stated",
        citation="Royle, Minimum Sudoku: the collection of 17-clue puzzles",
        easier=24,
        per_epoch=16_000,
    )  # fmt: skip


def solves(boards: Integer[Tensor, "batch side side"]) -> Tensor:
    """Which boards obey the rules (batch,)."""
    count, side = boards.shape[:2]
    k = round(side**0.5)
    blocks = boards.view(count, k, k, k, k).transpose(2, 3).reshape(count, side, side)
    wanted = torch.arange(1, side + 1)
    groups = torch.stack([boards, boards.mT, blocks], 1).long()
    return (groups.sort(-1).values == wanted).flatten(1).all(1)
