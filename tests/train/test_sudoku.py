"""Sudoku: puzzles with one solution, models that fill them in, and how they are measured."""

import pytest
import torch

from restpoint import create_model
from restpoint.models.optimization import SudokuDEQ, boards
from restpoint.train.data import BoardBatches, BoardSet, DataError, load_data
from restpoint.train.data.sudoku import reveal, solves
from restpoint.train.tasks import SudokuSolving

EASY = "530070000600195000098000060800060003400803001700020006060000280000419005000080079"
SOLUTION = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"


@pytest.fixture(scope="module")
def small():
    return load_data("sudoku4")


def numbers(text):
    return torch.tensor([int(c) for c in text]).view(1, 9, 9)


def test_puzzles_of_4_by_4_have_one_solution_and_boards_of_their_own(small):
    every = boards().flatten(1) + 1
    train, test = small.train, small.test
    assert (len(train), len(test)) == (9000, 1000)
    assert small.model_arguments == {"block": 2}
    assert solves(train.boards).all()
    for part in (train.take(slice(300)), test):
        clues = part.puzzles.flatten(1)
        fits = ((clues[:, None] == 0) | (clues[:, None] == every)).all(2)
        assert (fits.sum(1) == 1).all()
        assert (every[fits.int().argmax(1)] == part.boards.flatten(1)).all()
    assert (
        4 <= int((train.puzzles > 0).flatten(1).sum(1).min()) <= int((train.puzzles > 0).flatten(1).sum(1).max()) <= 8
    )
    solutions = [{tuple(row) for row in part.boards.flatten(1).tolist()} for part in (train, test)]
    assert not solutions[0] & solutions[1]


def test_batches_are_a_function_of_seed_epoch_and_place(small):
    batches = BoardBatches(small.train, 64, shuffle=True, easier=6, seed=3)
    whole = list(batches.epoch(2))
    for (puzzles, _), (again, _) in zip(whole[100:103], batches.epoch(2, start=100), strict=False):
        assert torch.equal(puzzles, again)
    halves = [next(batches.epoch(2, rank=rank, world=2))[0] for rank in range(2)]
    assert torch.equal(torch.cat(halves), whole[0][0])
    assert not torch.equal(next(batches.epoch(3))[0], whole[0][0])
    puzzles, solutions = whole[0]
    assert ((puzzles == 0) | (puzzles == solutions)).all()
    with pytest.raises(DataError, match="do not fill"):
        BoardBatches(small.train, 0)
    with pytest.raises(DataError, match="validation"):
        small.batches(8, 8, 9000, 0, "cpu")


def test_clues_are_revealed():
    puzzle, solution = numbers(EASY), numbers(SOLUTION)
    given = reveal(puzzle, solution, torch.tensor([7]), torch.Generator().manual_seed(0))
    assert int((given > 0).sum() - (puzzle > 0).sum()) == 7
    assert torch.equal(given[given > 0], solution[given > 0])


def test_the_file_of_17_clues(tmp_path):
    for place in (tmp_path, tmp_path / "sudoku17"):
        place.mkdir(exist_ok=True)
        with pytest.raises(DataError, match=r"there is no .*sudoku17\.csv"):
            load_data("sudoku17", tmp_path)
    names = torch.randperm(9, generator=torch.Generator().manual_seed(0)) + 1
    lines, digits = ["puzzle,solution"], torch.cat([torch.zeros(1, dtype=torch.long), names])
    grid = numbers(SOLUTION)[0]
    grids = [grid, grid.T, grid[[1, 0, 2, *range(3, 9)]], grid[:, [3, 4, 5, 0, 1, 2, 6, 7, 8]]] * 10
    for number, solution in enumerate(grids):
        solved = digits[solution.roll(3 * (number % 3), 0)]
        puzzle = solved * (torch.rand(9, 9, generator=torch.Generator().manual_seed(number)) < 0.4)
        lines.append(",".join("".join(map(str, t.flatten().tolist())) for t in (puzzle, solved)))
    path = tmp_path / "sudoku17" / "sudoku17.csv"
    path.write_text("\n".join(lines))
    source = load_data("sudoku17", tmp_path)
    assert len(source.train) + len(source.test) == 40
    assert source.model_arguments == {"block": 3}
    path.write_text("\n".join([*lines, lines[-1][:-1] + ("1" if lines[-1][-1] == "2" else "2")]))
    with pytest.raises(DataError, match="solution in line 42"):
        load_data("sudoku17", tmp_path)
    path.write_text("\n".join([*lines, "12"]))
    with pytest.raises(DataError, match="line 42 of"):
        load_data("sudoku17", tmp_path)
    with pytest.raises(DataError, match="data_dir"):
        load_data("sudoku17")


class TestEquilibrium:
    def test_commutes_with_the_symmetries_of_the_game(self):
        torch.manual_seed(0)
        model = SudokuDEQ(channels=6, hidden=8, answers=5, max_steps=4).double()
        puzzle = numbers(EASY)
        scores = model(puzzle).detach()
        torch.testing.assert_close(model(puzzle.mT), scores.transpose(1, 2))
        rows = torch.tensor([7, 6, 8, 0, 2, 1, 3, 4, 5])
        torch.testing.assert_close(model(puzzle[:, rows]), scores[:, rows])
        torch.testing.assert_close(model(puzzle[:, :, rows]), scores[:, :, rows])
        names = torch.randperm(9)
        renamed = torch.cat([torch.zeros(1, dtype=torch.long), names + 1])[puzzle]
        torch.testing.assert_close(model(renamed)[..., names], scores)
        # Rows of different bands are not to be swapped.
        swapped = torch.tensor([3, 1, 2, 0, 4, 5, 6, 7, 8])
        assert not torch.allclose(model(puzzle[:, swapped]), scores[:, swapped])

    def test_boards_do_not_touch_each_other(self):
        torch.manual_seed(0)
        model = create_model("test_sudoku_deq").double()
        puzzles = load_data("sudoku4").test.puzzles[:5].long()
        with torch.no_grad():
            torch.testing.assert_close(model(puzzles)[2:3], model(puzzles[2:3]))

    def test_every_parameter_learns(self, small):
        model = create_model("test_sudoku_deq")
        model.loss(small.train.puzzles[:8].long(), small.train.boards[:8].long()).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        model(small.train.puzzles[:2].long()).sum().backward()

    def test_what_does_not_fit_is_said(self):
        model = create_model("test_sudoku_deq")
        with pytest.raises(ValueError, match=r"expected shape \(batch, 4, 4\)"):
            model(torch.zeros(1, 9, 9, dtype=torch.long))
        with pytest.raises(ValueError, match="digits are 1 to 4"):
            model(torch.full((1, 4, 4), 5))

    def test_learns_to_solve_small_boards(self, small):
        torch.manual_seed(0)
        model = SudokuDEQ(2, channels=12, hidden=24, answers=12, lead=6, window=3)
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for puzzles, solutions in BoardBatches(small.train, 32, shuffle=True).epoch(0):
            optimiser.zero_grad()
            model.loss(puzzles, solutions).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
        metrics = SudokuSolving().evaluate(model, small.test_batches(250, 250))
        assert metrics["solved"] > 0.95
        assert metrics.keys() == {"solved", "cells"}
        figure = SudokuSolving().draw(model, small)
        assert len(figure.axes) == 5


def test_optnet_fills_and_measures(small):
    model = create_model("optnet_sudoku", block=2)
    metrics = SudokuSolving().evaluate(model, small.test_batches(16, 16))
    assert 0 <= metrics["solved"] <= metrics["cells"] < 1
    puzzles = small.test.puzzles[:16].long()
    filled = model.fill(puzzles)
    assert torch.equal(filled[puzzles > 0], puzzles[puzzles > 0])
    model.loss(puzzles, small.test.boards[:16].long()).backward()
    assert model.layer.A.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="expected shape"):
        model(torch.zeros(1, 9, 9, dtype=torch.long))


def test_large_boards_are_measured_with_more_clues_too():
    model = SudokuDEQ(channels=4, hidden=4, answers=4, max_steps=2)
    data = BoardSet(numbers(EASY).to(torch.uint8), numbers(SOLUTION).to(torch.uint8))
    metrics = SudokuSolving().evaluate(model, BoardBatches(data, 1))
    assert set(metrics) == {"solved", "cells", "solved_more_8"}
