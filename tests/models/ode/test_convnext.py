"""timm's ConvNeXt block as the field of neural ODEs."""

import copy

import pytest
import torch
import torch.nn.functional as F
from timm.models.convnext import ConvNeXtBlock

from restpoint import create_model
from restpoint.models.ode import ConvNeXtField, ODEConvNeXt
from restpoint.solvers.diagnose import peak_memory
from restpoint.solvers.ode import RK4, CheckpointAdjoint, ConstantController, DirectAdjoint, Euler

TEST = {"channels": (8, 16), "in_chans": 1, "num_classes": 4}


def test_one_step_of_euler_is_timms_stage():
    model = create_model("test_ode_convnext", solver=Euler(), controller=ConstantController(dt=1.0))
    x = model.stem(torch.randn(2, 3, 12, 12))
    for down, ode in model.stages:
        x = down(x)
        block = ConvNeXtBlock(x.shape[1], ls_init_value=0.1)
        assert type(ode.field.block) is ConvNeXtBlock
        block.load_state_dict(ode.field.block.state_dict())
        torch.testing.assert_close(ode(x), block(x))
        x = ode(x)


def test_the_time_moves_the_input_of_the_field():
    field = ConvNeXtField(4, 0.1)
    y, t = torch.randn(3, 4, 6, 6), torch.tensor([0.0, 0.5, 1.0])
    torch.testing.assert_close(field(t, y), field(torch.zeros(()), y))
    with torch.no_grad():
        field.bias.normal_()
    each = [field(time, row.unsqueeze(0)) for time, row in zip(t, y, strict=True)]
    torch.testing.assert_close(field(t, y), torch.cat(each))
    assert not torch.allclose(field(t[2], y), field(t[0], y))


def test_levels_are_a_pyramid_and_solves_report():
    model = create_model("ode_convnext_tiny")
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        levels, solutions = list(model.forward_levels(images)), model.solve(images)
    assert [tuple(level.shape[1:]) for level in levels] == [(64, 8, 8), (128, 4, 4), (256, 2, 2)]
    for level, solution in zip(levels[:-1], solutions, strict=False):
        torch.testing.assert_close(level, solution.value[-1])
    assert all((solution.stats.steps >= 1).all() for solution in solutions)
    assert all(solution.converged.all() for solution in solutions)


def test_every_parameter_gets_the_gradient_of_the_taped_solve():
    model = ODEConvNeXt(**TEST, rtol=1e-5, atol=1e-5).double()
    direct = copy.deepcopy(model)
    for _, ode in direct.stages:
        ode.adjoint = DirectAdjoint()
    images = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    for network in (model, direct):
        network(images).square().sum().backward()
    for (name, ours), theirs in zip(model.named_parameters(), direct.parameters(), strict=True):
        assert ours.grad.any(), name
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-10)


def test_a_few_steps_of_training():
    model = ODEConvNeXt(**TEST)
    labels = torch.arange(16) % 4
    images = 0.3 * torch.randn(16, 1, 8, 8)
    for image, label in zip(images, labels.tolist(), strict=True):
        image[0, label::4] += 1.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert all(solution.converged.all() for solution in model.solve(images))


def test_the_memory_of_a_backward_pass_hardly_grows_with_the_steps():
    images = torch.randn(4, 1, 16, 16)

    def memory(steps, adjoint):
        controller = ConstantController(dt=1.0 / steps)
        model = ODEConvNeXt(**TEST, adjoint=adjoint, solver=RK4(), controller=controller)
        return peak_memory(lambda: model(images).square().sum().backward())

    assert memory(8, CheckpointAdjoint(recursive=True)) < 1.1 * memory(2, CheckpointAdjoint(recursive=True))
    assert memory(8, DirectAdjoint()) > 2 * memory(2, DirectAdjoint())


def test_no_stage_is_an_error():
    with pytest.raises(ValueError, match="at least one stage"):
        ODEConvNeXt(channels=())
