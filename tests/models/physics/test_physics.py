"""Hamiltonian networks, second-order ODEs and one without structure."""

import pytest
import torch

from restpoint.models.physics import HamiltonianNetwork, ScalarMLP, SecondOrderODE, UnstructuredODE
from restpoint.solvers import RK4, CheckpointAdjoint, ConstantController, DirectAdjoint, Dopri8, Leapfrog, Yoshida4
from restpoint.solvers.diagnose import peak_memory
from restpoint.zoo import create_model, list_models, save_pretrained

NAMES = list_models("test_*", task="trajectory-regression", pretrained=False)
TIMES = (0.0, 0.1, 0.2, 0.3)


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def seen():
    return torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))


def test_contract(name, seen, tmp_path):
    model = create_model(name, degrees=2).eval()
    predicted = model(seen, TIMES)
    assert predicted.shape == (3, 4, 4)
    torch.testing.assert_close(predicted, model(seen, torch.tensor(TIMES)))
    if model.sees_momenta:
        torch.testing.assert_close(predicted[:, 0], seen[:, 0])
    else:
        torch.testing.assert_close(predicted, model(torch.cat([seen[..., :2], torch.zeros(3, 5, 2)], 2), TIMES))
    predicted.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    save_pretrained(model, tmp_path)
    again = create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again(seen, TIMES), predicted)


def test_samples_do_not_touch_each_other(name, seen):
    model = create_model(name, degrees=2, controller=ConstantController(dt=0.05)).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(seen[1:2], TIMES), model(seen, TIMES)[1:2])


def test_gradients(name):
    model = create_model(name, degrees=1, controller=ConstantController(dt=0.1)).double()
    seen = torch.randn(2, 5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)

    # Their own parameters, which gradcheck moves: the backward pass evaluates the field anew, with what it then holds.
    def loss(seen, *parameters):
        return model(seen, TIMES).square().sum()

    assert torch.autograd.gradcheck(loss, (seen, *model.parameters()), fast_mode=True)


def test_observations_that_do_not_fit_are_refused(name):
    model = create_model(name, degrees=2)
    with pytest.raises(ValueError, match=r"or more, 4\); got \(3, 5, 2\)"):
        model(torch.zeros(3, 5, 2), TIMES)
    with pytest.raises(ValueError, match="expected observations"):
        model(torch.zeros(3, model.context - 1, 4), TIMES)


def test_the_gradient_in_closed_form_is_autograds():
    torch.manual_seed(0)
    function = ScalarMLP(3, (7, 5)).double()
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(function(x).sum(), x)
    torch.testing.assert_close(function.gradient(x), expected)
    with pytest.raises(ValueError, match="one layer at least"):
        ScalarMLP(3, ())


def energies(model, times):
    start = torch.randn(8, 1, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        q, p = model(start, times).split(2, dim=2)
        return model.energy(q, p)


def test_the_learnt_energy_is_kept_over_thousands_of_steps():
    torch.manual_seed(0)
    model = HamiltonianNetwork(
        degrees=2, hidden=(16, 16), solver=Leapfrog(), controller=ConstantController(dt=0.1)
    ).double()  # fmt: skip
    found = energies(model, torch.linspace(0, 200, 101, dtype=torch.float64))
    error = (found - found[:, :1]).abs().amax(0)
    # It oscillates: the second half is no worse than the first.
    assert error.max() < 1e-2
    assert error[50:].max() < 2 * error[:50].max()


def test_the_orders_of_the_symplectic_steps_show_in_the_energy():
    torch.manual_seed(0)
    times = torch.linspace(0, 4, 3, dtype=torch.float64)
    for solver, order in ((Leapfrog(), 2), (Yoshida4(), 4)):
        errors = []
        for dt in (0.1, 0.05):
            torch.manual_seed(0)
            options = {"solver": solver, "controller": ConstantController(dt=dt)}
            model = HamiltonianNetwork(degrees=2, hidden=(16, 16), **options).double()
            found = energies(model, times)
            errors.append((found - found[:, :1]).abs().mean())
        assert abs(torch.log2(errors[0] / errors[1]) - order) < 0.4


def test_the_flow_is_symplectic():
    torch.manual_seed(0)
    model = HamiltonianNetwork(degrees=2, hidden=(8, 8)).double()

    def flow(state):
        return model(state.view(1, 1, 4), (0.0, 1.0))[0, -1]

    jacobian = torch.autograd.functional.jacobian(flow, torch.randn(4, dtype=torch.float64))
    one, none = torch.eye(2, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)
    form = torch.cat([torch.cat([none, one], 1), torch.cat([-one, none], 1)])
    torch.testing.assert_close(jacobian.T @ form @ jacobian, form, rtol=1e-10, atol=1e-10)


def test_velocities_are_derivatives_of_positions():
    torch.manual_seed(0)
    model = SecondOrderODE(hidden=(8,), encoder=(8,), context=3, mass=2.0, solver=Dopri8(), rtol=1e-9, atol=1e-9)
    model = model.double()
    times = torch.tensor([0.0, 0.4999, 0.5, 0.5001], dtype=torch.float64)
    with torch.no_grad():
        q, p = model(torch.randn(4, 3, 2, dtype=torch.float64), times).unbind(2)
    torch.testing.assert_close(p[:, 2], 2.0 * (q[:, 3] - q[:, 1]) / 2e-4, rtol=1e-5, atol=1e-5)


def test_memory_of_training_grows_more_slowly_than_the_steps():
    seen = torch.randn(64, 1, 4, generator=torch.Generator().manual_seed(0))

    def peak(steps, adjoint):
        model = HamiltonianNetwork(
            degrees=2, hidden=(128, 128), adjoint=adjoint, solver=Leapfrog(),
            controller=ConstantController(dt=1.0 / steps),
        )  # fmt: skip
        return peak_memory(lambda: model(seen, (0.0, 1.0)).sum().backward())

    assert peak(64, CheckpointAdjoint()) < peak(64, DirectAdjoint()) / 3


def test_options_are_checked():
    with pytest.raises(ValueError, match="context must be an integer of at least 2"):
        SecondOrderODE(context=1)
    with pytest.raises(ValueError, match="mass must be positive"):
        SecondOrderODE(mass=0.0)
    with pytest.raises(ValueError, match="degrees must be an integer of at least 1"):
        UnstructuredODE(degrees=0, solver=RK4())
