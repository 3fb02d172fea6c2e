"""Implicit graph networks and graph diffusion: what both keep, and what each promises."""

import pytest
import torch
from torch import nn

from restpoint.models.graph import GRAND, IGNN, Graph, ImplicitGraph
from restpoint.solvers import RK4, ConstantController, ImplicitAdjoint, Picard, UnrollAdjoint
from restpoint.solvers.diagnose import peak_memory
from restpoint.zoo import create_model, list_models
from tests.models.graph.graphs import random_graph

NAMES = list_models("test_*", task="node-classification", pretrained=False)
TIGHT = {"test_ignn": {"rtol": 1e-12, "max_steps": 500}, "test_grand": {"rtol": 1e-9, "atol": 1e-9}}


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


def test_contract(name, graph):
    model = create_model(name, num_classes=4, features=8)
    graph = graph.to(dtype=torch.float32)
    model.eval()
    logits = model(graph)
    assert logits.shape == (9, 4)
    torch.testing.assert_close(model.forward_head(model.forward_features(graph)), logits)
    logits.logsumexp(1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with pytest.raises(ValueError, match="expected nodes of 8 features; got 3"):
        model(Graph.of(torch.tensor([[0], [1]]), torch.ones(2, 3)))


def test_nodes_may_come_in_any_order(name, graph):
    torch.manual_seed(0)
    model = create_model(name, **TIGHT[name]).double().eval()
    order = torch.randperm(9)
    with torch.no_grad():
        torch.testing.assert_close(model(graph.permuted(order)), model(graph)[order], rtol=1e-7, atol=1e-7)


def test_graphs_that_are_not_connected_do_not_touch_each_other(name, graph):
    torch.manual_seed(0)
    model = create_model(name, **TIGHT[name]).double().eval()
    first, second = random_graph(seed=1), random_graph(seed=2)
    both = Graph.of(
        torch.cat([torch.stack([g.edges.column, g.edges.row]) + 9 * k for k, g in enumerate((first, second))], dim=1),
        torch.cat([g.read(torch.eye(8, dtype=torch.float64)) for g in (first, second)]),
    )
    with torch.no_grad():
        torch.testing.assert_close(model(both), torch.cat([model(first), model(second)]), rtol=1e-7, atol=1e-7)


def test_gradients(name, graph):
    torch.manual_seed(0)
    model = create_model(name, **TIGHT[name]).double().eval()
    if isinstance(model, GRAND):
        nn.init.normal_(model.diffusivity.key.weight)  # else the attention is constant to rounding
        nn.init.normal_(model.diffusivity.query.weight)
    chosen = [p for n, p in model.named_parameters() if n not in ("omega", "encoder")]

    def loss(*parameters):
        return model(graph).square().sum()

    assert torch.autograd.gradcheck(loss, chosen, atol=1e-6, rtol=1e-5, fast_mode=True)


def test_linear_diffusion_is_the_exponential_of_its_matrix(graph):
    torch.manual_seed(0)
    model = GRAND(
        features=8, channels=5, attention=4, heads=2, time=3.0, source=False, rtol=1e-10, atol=1e-10
    ).double()  # fmt: skip
    nn.init.normal_(model.diffusivity.key.weight)
    model.eval()
    start = model.encode(graph)
    shares = model.diffusivity(graph.looped, start)
    matrix = torch.zeros(9, 9, dtype=torch.float64).index_put((graph.looped.row, graph.looped.column), shares)
    spread = torch.linalg.matrix_exp(0.5 * 3.0 * (matrix - torch.eye(9, dtype=torch.float64))) @ start
    torch.testing.assert_close(model.forward_features(graph), spread, rtol=1e-8, atol=1e-8)


def test_the_rest_point_is_unique_for_whatever_weights(graph):
    torch.manual_seed(0)
    layer = ImplicitGraph(6, kappa=0.9, rtol=1e-13, max_steps=2_000).double()
    for size in (1e-3, 1.0, 1e3, 1e6):
        with torch.no_grad():
            layer.weight.normal_(std=size)
            reason = layer.well_posed(graph)
            assert reason.contraction <= 0.9 + 1e-12
            problem = layer.problem(graph, torch.randn(9, 6, dtype=torch.float64))
            found = [
                layer.solve_problem(type(problem)(problem.f, start, problem.args))
                for start in (problem.z0, 100 * torch.randn(1, 9, 6, dtype=torch.float64))
            ]
        assert all(solution.converged.all() for solution in found)
        torch.testing.assert_close(found[0].value, found[1].value, rtol=1e-9, atol=1e-9)


def test_the_map_shrinks_distances_as_certified(graph):
    torch.manual_seed(0)
    layer = ImplicitGraph(6, kappa=0.8).double()
    nn.init.normal_(layer.weight, std=10.0)
    problem = layer.problem(graph, torch.randn(9, 6, dtype=torch.float64))
    # The Perron eigenvector of the symmetric normalisation weighs the nodes.
    x = graph.looped.starts.diff().double().sqrt().view(1, 9, 1)
    for _ in range(20):
        a, b = torch.randn(2, 1, 9, 6, dtype=torch.float64)
        before = ((a - b) / x).abs().max()
        after = ((problem.f(a, *problem.args) - problem.f(b, *problem.args)) / x).abs().max()
        assert after <= layer.well_posed(graph).contraction * before * (1 + 1e-12)


def test_weights_inside_the_ball_stay_as_they_are(graph):
    layer = ImplicitGraph(3, kappa=0.9).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.1, -0.2, 0.3], [0.0, 0.0, 0.0], [5.0, 0.0, 0.0]]))
    matrix = layer.matrix(graph)
    torch.testing.assert_close(matrix[:2], layer.weight[:2])
    torch.testing.assert_close(matrix[2].abs().sum(), torch.tensor(0.9 / graph.perron, dtype=torch.float64))


def test_the_implicit_gradient_equals_unrolling(graph):
    gradients = []
    for adjoint in (ImplicitAdjoint(), UnrollAdjoint()):
        torch.manual_seed(0)
        model = create_model("test_ignn", adjoint=adjoint, rtol=1e-13, max_steps=500).double().eval()
        model(graph).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-8)


def test_options_are_checked():
    with pytest.raises(ValueError, match="kappa must be between 0 and 1"):
        IGNN(kappa=1.0)
    with pytest.raises(ValueError, match="3 heads cannot share a width of 4"):
        GRAND(attention=4, heads=3)
    with pytest.raises(ValueError, match="time must be positive"):
        GRAND(time=0.0)


def test_memory_of_training_does_not_grow_with_the_steps_of_a_solve():
    graph = random_graph(600, 16, dtype=torch.float32)

    def peak(steps, **options):
        model = IGNN(features=16, channels=32, solver=Picard(), rtol=0.0, max_steps=steps, **options)
        return peak_memory(lambda: model(graph).sum().backward())

    assert peak(80) < 1.1 * peak(20)
    assert peak(80, adjoint=UnrollAdjoint()) > 2 * peak(80)


def test_memory_of_diffusion_grows_more_slowly_than_its_steps():
    graph = random_graph(600, 16, dtype=torch.float32)

    def peak(steps):
        model = GRAND(
            features=16, channels=64, attention=16, heads=2, time=10.0, linear=False,
            solver=RK4(), controller=ConstantController(dt=10.0 / steps),
        )  # fmt: skip
        return peak_memory(lambda: model(graph).sum().backward())

    assert peak(160) < 2.5 * peak(20)
