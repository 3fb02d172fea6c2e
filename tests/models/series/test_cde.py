"""Neural controlled differential equations: exact gradients, and what their answer does not depend on."""

import math

import pytest
import torch
from torch import nn

from restpoint.models.series import CDEField, ControlPath, NeuralCDE, spline_path
from restpoint.solvers import ode
from restpoint.solvers.diagnose import peak_memory

NAN = float("nan")
FINE = {"controller": ode.ConstantController(dt=1 / 16)}


def series(batch=3, length=6, variables=2):
    times = torch.arange(length) + 0.6 * torch.rand(batch, length, dtype=torch.float64)
    values = torch.randn(batch, length, variables, dtype=torch.float64)
    return times, values, torch.rand(batch, length, variables) < 0.6


def small(**arguments):
    return NeuralCDE(**{"variables": 2, "hidden": 3, "width": 5, "depth": 1, **arguments}).double()


@torch.no_grad()
def reference(model, path, steps=40):
    """z at the path's end, by so many classical steps an interval that know nothing of `solve_ode`."""
    z, h = model.initial(path.coefficients[:, 0, 0]), 1 / steps

    def rate(c, u, z):
        slope = c[:, 1] + 2 * u * c[:, 2] + 3 * u**2 * c[:, 3]
        return (model.field(z) @ slope.unsqueeze(-1)).squeeze(-1)

    for i in range(int(path.end)):
        c = path.coefficients[:, i]
        for k in range(steps):
            u = k * h
            a = rate(c, u, z)
            b = rate(c, u + h / 2, z + h / 2 * a)
            d = rate(c, u + h / 2, z + h / 2 * b)
            z = z + h / 6 * (a + 2 * b + 2 * d + rate(c, u + h, z + h * d))
    return z


def test_it_solves_the_controlled_equation():
    model = small(intensity=0.3, **FINE)
    path = model.path(*series())
    torch.testing.assert_close(model.solve(path).value[-1], reference(model, path), rtol=1e-4, atol=1e-5)


def test_along_a_linear_field_the_answer_is_an_exponential():
    """dz = A z dX of one channel: z = exp(A (X1 - X0)) z0, whatever X does in between."""
    model = small(variables=1, solver=ode.Dopri5(), controller=ode.PIDController(), rtol=1e-9, atol=1e-11)
    matrix = torch.randn(3, 3, dtype=torch.float64)

    class Linear(nn.Module):
        def forward(self, z):
            return torch.stack([torch.zeros_like(z), z @ matrix.T], -1)

    model.field = Linear()
    times, values, observed = series(variables=1)
    observed[:, 0] = observed[:, -1] = True
    solution = model.solve(model.path(times, values, observed))
    rise = (values[:, -1] - values[:, 0]).unsqueeze(-1)
    expected = (torch.linalg.matrix_exp(matrix * rise) @ solution.value[0].unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(solution.value[-1], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("solver", [ode.RK4(), ode.Midpoint()])
def test_gradients_are_those_of_the_steps(solver):
    model = small(intensity=0.2, solver=solver)
    times, values, observed = series(batch=2, length=3)
    # The parameters are changed in place, and need not be handed over.
    parameters = list(model.parameters())
    assert torch.autograd.gradcheck(
        lambda values, *parameters: model(times, values, observed), (values.requires_grad_(), *parameters)
    )


def test_adjoints_agree_with_each_other():
    found = []
    data = series()
    for adjoint in (ode.CheckpointAdjoint(), ode.DirectAdjoint(), ode.CheckpointAdjoint(recursive=True)):
        torch.manual_seed(1)
        model = small(adjoint=adjoint, controller=ode.ConstantController(dt=1 / 4))
        model(*data).sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found[0], found[2], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["hermite", "linear"])
def test_points_without_observation_change_nothing(kind):
    model = small(intensity=0.3, kind=kind, **FINE)
    times, values, observed = series()
    before = model(times, values, observed)
    for place in (2, 4):
        middle = (times[:, place - 1 : place] + times[:, place : place + 1]) / 2
        times = torch.cat([times[:, :place], middle, times[:, place:]], 1)
        nothing = torch.full_like(values[:, :1], NAN)
        values = torch.cat([values[:, :place], nothing, values[:, place:]], 1)
        observed = torch.cat([observed[:, :place], torch.zeros_like(observed[:, :1]), observed[:, place:]], 1)
    torch.testing.assert_close(model(times, values, observed), before, rtol=1e-4, atol=1e-5)


def test_masked_values_have_no_influence():
    model = small(intensity=0.3)
    times, values, observed = series()
    before = model(times, values, observed)
    for other in (1e6, NAN, math.inf):
        assert model(times, values.masked_fill(~observed, other), observed).equal(before)
    values.requires_grad_()
    model(times, values, observed).sum().backward()
    assert (values.grad[~observed] == 0).all()
    assert (values.grad[observed] != 0).any()


def test_series_of_other_lengths_do_not_touch_each_other():
    model = small(num_classes=3)
    times, values, observed = series(batch=2, length=5)
    alone = model(times[:1, :3], values[:1, :3], observed[:1, :3])
    times[0, 3:] = times[0, 2]
    values[0, 3:], observed[0, 3:] = NAN, False
    together = model(times, values, observed)
    torch.testing.assert_close(together[:1], alone, rtol=1e-12, atol=1e-12)
    values[1] = torch.randn_like(values[1])
    assert model(times, values, observed)[0].equal(together[0])


def test_it_does_not_matter_how_fast_the_path_is_followed():
    """Lemma C.1: twice as many points on the same straight lines lead to the same place."""
    model = small(kind="linear", solver=ode.RK4(), **FINE)
    times, values, _ = series(length=4)
    middle = (times[:, 1:] + times[:, :-1]) / 2, (values[:, 1:] + values[:, :-1]) / 2
    fine = [torch.stack([a[:, :-1], b], 2).flatten(1, 2) for a, b in zip((times, values), middle)]
    finer = [torch.cat([a, b[:, -1:]], 1) for a, b in zip(fine, (times, values))]
    whole = torch.ones_like(values, dtype=torch.bool), torch.ones_like(finer[1], dtype=torch.bool)
    torch.testing.assert_close(model(*finer, whole[1]), model(times, values, whole[0]), rtol=1e-4, atol=1e-5)


def test_it_is_the_published_one():
    field = CDEField(hidden=4, channels=3, width=7, depth=2)
    kinds = [type(layer) for layer in field.layers]
    assert kinds == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear, nn.Tanh], "tanh at the end"
    assert field(torch.randn(2, 4)).shape == (2, 4, 3)
    assert field(1e6 * torch.randn(2, 4)).abs().max() <= 1
    model = NeuralCDE(variables=5, statics=2, intensity=1.0, hidden=4)
    # z(t0) is a function of X(t0), here of the time, five variables and as many counts, beside the statics.
    assert model.initial.in_features == 1 + 5 + 5 + 2
    assert model.field.shape == (4, 11)
    assert isinstance(model.solver, ode.RK4)


def test_steps_cost_no_memory():
    times, values, observed = (x.float() if x.is_floating_point() else x for x in series(batch=512, length=3))
    peaks = []
    for steps in (4, 32):
        model = NeuralCDE(
            variables=2, hidden=8, width=16, depth=1, adjoint=ode.CheckpointAdjoint(recursive=True),
            controller=ode.ConstantController(dt=1 / steps),
        )  # fmt: skip
        peaks.append(peak_memory(lambda: model(times, values, observed).sum().backward()))  # noqa: B023
    assert peaks[1] < 1.5 * peaks[0]


def test_adaptive_steps_find_the_bends():
    times, values, observed = series(length=9)
    model = small(kind="linear")
    path = model.path(times, values, observed)
    model.solver, model.controller = ode.Tsit5(), ode.PIDController()
    model.rtol, model.atol = 1e-7, 1e-9
    solution = model.solve(path)
    torch.testing.assert_close(solution.value[-1], reference(model, path), rtol=1e-4, atol=1e-5)
    # Nearly every interval is smooth, and no step is thrown away at its end.
    assert (solution.stats.rejected <= 2 * path.end).all()


def test_a_path_may_be_anything_with_coefficients():
    model = small(variables=1)
    line = torch.zeros(2, 1, 4, 2, dtype=torch.float64)
    assert model.solve(ControlPath(line)).value.diff(dim=0).abs().max() == 0
    assert spline_path(torch.zeros(1, 2), torch.zeros(1, 2, 1), torch.zeros(1, 2, 1, dtype=torch.bool)).end == 1


def test_what_does_not_fit_is_refused():
    times, values, observed = series()
    with pytest.raises(ValueError, match="expected 3 variables; got 2"):
        small(variables=3)(times, values, observed)
    with pytest.raises(ValueError, match="static of 2 values"):
        small(statics=2)(times, values, observed)
    with pytest.raises(ValueError, match="sizes must be at least 1"):
        small(hidden=0)
