"""Fixed-point correction: which states, with which gradient and weight."""

import pytest
import torch

from restpoint.solvers import Picard, fixed_point
from restpoint.solvers.diagnose import correction_indices, correction_loss, correction_weights, intermediate_states


def cell(z, x, w):
    return torch.tanh(z @ w.T + x)


@pytest.fixture
def solved():
    w = (0.3 * torch.randn(4, 4, dtype=torch.float64)).requires_grad_()
    x = torch.randn(3, 4, dtype=torch.float64)
    with torch.no_grad():
        solution = fixed_point(
            cell, torch.zeros_like(x), (x, w), solver=Picard(), rtol=0.0, max_steps=8, trajectory=True
        )
    return w, x, solution


def test_weights():
    assert correction_weights(3, 0.5).tolist() == [0.25, 0.5, 1.0]
    assert correction_weights(1).tolist() == [1.0]
    with pytest.raises(ValueError, match="count must be at least 1; got 0"):
        correction_weights(0)
    with pytest.raises(ValueError, match=r"gamma must be in \(0, 1\]; got 1.5"):
        correction_weights(2, 1.5)


def test_indices_are_spread_over_each_samples_own_steps():
    places = correction_indices(torch.tensor([8, 4, 1]), 3)
    assert places.tolist() == [[2, 1, 0], [4, 2, 0], [6, 3, 0]]
    with pytest.raises(ValueError, match="count must be at least 1; got 0"):
        correction_indices(torch.tensor([8]), 0)


def test_a_state_carries_the_gradient_of_one_evaluation_from_the_trajectory(solved):
    w, x, solution = solved
    places = torch.tensor([[1, 2, 3], [5, 6, 7]])
    states = intermediate_states(cell, solution.trajectory, (x, w), indices=places)
    assert len(states) == 2
    for state, place in zip(states, places, strict=True):
        # One Picard step from state k of the trajectory is its state k + 1.
        torch.testing.assert_close(state, solution.trajectory[place + 1, torch.arange(3)])
        before = solution.trajectory[place, torch.arange(3)]
        (expected,) = torch.autograd.grad(cell(before, x, w).square().sum(), w)
        (found,) = torch.autograd.grad(state.square().sum(), w)
        torch.testing.assert_close(found, expected)


def test_several_damped_steps(solved):
    w, x, solution = solved
    (state,) = intermediate_states(cell, solution.trajectory, (x, w), indices=[-1], steps=2, damping=0.5)
    z = solution.trajectory[-1]
    for _ in range(2):
        z = 0.5 * z + 0.5 * cell(z, x, w)
    torch.testing.assert_close(state, z)
    torch.testing.assert_close(torch.autograd.grad(state.sum(), w), torch.autograd.grad(z.sum(), w))


def test_states_of_several_tensors():
    def pair(z, x):
        return z[0] / 2 + x, torch.tanh(z[1] + z[0])

    x = torch.ones(2, 3)
    solution = fixed_point(pair, (torch.zeros(2, 3), torch.zeros(2, 3)), (x,), max_steps=4, trajectory=True)
    first, last = intermediate_states(pair, solution.trajectory, (x,), indices=[0, 3])
    assert isinstance(first, tuple)
    torch.testing.assert_close(first, pair((torch.zeros(2, 3), torch.zeros(2, 3)), x))
    torch.testing.assert_close(last, pair((solution.trajectory[0][3], solution.trajectory[1][3]), x))


def test_the_loss_weighs_later_states_more():
    states = [torch.tensor([1.0]), torch.tensor([10.0]), torch.tensor([100.0])]
    assert float(correction_loss(torch.sum, states, gamma=0.5)) == pytest.approx(0.25 + 5 + 100)
    with pytest.raises(ValueError, match="count must be at least 1"):
        correction_loss(torch.sum, [])


@pytest.mark.parametrize(
    "error, match, options",
    [
        (ValueError, "steps must be at least 1; got 0", {"indices": [0], "steps": 0}),
        (ValueError, r"damping must be in \(0, 1\]; got 2", {"indices": [0], "damping": 2.0}),
        (IndexError, "outside of the trajectory's 9 states", {"indices": [9]}),
        (ValueError, r"\(count, batch = 3\); got \(1, 2\)", {"indices": torch.zeros(1, 2, dtype=torch.int64)}),
    ],
)
def test_bad_options(solved, error, match, options):
    w, x, solution = solved
    with pytest.raises(error, match=match):
        intermediate_states(cell, solution.trajectory, (x, w), **options)


def test_a_solution_without_a_trajectory():
    with pytest.raises(ValueError, match=r"trajectory must hold tensors \(steps \+ 1, batch"):
        intermediate_states(torch.tanh, None, indices=[0])
