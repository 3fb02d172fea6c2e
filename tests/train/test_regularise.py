"""The penalty measures what it says."""

import pytest
import torch

from restpoint.models import DEQ
from restpoint.train.regularise import growth_penalty


def test_growth_tends_to_the_spectral_radius_and_is_penalised_above_the_limit():
    matrix = (torch.diag(torch.tensor([0.9, 0.5, 0.2, 0.1])).double()).requires_grad_()
    layer = DEQ(lambda z, x: z @ matrix.T + x, rtol=1e-8, max_steps=200)
    problem = layer.problem(torch.randn(5, 4, dtype=torch.float64))
    z = layer.solve_problem(problem).value
    penalty, growth = growth_penalty(problem, z, limit=0.4, powers=60)
    assert growth == pytest.approx(0.9, abs=1e-6)
    assert penalty.item() == pytest.approx(0.25, abs=1e-6)
    (gradient,) = torch.autograd.grad(penalty, matrix)
    expected = torch.zeros(4, 4, dtype=torch.float64)
    expected[0, 0] = 2 * (0.9 - 0.4)
    torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=1e-4)
    assert growth_penalty(problem, z, limit=0.95, powers=60)[0] == 0


def test_states_of_several_tensors():
    layer = DEQ(
        lambda z, x: (0.5 * z[0] + x, 0.25 * z[1] * x.sum(1, keepdim=True)),
        state=lambda x: (torch.zeros_like(x), torch.zeros(len(x), 1)),
    )
    problem = layer.problem(torch.ones(2, 3) / 3)
    _, growth = growth_penalty(problem, layer.solve_problem(problem).value, limit=0.1, powers=30)
    assert growth == pytest.approx(0.5, abs=1e-5)
