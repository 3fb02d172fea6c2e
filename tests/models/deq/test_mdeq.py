"""MDEQ: the published names, shapes and order of operations, and what an equilibrium layer owes."""

import copy
import hashlib
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from restpoint.models.deq import MDEQ
from restpoint.models.deq.mdeq_parts import MultiscaleBlock, MultiscaleCell, WeightNormConv2d
from restpoint.solvers import GMRES, ImplicitAdjoint
from restpoint.solvers.diagnose import peak_memory
from restpoint.train.unrolled import unrolled
from restpoint.zoo import create_model

# Parameters, and the sha256 of the sorted lines "name shape" of the published weights' state dict.
PUBLISHED = {
    "mdeq_tiny": (158890, "d4185a7ee04b959daea630bb24ba7417a5574f69d33f6125192164a174e2e8d6"),
    "mdeq_large": (11097438, "eea90941efbff57f67366a2ec6f9e20bbaa942f9fb3f73471cd9527c2d5d80d6"),
    "mdeq_large_reg": (11097438, "eea90941efbff57f67366a2ec6f9e20bbaa942f9fb3f73471cd9527c2d5d80d6"),
    "mdeq_small_imagenet": (16808936, "3cd2fdd45a9d937cfa49c71b7c9b64abce19c1b6432810734b06fbad7b0173ba"),
    "mdeq_small_imagenet_reg": (18613496, "14381cc65fb97ed1084d66fc5eb2175c0163ab4716ad2ea99260b97b629136e0"),
    "mdeq_large_imagenet": (67063624, "f89a3d5f4fe49894f1405c4c411a001e62742d8b257501b5fe72598c5a660a4e"),
    "mdeq_large_imagenet_reg": (67061224, "b0f379c92923834afa415d54b0a6bd4a26998a5d50131711e880c00c4dcc6f4b"),
    "mdeq_xl_imagenet": (90463280, "a4cbd5f4cf1f51018b16d5fcb9d479a3573e6a817ecd551bfafe225cf5b7cd46"),
    "mdeq_small_cityscapes": (8968467, "4810d2a44e983ecfa907b79ffa0f987fa5df64fe1e020af3e2b42f11e464c7f0"),
    "mdeq_large_cityscapes": (55955859, "782d1818d588e1905a50f4dc8a6c028e69263884b7208ca3f7ba6751ab4053ea"),
    "mdeq_xl_cityscapes": (79551755, "c67aa9603d67f4737184b3f0465f15bf79dbefd57ae67fbb5fd9b9ca3d75e13b"),
}


def lines(model):
    return [f"{name} {tuple(value.shape)}" for name, value in model.state_dict().items()]


@pytest.mark.parametrize("name", PUBLISHED)
def test_state_dicts_are_the_published_ones(name):
    with torch.device("meta"):
        model = create_model(name)
    parameters, digest = PUBLISHED[name]
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert hashlib.sha256("\n".join(sorted(lines(model))).encode()).hexdigest() == digest


def test_tiny_has_the_published_names_one_by_one():
    published = (Path(__file__).parent / "mdeq_tiny_keys.txt").read_text().splitlines()
    assert sorted(lines(create_model("mdeq_tiny"))) == sorted(published)


def test_the_published_budget():
    for name, channels, dropout, forward, backward in (
        ("mdeq_tiny", (24, 24), 0.25, 18, 20),
        ("mdeq_large", (32, 64, 128, 256), 0.3, 18, 20),
        ("mdeq_xl_imagenet", (88, 176, 352, 704), 0.0, 26, 27),
    ):
        with torch.device("meta"):
            stage = create_model(name).fullstage
        assert tuple(z.shape[1] for z in stage.state(torch.zeros(1, channels[0], 8, 8))) == channels
        assert stage.branches[0].blocks[0].drop.p == dropout
        assert stage.max_steps == forward
        assert stage.adjoint.linear_solver.max_steps == backward


def test_weight_normalisation():
    torch.manual_seed(0)
    conv = WeightNormConv2d(3, 4)
    x = torch.randn(2, 3, 5, 5)
    assert abs(float(conv.weight_v.detach().std()) - 0.01) < 0.002
    torch.testing.assert_close(conv(x), F.conv2d(x, conv.weight_v, padding=1))
    with torch.no_grad():
        conv.weight_v.mul_(7.0)
        before = conv(x)
        conv.weight_g.mul_(2.0)
        torch.testing.assert_close(conv(x), 2 * before)


def gn(norm, x):
    return F.group_norm(x, norm.num_groups, norm.weight, norm.bias)


def test_one_evaluation_written_out():
    torch.manual_seed(0)
    cell = MultiscaleCell((8, 16, 24), 2, 0.0, False)
    for parameter in cell.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 8, 8, 8)
    z = (torch.randn(2, 8, 8, 8), torch.randn(2, 16, 4, 4), torch.randn(2, 24, 2, 2))
    own = []
    for i, state in enumerate(z):
        block = cell.branches[i].blocks[0]
        y = block.conv2(gn(block.gn1, block.conv1(state)).relu())
        y = gn(block.gn2, y + x if i == 0 else y)
        own.append(gn(block.gn3, (y + state).relu()))
    for i, state in enumerate(cell(z, x)):
        total = own[i]
        for j, other in enumerate(own):
            if j > i:
                net = cell.fuse_layers[i][j].net
                up = gn(net.gnorm, F.conv2d(other, net.conv.weight))
                total = total + up.repeat_interleave(2 ** (j - i), 2).repeat_interleave(2 ** (j - i), 3)
            elif j < i:
                for k, step in enumerate(cell.fuse_layers[i][j].net):
                    other = gn(step.gnorm, F.conv2d(other, step.conv.weight, stride=2, padding=1))
                    other = other if k + 1 == i - j else other.relu()
                total = total + other
        post = cell.post_fuse_layers[i]
        torch.testing.assert_close(state, F.group_norm(post.conv(total.relu()), 4))
    assert {m.num_groups for m in cell.branches.modules() if isinstance(m, torch.nn.GroupNorm)} == {8}


def test_dropout_comes_before_the_injection():
    torch.manual_seed(0)
    block = MultiscaleBlock(8, 1, 0.999).train()
    z, x = torch.randn(2, 8, 4, 4), torch.randn(2, 8, 4, 4)
    torch.testing.assert_close(block(z, x), gn(block.gn3, (gn(block.gn2, x) + z).relu()))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return create_model("test_mdeq", num_classes=3)


def test_the_mask_is_one_a_solve():
    torch.manual_seed(0)
    model, images = create_model("test_mdeq", dropout=0.4), torch.randn(2, 3, 8, 8)
    problem, other = model.problem(images), model.problem(images)
    z = tuple(torch.randn_like(z) for z in model.fullstage.state(problem.args[0]))
    first, again, redrawn = problem.f(z, *problem.args), problem.f(z, *problem.args), other.f(z, *other.args)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(first[0], redrawn[0])


def test_gradients_are_those_of_the_rest_point():
    torch.manual_seed(0)
    model = create_model("test_mdeq", num_classes=3, post_affine=True).double().eval()
    stage = model.fullstage
    stage.rtol, stage.max_steps, stage.adjoint = 1e-12, 200, ImplicitAdjoint(GMRES(rtol=1e-12))
    with torch.no_grad():
        # Freshly drawn, a cell is no contraction, and unrolling would lead nowhere.
        for post in stage.post_fuse_layers:
            post.gnorm.weight.fill_(0.05)
            post.gnorm.bias.fill_(2.0)
    x = torch.rand(2, 8, 8, 8, dtype=torch.float64)
    assert stage.solve(x).converged.all()
    parameters = list(stage.parameters())

    def gradients():
        return torch.autograd.grad(sum((z.sin() * z).sum() for z in stage(x)), parameters)

    implicit = gradients()
    with unrolled(model, 60):
        torch.testing.assert_close(implicit, gradients(), rtol=1e-6, atol=1e-8)


def test_warm_up_applies_the_cell_so_many_times(model):
    model.eval()
    images = torch.randn(2, 3, 8, 8)
    x = model.stage0(model.downsample(images))
    z = model.fullstage.state(x)
    for _ in range(3):
        z = model.fullstage.cell(z, x)
    with unrolled(model, 3):
        torch.testing.assert_close(model(images), model.forward_head(z))
    assert model.fullstage.max_steps == 18


def test_memory_does_not_grow_with_the_steps():
    peaks = []
    for steps in (6, 24):
        stage = create_model("test_mdeq", rtol=0.0, max_steps=steps, adjoint=ImplicitAdjoint(GMRES())).fullstage
        stage.solver = type(stage.solver)(memory=4)
        x = torch.randn(4, 8, 16, 16, requires_grad=True)
        peaks.append(peak_memory(lambda stage=stage, x=x: sum(z.square().sum() for z in stage(x))))
    assert peaks[1] <= 1.1 * peaks[0]


def test_odd_sizes_copies_and_pickles(model):
    images = torch.randn(2, 3, 9, 7)
    model.eval()
    with torch.no_grad():
        logits = model(images)
        assert torch.equal(copy.deepcopy(model)(images), logits)
        assert torch.equal(pickle.loads(pickle.dumps(model))(images), logits)  # noqa: S301
        twin = copy.deepcopy(model)
        twin.fullstage.branches[0].blocks[0].conv1.weight_g.mul_(2.0)
        assert twin.fullstage.cell.branches[0] is twin.fullstage.branches[0]
        assert not torch.equal(twin(images), logits)


def test_the_segmenter_labels_every_position():
    torch.manual_seed(0)
    model = create_model("mdeq_small_cityscapes", num_classes=5, channels=(8, 8), max_steps=4).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 32, 48)).shape == (1, 5, 8, 12)


def test_options_out_of_range():
    with pytest.raises(ValueError, match="differ in length"):
        MDEQ(head_channels=(8,))
    with pytest.raises(ValueError, match="halvings must be"):
        MDEQ(halvings=3)
