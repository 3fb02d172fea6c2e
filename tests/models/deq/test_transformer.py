"""timm's transformer block at its rest point."""

import copy

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block

from restpoint import create_model
from restpoint.models.deq import AddPosition, DEQViT, TokenCell
from restpoint.solvers import ImplicitAdjoint, PhantomAdjoint, Picard, UnrollAdjoint
from restpoint.solvers.diagnose import certificate, peak_memory, spectral_radius

TEST = {"channels": 16, "heads": 2, "in_chans": 1, "num_classes": 4}


def pictures(count=16):
    """Noise, of whose rows every fourth is bright; the label says from which on."""
    labels = torch.arange(count) % 4
    images = 0.3 * torch.randn(count, 1, 8, 8)
    for image, label in zip(images, labels.tolist(), strict=True):
        image[0, label::4] += 1.0
    return images, labels


@pytest.mark.parametrize("name", ["test_deq_vit", "deq_vit_tiny", "deq_vit_small"])
def test_the_cell_is_timms_block_and_begins_as_a_contraction(name):
    model = create_model(name)
    (block,) = model.deq.cell.blocks
    assert type(block) is Block
    images = torch.randn(4, 3, 16, 24)
    with torch.no_grad():
        problem = model.problem(images)
        solution = model.solve_problem(problem)
    assert solution.value.shape == (4, model.num_features, 4, 6)
    assert solution.converged.double().mean() > 0.9
    assert solution.stats.steps.max() <= 15
    radius = spectral_radius(problem.f, solution.value, problem.args, generator=torch.Generator().manual_seed(0))
    assert (radius < 0.2).all()


def test_small_branches_make_it_a_contraction_by_as_much():
    """P h' / r: a tenth of the branches, a tenth of the radius; twice the injection, half of it."""

    def radius(**options):
        torch.manual_seed(0)
        model = create_model("test_deq_vit", rtol=1e-10, **options).double()
        problem = model.problem(torch.randn(2, 3, 8, 8, dtype=torch.float64))
        with torch.no_grad():
            value = model.solve_problem(problem).value
        found = spectral_radius(problem.f, value, problem.args, generator=torch.Generator().manual_seed(0))
        return found.mean().item()

    base = radius(layer_scale=1e-2)
    assert radius(layer_scale=1e-3) == pytest.approx(base / 10, rel=0.1)
    assert radius(layer_scale=1e-2, gain=2.0) == pytest.approx(base / 2, rel=0.1)


def test_the_cell_by_hand():
    block = Block(8, 2)
    cell = TokenCell(block, 8)
    z, x = torch.randn(2, 8, 3, 5), torch.randn(2, 8, 3, 5)
    tokens = z.permute(0, 2, 3, 1).reshape(2, 15, 8)
    hidden = block.attn(block.norm1(tokens))
    added = hidden + block.mlp(block.norm2(tokens + hidden))
    tokens = added + x.permute(0, 2, 3, 1).reshape(2, 15, 8)
    by_hand = F.layer_norm(tokens, (8,)).reshape(2, 3, 5, 8).permute(0, 3, 1, 2)
    torch.testing.assert_close(cell(z, x), by_hand)
    # Whatever comes in, what goes out has the length of the norm.
    assert cell(100 * z, x).square().mean().item() == pytest.approx(1.0, rel=1e-2)


def test_positions_tell_rows_from_columns_at_every_size():
    blank = torch.zeros(1, 16, 5, 7)
    marked = AddPosition()(blank)[0].flatten(1).T
    assert torch.cdist(marked, marked).fill_diagonal_(1.0).min() > 0.1
    torch.testing.assert_close(AddPosition()(torch.zeros(1, 16, 9, 9))[0, :, :5, :7].flatten(1).T, marked)


def test_gradients_are_those_of_unrolling():
    options = {**TEST, "rtol": 1e-10, "max_steps": 200, "solver": Picard()}
    model = DEQViT(**options).double()
    twin = copy.deepcopy(model)
    twin.deq.adjoint = UnrollAdjoint()
    images = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    for each in (model, twin):
        each(images).square().sum().backward()
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-8, msg=name)


@pytest.mark.parametrize("adjoint", [ImplicitAdjoint(), PhantomAdjoint(3)], ids=["implicit", "phantom"])
def test_a_few_steps_of_training(adjoint):
    model = DEQViT(**TEST, adjoint=adjoint)
    images, labels = pictures()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    losses = []
    for _ in range(10):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    assert model.solve(images).converged.double().mean() > 0.9


@pytest.mark.parametrize("adjoint", [ImplicitAdjoint(), PhantomAdjoint(3)], ids=["implicit", "phantom"])
def test_the_memory_of_a_backward_pass_does_not_grow_with_the_steps(adjoint):
    images, labels = pictures(2)

    def memory(steps, adjoint):
        # A tolerance that is never met: exactly so many steps.
        model = DEQViT(**TEST, adjoint=adjoint, solver=Picard(), rtol=0.0, max_steps=steps)
        return peak_memory(lambda: F.cross_entropy(model(images), labels).backward())

    assert memory(12, adjoint) <= 1.01 * memory(4, adjoint)
    assert memory(12, UnrollAdjoint()) > 2 * memory(4, UnrollAdjoint())


def test_the_rest_point_can_be_certified():
    model = DEQViT(**TEST, rtol=1e-6).double()
    problem = model.problem(torch.randn(2, 1, 8, 8, dtype=torch.float64))
    with torch.no_grad():
        value = model.solve_problem(problem).value
    checked = certificate(problem.f, value, problem.args, generator=torch.Generator().manual_seed(0), tolerance=0.05)
    assert checked.solved.all()
    assert checked.smooth.all()
    assert checked.regular.all()


def test_what_does_not_fit_says_so():
    with pytest.raises(ValueError, match="multiples of the patch, 4; got \\(8, 10\\)"):
        DEQViT(**TEST)(torch.randn(1, 1, 8, 10))
    with pytest.raises(ValueError, match="multiple of 4 and of heads=3; got 16"):
        DEQViT(channels=16, heads=3)
