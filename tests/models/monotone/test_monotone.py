"""Monotone layers: what they promise, against dense matrices and other ways to compute the same."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils import _pytree as pytree

from restpoint.models.monotone import (
    ConvOperator,
    DenseOperator,
    ForwardBackward,
    MonotoneDEQ,
    MonotoneFC,
    MultiTierOperator,
    PeacemanRachford,
)
from restpoint.solvers import GMRES, Anderson, ImplicitAdjoint
from restpoint.zoo import create_model

KINDS = ["dense", "conv", "tiers"]
SHAPES = {"dense": [(12,)], "conv": [(3, 6, 5)], "tiers": [(2, 5, 6), (3, 3, 3), (2, 2, 2)]}


def make(kind, margin=0.3, seed=0):
    torch.manual_seed(seed)
    operator = {
        "dense": lambda: DenseOperator(12, margin),
        "conv": lambda: ConvOperator(3, 3, margin),
        "tiers": lambda: MultiTierOperator((2, 3, 2), 3, margin),
    }[kind]()
    return operator.double()


def injection(kind, batch=2, scale=1.0):
    tiers = tuple(scale * torch.randn(batch, *shape, dtype=torch.float64) for shape in SHAPES[kind])
    return tiers if kind == "tiers" else tiers[0]


def flat(state):
    return torch.cat([leaf.flatten(1) for leaf in pytree.tree_leaves(state)], dim=1)


def dense(operator, like):
    """The matrix of W, column by column."""
    leaves, structure = pytree.tree_flatten(like)
    sizes = [leaf[0].numel() for leaf in leaves]
    parts = torch.eye(sum(sizes), dtype=torch.float64).split(sizes, dim=1)
    state = pytree.tree_unflatten([p.reshape(-1, *leaf.shape[1:]) for p, leaf in zip(parts, leaves)], structure)
    with torch.no_grad():
        return flat(operator.assemble(like).apply(state)).mT


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def splittings(kind):
    tried = [ForwardBackward(0.1)]
    return tried if kind == "tiers" else [*tried, PeacemanRachford(1.0), PeacemanRachford(0.4)]


@pytest.mark.parametrize("seed", range(3))
def test_the_certificate_holds_of_the_dense_matrix(kind, seed):
    operator = make(kind, seed=seed)
    with torch.no_grad():
        for parameter in operator.parameters():
            parameter.mul_(1 + seed)
    matrix = dense(operator, injection(kind))
    monotone = torch.eye(len(matrix), dtype=torch.float64) - matrix
    certificate = operator.certificate()
    assert certificate.margin == 0.3
    assert torch.linalg.eigvalsh((monotone + monotone.mT) / 2).min() >= certificate.margin - 1e-12
    assert torch.linalg.matrix_norm(monotone, 2) <= certificate.norm * (1 + 1e-12)
    assert certificate.sensitivity == pytest.approx(1 / 0.3)


def test_the_convolution_is_the_periodic_one():
    operator, z = make("conv"), injection("conv")

    def convolve(kernel):
        return F.conv2d(F.pad(z, (1, 1, 1, 1), mode="circular"), kernel)

    def twice(kernel):
        image = F.conv2d(F.pad(z, (1, 1, 1, 1), mode="circular"), kernel.flip(2, 3))
        return F.conv2d(F.pad(image, (1, 1, 1, 1), mode="circular"), kernel.transpose(0, 1))

    skew = convolve(operator.B.flip(2, 3)) - convolve(operator.B.transpose(0, 1))
    torch.testing.assert_close(operator.assemble(z).apply(z), 0.7 * z - twice(operator.A) + skew)


@pytest.mark.parametrize("kind", ["dense", "conv"], indirect=True)
def test_the_resolvent_inverts(kind):
    operator, v = make(kind), injection(kind)
    weights = operator.assemble(v)
    solved = weights.resolvent(0.7)(v)
    torch.testing.assert_close(solved + 0.7 * (solved - weights.apply(solved)), v)


def test_every_splitting_finds_the_one_rest_point(kind):
    operator, b = make(kind), injection(kind)
    found = []
    for splitting in splittings(kind):
        layer = MonotoneDEQ(operator, splitting=splitting, rtol=1e-11, max_steps=2000)
        solution = layer.solve(b)
        assert solution.converged.all()
        z = solution.value
        torch.testing.assert_close(layer.problem(b).f(z, *pytree.tree_leaves(b)), z, rtol=1e-8, atol=1e-9)
        found.append(z)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-8, atol=1e-8)


def test_the_certified_step_contracts_as_certified(kind):
    operator, b = make(kind, margin=1.0), injection(kind)
    layer = MonotoneDEQ(operator, splitting=ForwardBackward())
    problem = layer.problem(b)
    rate = layer.certificate().rate
    leaves = pytree.tree_leaves(b)
    with torch.no_grad():
        u, v = injection(kind), injection(kind, scale=3.0)
        for _ in range(5):
            before = (flat(u) - flat(v)).norm(dim=1)
            u, v = problem.step(u, *leaves), problem.step(v, *leaves)
            assert ((flat(u) - flat(v)).norm(dim=1) <= rate * before * (1 + 1e-9)).all()


def test_equilibria_exist_and_move_no_further_than_certified(kind):
    operator = make(kind)
    with torch.no_grad():
        for parameter in operator.parameters():
            parameter.mul_(3.0)  # plain iteration of relu(W z + b) would diverge
    layer = MonotoneDEQ(operator, solver=Anderson(), rtol=1e-8, max_steps=3000)
    if kind == "tiers":
        layer.splitting = ForwardBackward(0.02)
    b, c = injection(kind), injection(kind)
    first, second = layer.solve(b), layer.solve(c)
    assert first.converged.all()
    assert second.converged.all()
    moved = (flat(first.value) - flat(second.value)).norm(dim=1)
    assert (moved <= layer.certificate().sensitivity * (flat(b) - flat(c)).norm(dim=1)).all()


def test_gradients_are_exact(kind):
    operator, b = make(kind, margin=0.8), injection(kind)
    names, parameters = zip(*operator.named_parameters())
    leaves, structure = pytree.tree_flatten(b)
    for splitting in splittings(kind)[:2]:
        adjoint = ImplicitAdjoint(GMRES(rtol=1e-13))
        layer = MonotoneDEQ(operator, splitting=splitting, adjoint=adjoint, rtol=1e-12, max_steps=1000)

        def solve(*values, layer=layer):
            injected = pytree.tree_unflatten(list(values[: len(leaves)]), structure)
            twin = copy.deepcopy(layer)
            with torch.no_grad():
                for name, value in zip(names, values[len(leaves) :]):
                    twin.operator.get_parameter(name).copy_(value)
            solution = twin(injected)
            return flat(solution)

        # The parameters of a module are no inputs: their gradient is compared with a difference quotient.
        torch.autograd.gradcheck(
            lambda *values, layer=layer: flat(layer(pytree.tree_unflatten(list(values), structure))),
            tuple(leaf.detach().requires_grad_() for leaf in leaves), rtol=1e-4, atol=1e-6, fast_mode=True,
        )  # fmt: skip
        weight = torch.randn_like(flat(b))
        grads = torch.autograd.grad((flat(layer(b)) * weight).sum(), parameters)
        direction = [torch.randn_like(p) for p in parameters]
        ahead, behind = (
            solve(*leaves, *[p.detach() + h * d for p, d in zip(parameters, direction)]) for h in (1e-6, -1e-6)
        )
        quotient = ((ahead - behind) * weight).sum() / 2e-6
        slope = sum((g * d).sum() for g, d in zip(grads, direction))
        torch.testing.assert_close(slope, quotient.detach(), rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_is_said():
    with pytest.raises(ValueError, match="margin must be positive"):
        DenseOperator(4, margin=0.0)
    with pytest.raises(ValueError, match="kernel must be odd"):
        ConvOperator(4, kernel=2)
    with pytest.raises(ValueError, match=r"expected a state \(batch, 4\)"):
        MonotoneDEQ(DenseOperator(4))(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="fewer than the kernel"):
        MonotoneDEQ(ConvOperator(4, 5))(torch.zeros(2, 4, 4, 9))
    with pytest.raises(ValueError, match="half as wide"):
        MonotoneDEQ(MultiTierOperator((2, 2)))((torch.zeros(1, 2, 8, 8), torch.zeros(1, 2, 3, 4)))
    with pytest.raises(ValueError, match="no resolvent"):
        MonotoneDEQ(MultiTierOperator((2,)), splitting=PeacemanRachford())((torch.zeros(1, 2, 8, 8),))
    with pytest.raises(ValueError, match="alpha must be positive"):
        PeacemanRachford(alpha=0.0)
    with pytest.raises(ValueError, match="expected images of 28"):
        MonotoneFC()(torch.zeros(1, 1, 12, 12))


@pytest.mark.parametrize("name", ["mon_fc_small", "mon_conv_small", "mon_multi_small"])
def test_the_models_solve_what_they_are_given(name):
    torch.manual_seed(0)
    model = create_model(name).eval()
    images = torch.randn(3, 1, 28, 28)
    with torch.no_grad():
        solution = model.solve(images)
        assert solution.converged.all()
        assert model.certificate().margin > 0
        torch.testing.assert_close(model.forward_head(solution.value), model(images))
        images[1] = float("nan")
        assert model(images).isnan().all(dim=1).tolist() == [False, True, False]
