"""QPLayer, ArgminLayer and OptNet's Sudoku."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

from restpoint.models.optimization import ArgminLayer, OptNetSudoku, QPLayer, boards
from restpoint.solvers import ADMM, CentralPath, ImplicitAdjoint, SolverError, SolverWarning

D = torch.float64


class TestQPLayer:
    @pytest.mark.parametrize(
        "options",
        [{}, {"inequalities": 3}, {"equalities": 2, "nonnegative": True, "quadratic": False},
         {"inequalities": 3, "equalities": 1, "adjoint": CentralPath(0.1)}, {"inequalities": 4, "solver": ADMM()}],
    )  # fmt: skip
    def test_is_feasible_and_trains(self, options):
        layer = QPLayer(5, **options).to(D)
        scores = torch.randn(4, 5, dtype=D, requires_grad=True)
        x = layer(scores)
        _, G, h, A, b = layer.constraints()
        if G is not None:
            assert (x @ G.mT - h).max() < 1e-9
        if A is not None:
            assert (x @ A.mT - b).abs().max() < 1e-9
        x.square().sum().backward()
        assert scores.grad.abs().max() > 0
        if layer.root is not None:
            assert layer.root.grad.abs().max() > 0

    def test_without_constraints_is_a_linear_solve(self):
        layer = QPLayer(3)
        scores = torch.randn(2, 3)
        torch.testing.assert_close(layer(scores), scores / 1.1, rtol=1e-5, atol=1e-5)

    def test_gradients_of_the_parameters(self):
        layer = QPLayer(4, inequalities=3, equalities=1).to(D)
        scores = torch.randn(2, 4, dtype=D)
        names, values = zip(*layer.named_parameters(), strict=True)

        def run(*values):
            return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (scores,))

        assert gradcheck(run, values, fast_mode=True)

    def test_is_the_same_in_train_and_eval_and_after_a_journey(self):
        layer = QPLayer(4, inequalities=3, equalities=1)
        scores = torch.randn(2, 4)
        for other in (copy.deepcopy(layer).eval(), pickle.loads(pickle.dumps(layer))):  # noqa: S301
            assert torch.equal(layer(scores), other(scores))
        fresh = QPLayer(4, inequalities=3, equalities=1)
        fresh.load_state_dict(layer.state_dict())
        assert torch.equal(layer(scores), fresh(scores))

    def test_failures(self):
        with pytest.raises(ValueError, match="size must be at least 1"):
            QPLayer(0)
        with pytest.raises(ValueError, match="ridge must be positive"):
            QPLayer(2, ridge=0.0)
        with pytest.raises(SolverError, match="NaN"):
            QPLayer(2, inequalities=1)(torch.full((1, 2), torch.nan))


class Attraction(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(3, 3))

    def forward(self, y, x):
        return (y - x).square().sum(1) + torch.nn.functional.softplus(y @ self.weight).sum(1)


class TestArgminLayer:
    def test_learns_in_x_and_in_the_energy(self):
        layer = ArgminLayer(Attraction().to(D), adjoint=ImplicitAdjoint(order=2), rtol=1e-13)
        x = torch.randn(2, 3, dtype=D, requires_grad=True)
        assert gradcheck(layer, (x,), fast_mode=True)
        layer(x).sum().backward()
        assert layer.energy.weight.grad.abs().max() > 0

    def test_states_of_another_shape(self):
        def energy(y, x):
            return (y.sum(1) - x["a"].sum(1)).square() + y.square().sum(1)

        x = {"a": torch.ones(2, 4)}
        assert ArgminLayer(energy, state=(3,))(x).shape == (2, 3)
        assert ArgminLayer(energy, state=lambda x: x["a"].new_zeros(2, 5))(x).shape == (2, 5)
        assert ArgminLayer(energy)(x, torch.zeros(2, 6)).shape == (2, 6)
        with pytest.raises(ValueError, match="shape of y cannot be inferred"):
            ArgminLayer(energy)(x)

    def test_equality(self):
        layer = ArgminLayer(
            lambda y, x: (y - x).square().sum(1), equality=lambda y, x: y.square().sum(1, keepdim=True) - 1
        )
        x = torch.randn(3, 4, dtype=D)
        y = layer(x, torch.nn.functional.normalize(x + 0.1, dim=1))
        torch.testing.assert_close(y, torch.nn.functional.normalize(x, dim=1), rtol=0, atol=1e-6)

    def test_warns_where_there_is_no_minimum(self):
        with pytest.warns(SolverWarning, match="has no finite optimum"):
            ArgminLayer(lambda y, x: -(y - x).square().sum(1), state=lambda x: x + 1)(torch.ones(1, 2))
        with pytest.raises(TypeError, match="energy"):
            ArgminLayer(3.0)


class TestSudoku:
    def test_boards(self):
        every = boards()
        assert every.shape == (288, 4, 4)
        digits = torch.arange(4)
        for lines in (every, every.mT, every.reshape(288, 2, 2, 2, 2).transpose(2, 3).reshape(288, 4, 4)):
            assert (lines.sort(2).values == digits).all()
        with pytest.raises(ValueError, match="block of 1 or 2"):
            boards(3)

    @pytest.mark.slow
    def test_learns_the_rules_from_boards_alone(self):
        """On boards that it has never seen, of puzzles with one solution."""
        generator = torch.Generator().manual_seed(0)
        every = boards()
        order = torch.randperm(288, generator=generator)
        training, held_out = every[order[:200]], every[order[200:]]
        model = OptNetSudoku()
        optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(400):
            batch = training[torch.randint(0, 200, (32,), generator=generator)]
            puzzle, answer = puzzles(batch, every, generator)
            loss = (model(puzzle) - answer).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        puzzle, answer = puzzles(held_out, every, generator)
        solved = (model(puzzle).argmax(3) == answer.argmax(3)).flatten(1).all(1)
        assert solved.float().mean() > 0.9


def puzzles(solved, every, generator):
    """Half of the cells of each board, such that no other board has them; and the boards, one-hot."""
    given, unsure = torch.ones_like(solved, dtype=torch.bool), torch.arange(len(solved))
    while len(unsure):
        some = torch.rand(len(unsure), 4, 4, generator=generator) < 0.5
        single = ((every == solved[unsure, None]) | ~some[:, None]).flatten(2).all(2).sum(1) == 1
        given[unsure[single]] = some[single]
        unsure = unsure[~single]
    answer = nn.functional.one_hot(solved, 4).float()
    return answer * given[..., None], answer
