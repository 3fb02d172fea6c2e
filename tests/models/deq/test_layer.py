"""The equilibrium layer survives what modules go through, and its gradients are those of the solve."""

import copy
import io
import pickle

import jaxtyping
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from restpoint.models import DEQ, VariationalDropout
from restpoint.solvers import (
    Anderson,
    CheckpointAdjoint,
    ImplicitAdjoint,
    PhantomAdjoint,
    Picard,
    ReversibleAdjoint,
    SolverError,
    StateError,
    UnrollAdjoint,
)

EXACT = {"rtol": 1e-12, "max_steps": 200}


class Cell(nn.Module):
    """tanh(W drop(z) + U x), contractive."""

    def __init__(self, width=5, dropout=0.0, channelwise=False):
        super().__init__()
        self.recurrent, self.inject = nn.Linear(width, width), nn.Linear(width, width)
        self.drop = VariationalDropout(dropout, channelwise)
        with torch.no_grad():
            self.recurrent.weight.mul_(0.5)

    def forward(self, z, x):
        return torch.tanh(self.recurrent(self.drop(z)) + self.inject(x))


class ConvCell(nn.Module):
    def __init__(self, dropout=0.5, channelwise=True):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.drop = VariationalDropout(dropout, channelwise)
        with torch.no_grad():
            self.conv.weight.mul_(0.5)

    def forward(self, z, x):
        return torch.tanh(self.conv(self.drop(z)) + x)


def layer_of(norm=None, dropout=0.0, inside=0.0, **options):
    return DEQ(Cell(dropout=inside), norm=norm, dropout=dropout, **{**EXACT, **options}).double()


def inputs(batch=6, width=5):
    return torch.randn(batch, width, dtype=torch.float64)


def gradients(layer, x, seed=None):
    """The value and the gradients of parameters and input of one pass."""
    if seed is not None:
        torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    layer.zero_grad()
    value = layer(x)
    (value**3).sum().backward()
    return [value.detach(), x.grad, *[p.grad.clone() for p in layer.parameters()]]


def assert_equal(ours, theirs, rtol=1e-7):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-9)


@pytest.mark.parametrize("norm", [None, "weight", "spectral"])
def test_the_value_is_a_rest_point_and_the_gradient_is_that_of_unrolling(norm):
    layer, x = layer_of(norm).eval(), inputs()
    solution = layer.solve(x)
    assert solution.converged.all()
    torch.testing.assert_close(layer.cell(solution.value, x), solution.value, rtol=1e-10, atol=1e-10)
    unrolled = copy.deepcopy(layer)
    unrolled.adjoint = UnrollAdjoint()
    assert_equal(gradients(layer, x), gradients(unrolled, x))


@pytest.mark.parametrize("norm", [None, "weight", "spectral"])
def test_train_and_eval_find_the_same_rest_point_with_gradients_in_both(norm):
    layer, x = layer_of(norm), inputs()
    if norm == "spectral":
        # In training the power iteration moves a little at every pass, until it has settled.
        source = layer.cell.recurrent, layer.cell.inject
        for _ in range(300):
            for module in source:
                _ = module.weight
    assert_equal(gradients(layer.train(), x), gradients(layer.eval(), x))


@pytest.mark.parametrize("norm", [None, "weight", "spectral"])
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "state_dict", "torch.save"])
def test_copies_compute_the_same(norm, way):
    layer, x = layer_of(norm, dropout=0.2, inside=0.2), inputs()
    layer.cell.recurrent.bias.requires_grad_(False)
    gradients_of_training(layer, x)
    if way == "deepcopy":
        twin = copy.deepcopy(layer)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(layer))  # noqa: S301 - it is our own
    elif way == "torch.save":
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    else:
        twin = layer_of(norm, dropout=0.2, inside=0.2)
        twin.load_state_dict(layer.state_dict())
        twin.cell.recurrent.bias.requires_grad_(False)
    assert [n for n, _ in twin.named_parameters()] == [n for n, _ in layer.named_parameters()]
    assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in layer.parameters()]
    for ours, theirs in zip(layer.state_dict().items(), twin.state_dict().items(), strict=True):
        assert ours[0] == theirs[0]
        assert torch.equal(ours[1], theirs[1])
    for mode in (True, False):
        torch.manual_seed(1)
        ours = gradients_of_training(layer.train(mode), x)
        torch.manual_seed(1)
        theirs = gradients_of_training(twin.train(mode), x)
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b)
    with torch.no_grad():  # and a copy is independent
        for p in twin.parameters():
            p.add_(1.0)
    assert not torch.equal(layer.cell.inject.bias, twin.cell.inject.bias)


def gradients_of_training(layer, x):
    layer.zero_grad()
    value = layer(x)
    value.sum().backward()
    return [value.detach(), *[p.grad.clone() for p in layer.parameters() if p.requires_grad]]


@pytest.mark.parametrize("norm", [None, "weight", "spectral"])
def test_changes_of_type_and_device_keep_working(norm):
    layer = DEQ(Cell(), norm=norm, dropout=0.3)
    for dtype in (torch.float64, torch.float32):
        layer.to(dtype)
        value = layer(torch.randn(4, 5, dtype=dtype))
        assert value.dtype == dtype
        value.sum().backward()
    layer.to("meta")
    assert {p.device.type for p in layer.parameters()} == {"meta"}


def test_twice_in_one_graph():
    layer, x = layer_of(), inputs().requires_grad_()
    first = layer(x)
    second = layer(first + x)
    (second.sum() + first.square().sum()).backward()
    ours = [x.grad, *[p.grad.clone() for p in layer.parameters()]]
    layer.zero_grad()
    layer.adjoint = UnrollAdjoint()
    x = x.detach().requires_grad_()
    first = layer(x)
    (layer(first + x).sum() + first.square().sum()).backward()
    assert_equal(ours, [x.grad, *[p.grad for p in layer.parameters()]])


@pytest.mark.parametrize("norm", ["weight", "spectral"])
def test_twice_in_one_graph_normalised_and_in_training(norm):
    layer, x = layer_of(norm), inputs().requires_grad_()
    twin = copy.deepcopy(layer)
    twin.adjoint = UnrollAdjoint()
    results = []
    for each in (layer, twin):
        value = each(each(x) + x)
        results.append([value.detach(), *torch.autograd.grad(value.sum(), [x, *each.parameters()])])
    assert_equal(*results)


def test_spectral_normalisation_is_the_same_in_train_and_eval_from_the_start():
    """The power iteration starts where it would end."""
    torch.manual_seed(0)
    layer = DEQ(Cell(width=40), norm="spectral", **EXACT).double()
    x = torch.randn(3, 40, dtype=torch.float64)
    torch.testing.assert_close(layer.train()(x), layer.eval()(x), rtol=1e-5, atol=1e-6)
    norm = torch.linalg.matrix_norm(layer.cell.recurrent.weight, 2)
    assert norm.item() == pytest.approx(1.0, abs=1e-5)


class Tied(nn.Module):
    def __init__(self, same):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first if same else nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, z, x):
        return torch.tanh(self.second(0.3 * self.first(z)) + x)


@pytest.mark.parametrize("norm", ["weight", "spectral"])
def test_tied_weights_stay_tied_or_are_refused(norm):
    with pytest.raises(ValueError, match=r"first\.weight and second\.weight are one tensor"):
        DEQ(Tied(same=False), norm=norm)
    layer = copy.deepcopy(DEQ(Tied(same=True), norm=norm))
    assert layer.cell.first is layer.cell.second
    layer(torch.randn(2, 4)).sum().backward()


def test_a_cell_that_is_normalised_already_says_so():
    cell = Cell()
    for linear in (cell.recurrent, cell.inject):
        nn.utils.parametrizations.weight_norm(linear)
    with pytest.raises(ValueError, match="parametrised already; leave norm out"):
        DEQ(cell, norm="weight")


@pytest.mark.parametrize("norm", ["weight", "spectral"])
def test_weights_are_computed_once_a_solve(norm):
    layer = layer_of(norm)
    calls = []
    source = layer.cell.recurrent.parametrizations.weight[0]
    source.register_forward_hook(lambda *_: calls.append(1))
    solution = layer.solve(inputs())
    solution.value.sum().backward()
    assert solution.stats.evaluations.max() > 5
    assert len(calls) == 1


@pytest.mark.parametrize("norm", ["weight", "spectral"])
def test_adjoints_that_evaluate_again_in_the_backward_pass_see_the_same_weights(norm):
    layer, x = layer_of(norm, adjoint=CheckpointAdjoint()), inputs()
    twin = copy.deepcopy(layer)
    twin.adjoint = UnrollAdjoint()
    assert_equal(gradients(layer, x), gradients(twin, x))


def test_a_cache_without_graph_is_noticed():
    layer, x = layer_of("weight"), inputs()
    with parametrize.cached():
        with torch.no_grad():
            layer(x)
        with pytest.raises(RuntimeError, match="cached without its graph"):
            layer(x)


@pytest.mark.parametrize("dropout, inside", [(0.4, 0.0), (0.0, 0.4), (0.3, 0.3)])
@pytest.mark.parametrize("norm", [None, "weight"])
def test_dropout_has_one_mask_for_forward_and_backward(dropout, inside, norm):
    layer, x = layer_of(norm, dropout, inside), inputs()
    twin = copy.deepcopy(layer)
    twin.adjoint = UnrollAdjoint()
    assert_equal(gradients(layer, x, seed=3), gradients(twin, x, seed=3))
    problem = layer.problem(x)
    solution = layer.solve_problem(problem)
    assert solution.converged.all()
    torch.testing.assert_close(problem.f(solution.value, *problem.args), solution.value, rtol=1e-9, atol=1e-9)


def test_dropout_is_drawn_anew_each_pass_and_off_in_eval():
    layer, x = layer_of(dropout=0.5), inputs()
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    bare = layer_of()
    bare.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), bare(x))


@pytest.mark.parametrize("channelwise", [True, False])
def test_masks_have_the_shape_and_type_of_what_they_multiply(channelwise):
    layer = DEQ(ConvCell(channelwise=channelwise)).double()
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    problem = layer.problem(x)
    mask = problem.args[1]
    assert mask.shape == ((4, 3, 1, 1) if channelwise else (4, 3, 6, 6))
    assert mask.dtype == torch.float64
    assert set(mask.unique().tolist()) == {0.0, 2.0}
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.float().solve(x.float()).value.isfinite().all()


def test_masks_are_compacted_with_their_samples():
    # Rows that need many steps among rows that need few: the former are left alone in the batch on the way.
    layer, x = DEQ(Cell(dropout=0.4), solver=Picard(), **EXACT).double(), inputs(8)
    layer.cell.recurrent.weight.data.mul_(2.0)
    z0 = layer.eval()(x).detach()
    z0[0] += 3.0
    layer.train()
    torch.manual_seed(5)
    problem = layer.problem(x, z0)
    together = layer.solve_problem(problem)
    assert together.stats.steps.min() < together.stats.steps.max()
    for row in range(8):
        alone = problem.f(together.value[row : row + 1], *[a[row : row + 1] for a in problem.args])
        torch.testing.assert_close(alone, together.value[row : row + 1], rtol=1e-9, atol=1e-9)


def test_dropout_outside_a_solve_is_ordinary_and_unbiased():
    drop = VariationalDropout(0.25)
    ones = torch.ones(40, 500)
    assert drop(ones).unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert drop(ones).mean().item() == pytest.approx(1.0, abs=0.02)
    assert torch.equal(drop.eval()(ones), ones)


def test_a_dropout_that_the_layer_cannot_see_is_an_error():
    drop = VariationalDropout(0.5)
    layer = DEQ(lambda z, x: torch.tanh(0.3 * drop(z) + x), dropout=0.1)
    with pytest.raises(RuntimeError, match="no mask for this call"):
        layer(torch.randn(3, 4))


@pytest.mark.parametrize(
    ("reshape", "message"),
    [
        (lambda z: z.reshape(-1, 2), r"expected the batch of the state in front, 3, got 6"),
        (
            lambda z: z if len(z) == 1 else z[:, :3],
            r"a mask of shape \(batch, 3\), and the solve drew one of \(batch, 4\)",
        ),
    ],
)
def test_a_mask_that_does_not_fit_says_what_was_expected(reshape, message):
    class Reshaping(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = VariationalDropout(0.5)

        def forward(self, z, x):
            self.drop(reshape(z))
            return 0.3 * z + x

    with pytest.raises(RuntimeError, match=message):
        DEQ(Reshaping())(torch.randn(3, 4))


def test_dropout_in_a_nested_layer_is_an_error():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = DEQ(Cell(), dropout=0.5)
            self.drop = VariationalDropout(0.5)

        def forward(self, z, x):
            return 0.2 * self.inner(self.drop(z)) + x

    with pytest.raises(NotImplementedError, match="part of another DEQ"):
        DEQ(Outer())(torch.randn(3, 5))


@pytest.mark.parametrize("module, match", [(nn.Dropout(0.1), "VariationalDropout"), (nn.BatchNorm1d(5), "GroupNorm")])
def test_cells_that_are_not_one_map_per_sample_are_refused(module, match):
    with pytest.raises(ValueError, match=match):
        DEQ(nn.Sequential(nn.Linear(5, 5), module))
    DEQ(nn.Sequential(nn.Linear(5, 5), nn.Dropout(0.0)))


def test_any_function_any_structure():
    def cell(z, x):
        return {"a": torch.cos(z["a"] + x[0]) * 0.5, "b": 0.5 * z["b"] + x[1].sum(1, keepdim=True)}

    x = (torch.randn(4, 3), torch.randn(4, 2, requires_grad=True))
    layer = DEQ(cell, state=lambda x: {"a": torch.zeros(4, 3), "b": torch.zeros(4, 1)}, rtol=1e-6)
    value = layer(x)
    torch.testing.assert_close(value["b"], 2 * x[1].sum(1, keepdim=True), rtol=1e-4, atol=1e-4)
    value["b"].sum().backward()
    torch.testing.assert_close(x[1].grad, torch.full((4, 2), 2.0), rtol=1e-4, atol=1e-4)


def test_where_a_solve_starts():
    def cell(z, x):
        return 0.5 * z + x.mean(1, keepdim=True)

    x = torch.randn(4, 3)
    assert DEQ(cell, state=(7,))(x).shape == (4, 7)
    assert DEQ(cell)(x, torch.zeros(4, 2)).shape == (4, 2)
    solution = DEQ(cell, state=(2,)).solve(x)
    again = DEQ(cell, state=(2,)).solve(x, solution)
    assert again.stats.evaluations.max() <= 2
    with pytest.raises(StateError, match=r"DEQ\(cell, state="):
        DEQ(lambda z, x: z[:, :2])(x)
    with pytest.raises(ValueError, match="x is a tuple"):
        DEQ(cell)((x, x))
    with pytest.raises(ValueError, match="floating-point"):
        DEQ(cell)(torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="no tensor with a batch"):
        DEQ(cell)(())


def test_intermediate_states_carry_the_gradient_of_one_evaluation():
    layer, x = layer_of(supervise=3), inputs().requires_grad_()
    solution = layer.solve(x)
    states = solution.trajectory
    assert states.shape == (3, *x.shape)
    plain = layer_of()
    plain.load_state_dict(layer.state_dict())
    distance = (states.detach() - plain(x).detach()).flatten(2).norm(dim=2).mean(1)
    assert (distance.diff() < 0).all()
    weight = layer.cell.recurrent.weight
    ours = torch.autograd.grad(states[0].sum(), [x, weight])
    # By hand: one evaluation at the iterate that a third of the way has reached.
    every = restarted(plain, x)
    at = (solution.stats.steps // 4, torch.arange(len(x)))
    value = plain.cell(every[at].detach(), x)
    torch.testing.assert_close(states[0], value)
    assert_equal(ours, torch.autograd.grad(value.sum(), [x, plain.cell.recurrent.weight]))


def restarted(layer, x):
    from restpoint.solvers import fixed_point

    return fixed_point(layer.cell, torch.zeros_like(x), (x,), solver=layer.solver, trajectory=True, **EXACT).trajectory


def test_options_that_make_no_sense_are_refused(monkeypatch):
    # Outside of tests no type checker sees them first.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(TypeError, match="cell"):
        DEQ(3)
    with pytest.raises(ValueError, match="norm must be"):
        DEQ(Cell(), norm="weigth")
    with pytest.raises(ValueError, match="nothing|no linear"):
        DEQ(nn.Tanh(), norm="weight")
    with pytest.raises(ValueError, match="needs a cell that is an nn.Module"):
        DEQ(torch.add, norm="weight")
    for dropout in (-0.1, 1.0):
        with pytest.raises(ValueError, match="dropout"):
            DEQ(Cell(), dropout=dropout)
        with pytest.raises(ValueError, match="p must lie"):
            VariationalDropout(dropout)
    for supervise in (-1, 1.5):
        with pytest.raises(ValueError, match="supervise must be an integer of at least 0"):
            DEQ(Cell(), supervise=supervise)
    with pytest.raises(TypeError, match=r"solver must be one of .*Anderson\(\).*Did you mean 'Anderson'"):
        DEQ(Cell(), solver="anderson")
    with pytest.raises(TypeError, match=r"adjoint=CheckpointAdjoint\(\)"):
        DEQ(Cell(), adjoint=CheckpointAdjoint)
    for bad in ({"rtol": -1}, {"atol": "0"}, {"max_steps": 0}, {"throw": "foo"}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))} must be"):
            DEQ(Cell(), **bad)
    with pytest.raises(TypeError, match="DEQ has no argument 'max_step'. Did you mean 'max_steps'"):
        DEQ(Cell(), max_step=3)


@pytest.mark.parametrize("adjoint", [ReversibleAdjoint(), ImplicitAdjoint(reuse="start")], ids=["reversible", "reuse"])
def test_no_solver_is_what_the_adjoint_needs(adjoint):
    layer, x = DEQ(Cell(), adjoint=adjoint).double(), inputs()
    layer(x).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in layer.parameters())


def test_throw_reaches_the_solver():
    layer = DEQ(lambda z, x: 2 * z + x, solver=Picard(), throw=True, max_steps=5)
    with pytest.raises(SolverError):
        layer(torch.ones(2, 3))


def test_other_adjoints_and_second_order():
    x = inputs(2, width=3).requires_grad_()
    layer = DEQ(Cell(3), adjoint=ImplicitAdjoint(order=2), **EXACT).double()
    assert torch.autograd.gradcheck(layer, (x,), atol=1e-6)
    assert torch.autograd.gradgradcheck(layer, (x,), atol=1e-6)
    phantom = DEQ(layer.cell, solver=Anderson(memory=3), adjoint=PhantomAdjoint(steps=60, damping=1.0), **EXACT)
    assert_equal(gradients(phantom, x.detach()), gradients(layer, x.detach()), rtol=1e-6)


@pytest.mark.parametrize("norm", [None, "weight", "spectral"])
def test_under_function_transforms(norm):
    layer, x = layer_of(norm, dropout=0.2, inside=0.2).eval(), inputs(3)
    plain = torch.autograd.functional.jacobian(layer, x)
    torch.testing.assert_close(torch.func.jacrev(layer)(x), plain, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(torch.func.vmap(lambda row: layer(row[None])[0])(x), layer(x), rtol=1e-7, atol=1e-9)
    parameters = dict(layer.named_parameters())
    theirs = torch.func.grad(lambda p: torch.func.functional_call(layer, p, (x,)).square().sum())(parameters)
    layer(x).square().sum().backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(theirs[name], parameter.grad, rtol=1e-7, atol=1e-9)


def test_the_representation_names_the_options():
    text = repr(layer_of("weight", dropout=0.1))
    assert "Anderson" in text
    assert "norm='weight'" in text
    assert "dropout=0.1" in text
