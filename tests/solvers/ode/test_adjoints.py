"""Every adjoint against finite differences and against the others."""

import gc
import re
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from restpoint.solvers import AdjointWarning, SolverError
from restpoint.solvers.ode import (
    RK4,
    BacksolveAdjoint,
    Bosh3,
    CheckpointAdjoint,
    ConstantController,
    DirectAdjoint,
    Dopri8,
    Heun,
    InterpolatedAdjoint,
    Kvaerno3,
    PIDController,
    Tsit5,
    adjoint_checkpoint,
    solve_ode,
)

F64 = torch.float64
EXACT = [DirectAdjoint(), CheckpointAdjoint(), CheckpointAdjoint(segments=3), CheckpointAdjoint(recursive=True)]
CONTINUOUS = [
    BacksolveAdjoint(solver=Tsit5(), rtol=1e-9, atol=1e-9),
    InterpolatedAdjoint(solver=Tsit5(), rtol=1e-9, atol=1e-9),
]
TIMES = ["shared", "per sample", "own times"]
PER_SAMPLE = pytest.mark.parametrize("per_sample", [False, True])


def column(t):
    return t.unsqueeze(-1) if t.ndim else t


class Setting:
    """A field that uses arguments, a parameter, and a tensor derived from it, all of which require gradients."""

    def __init__(self, times, count=5):
        self.weight = torch.randn(2, 2, dtype=F64).requires_grad_()
        self.scale = torch.rand(3, 1, dtype=F64).requires_grad_()
        self.y0 = torch.randn(3, 2, dtype=F64).requires_grad_()
        t = torch.linspace(0, 1, count, dtype=F64)
        self.t = (t * torch.tensor([[0.8], [1.0], [1.3]], dtype=F64) if times == "own times" else t).requires_grad_()
        self.per_sample = times == "per sample"

    @property
    def inputs(self):
        return [self.y0, self.weight, self.scale, self.t]

    def solve(self, y0=None, weight=None, scale=None, t=None, **options):
        y0, weight, scale, t = (a if b is None else b for a, b in zip(self.inputs, (y0, weight, scale, t)))
        derived = weight * 2.0

        def field(t, y, scale):
            return torch.tanh(y @ derived) * scale + torch.sin(column(t)) * 0.3 + weight.sum() * 0.1

        return solve_ode(field, y0, t, (scale,), **options)

    def gradients(self, dense=False, **options):
        solution = self.solve(dense=dense, **options)
        loss = (solution.value**3).sum()
        if dense:
            loss = loss + solution.interpolation(torch.tensor([0.1, 0.45, 0.7], dtype=F64)).pow(2).sum()
        return torch.autograd.grad(loss, self.inputs)


@pytest.fixture(params=[True, False], ids=["taped", "replayed"])
def _tape(request, monkeypatch):
    """Checkpoints with and without the steps that are recorded as they are taken."""
    if not request.param:
        monkeypatch.setattr(adjoint_checkpoint, "_TAPED", 0)


@pytest.mark.usefixtures("_tape")
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("solver", [Heun(), Bosh3(), Tsit5(), Dopri8()], ids=repr)
def test_exact_adjoints_agree(solver, times, dense):
    setting = Setting(times)
    control = PIDController(per_sample=setting.per_sample, step_t=(0.3,), jump_t=(0.55,))
    options = {"solver": solver, "controller": control, "rtol": 1e-3, "atol": 1e-3, "dense": dense}
    reference, *others = (setting.gradients(adjoint=adjoint, **options) for adjoint in EXACT)
    for other in others:
        torch.testing.assert_close(other, reference, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("adjoint", CONTINUOUS, ids=lambda a: type(a).__name__)
def test_continuous_adjoints_agree_to_tolerance(adjoint, times, dense):
    setting = Setting(times, count=4)
    control = PIDController(per_sample=setting.per_sample)
    options = {"solver": Dopri8(), "controller": control, "rtol": 1e-9, "atol": 1e-9, "dense": dense}
    reference = setting.gradients(adjoint=DirectAdjoint(), **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = setting.gradients(adjoint=adjoint, **options)
    torch.testing.assert_close(got, reference, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("solver", [RK4(), Tsit5()], ids=repr)
def test_first_and_second_derivatives_against_finite_differences(solver, times):
    setting = Setting(times, count=3)
    control = ConstantController(dt=0.3, per_sample=setting.per_sample)

    def run(*inputs):
        return setting.solve(*inputs, solver=solver, controller=control, adjoint=CheckpointAdjoint()).value

    assert gradcheck(run, setting.inputs)
    assert gradgradcheck(run, setting.inputs, fast_mode=True)


@pytest.mark.parametrize("adjoint", CONTINUOUS, ids=lambda a: type(a).__name__)
def test_second_derivatives_of_continuous_adjoints(adjoint):
    setting = Setting("shared", count=3)

    def run(*inputs):
        return setting.solve(*inputs, solver=Tsit5(), rtol=1e-9, atol=1e-9, adjoint=adjoint).value

    assert gradgradcheck(run, setting.inputs, atol=1e-4, fast_mode=True)


@pytest.mark.parametrize("adjoint", [*EXACT, *CONTINUOUS], ids=repr)
def test_module_parameters_and_states_of_structure(adjoint):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 6)).double()

    def field(t, state):
        flat = net(state["x"].flatten(1))
        return {"x": flat.view(-1, 2, 3), "energy": flat.square().sum(1), "z": state["z"] * 1j}

    y0 = {
        "x": torch.randn(4, 2, 3, dtype=F64, requires_grad=True),
        "energy": torch.zeros(4, dtype=F64),
        "z": torch.ones(4, 1, dtype=torch.complex128, requires_grad=True),
    }

    def gradients(adjoint):
        value = solve_ode(field, y0, (0.0, 0.5, 1.0), rtol=1e-8, atol=1e-8, adjoint=adjoint).value
        loss = value["x"].sum() + value["energy"][-1].sum() + value["z"].real.sum() * 2
        return torch.autograd.grad(loss, [y0["x"], y0["z"], *net.parameters()])

    torch.testing.assert_close(gradients(adjoint), gradients(DirectAdjoint()), rtol=1e-5, atol=1e-6)


def test_a_parameter_used_by_only_some_steps():
    early, late = (torch.tensor(1.5, dtype=F64, requires_grad=True) for _ in range(2))

    class Switched(nn.Module):
        def __init__(self):
            super().__init__()
            self.late = nn.Parameter(torch.tensor(1.5, dtype=F64))

        def forward(self, t, y):
            return y * (early if t < 0.5 else self.late)

    y0 = torch.ones(1, 1, dtype=F64)
    control = PIDController(jump_t=(0.5,))
    module = Switched()
    value = solve_ode(module, y0, (0.0, 1.0), controller=control).value[-1].sum()
    got = torch.autograd.grad(value, [early, module.late])
    # y = exp(early / 2 + late / 2)
    torch.testing.assert_close(got[0], 0.5 * value, rtol=1e-4, atol=0)
    torch.testing.assert_close(got[1], 0.5 * value, rtol=1e-4, atol=0)

    # The closure holds a list of functions, whose cells nobody looks into.
    parts = {"late": [lambda y: y * late]}

    def hidden(t, y):
        return y * early if t < 0.5 else parts["late"][0](y)

    with pytest.raises(SolverError, match="did not use at the start"):
        solve_ode(_Opaque(hidden), y0, (0.0, 1.0), controller=control).value.sum().backward()
    value = solve_ode(_Opaque(hidden), y0, (0.0, 1.0), controller=control, adjoint=DirectAdjoint()).value[-1].sum()
    torch.testing.assert_close(torch.autograd.grad(value, late)[0], 0.5 * value, rtol=1e-4, atol=0)


class _Opaque:
    """A callable that cannot be looked into."""

    __slots__ = ("call",)

    def __init__(self, call):
        self.call = call

    def __call__(self, *args):
        return self.call(*args)


@pytest.mark.parametrize("adjoint", EXACT[:3] + CONTINUOUS, ids=repr)
def test_nothing_is_counted_twice(adjoint):
    """y0, an argument, a closed-over tensor and what that is made of all depend on one leaf."""
    leaf = torch.tensor([[0.7, -0.4]], dtype=F64, requires_grad=True)

    def run(leaf, adjoint):
        derived = leaf.exp()
        return solve_ode(
            lambda t, y, a: torch.sin(y) * derived + a * leaf, leaf * 2, (0.0, 1.0), (leaf * 3,), adjoint=adjoint,
            rtol=1e-9, atol=1e-9,
        ).value[-1].sum()  # fmt: skip

    got = torch.autograd.grad(run(leaf, adjoint), leaf)[0]
    shift = 1e-5
    for i in range(2):
        step = torch.zeros_like(leaf)
        step[0, i] = shift
        with torch.no_grad():
            change = (run(leaf + step, DirectAdjoint()) - run(leaf - step, DirectAdjoint())) / (2 * shift)
        torch.testing.assert_close(got[0, i], change, rtol=1e-5, atol=1e-6)


def test_replay_notices_a_field_that_changes():
    calls = []

    def field(t, y):
        calls.append(1)
        return -y * (1 + 0.1 * len(calls))

    y0 = torch.ones(1, 1, dtype=F64, requires_grad=True)
    solution = solve_ode(field, y0, (0.0, 1.0), solver=RK4(), controller=ConstantController(dt=0.1), adjoint=EXACT[2])
    with pytest.raises(SolverError, match="gave other values"):
        solution.value.sum().backward()


def test_backward_twice_and_inputs_changed_in_place():
    weight = torch.ones(2, 2, dtype=F64, requires_grad=True)
    y0 = torch.ones(1, 2, dtype=F64, requires_grad=True)
    value = solve_ode(lambda t, y: torch.tanh(y @ weight), y0, (0.0, 1.0)).value.sum()
    first = torch.autograd.grad(value, [y0, weight], retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(value, [y0, weight], retain_graph=True), first)
    with torch.no_grad():
        weight.add_(1.0)
    with pytest.raises(RuntimeError, match="inplace"):
        value.backward()


def test_backsolve_falls_back_where_time_reversal_is_unstable():
    """Problem d of the benchmarks crashes torchdiffeq's adjoint."""
    mu = torch.tensor([5.0, 30.0], dtype=F64)
    y0 = torch.tensor([[2.0, 0.0], [2.0, 0.0]], dtype=F64, requires_grad=True)

    def field(t, y):
        x, v = y.unbind(-1)
        return torch.stack([v, mu * (1 - x * x) * v - x], -1)

    def run(adjoint):
        return torch.autograd.grad(solve_ode(field, y0, (0.0, 3.0), adjoint=adjoint).value[-1].sum(), y0)[0]

    reference = run(DirectAdjoint())
    with pytest.warns(AdjointWarning, match=r"BacksolveAdjoint: .*Falling back"):
        torch.testing.assert_close(run(BacksolveAdjoint()), reference, rtol=1e-10, atol=1e-10)
    with pytest.raises(SolverError, match=r"BacksolveAdjoint: .* choose adjoint=CheckpointAdjoint"):
        run(BacksolveAdjoint(fallback=False))
    torch.testing.assert_close(run(InterpolatedAdjoint()), reference, rtol=2e-2, atol=2e-2)


@PER_SAMPLE
def test_a_backward_solve_that_will_not_arrive_is_given_up_early(per_sample):
    """Robertson's reactions, which an implicit method passes in large steps, and nothing passes backwards."""
    rates = torch.tensor([0.04, 3e7, 1e4], dtype=F64, requires_grad=True)
    y0 = torch.tensor([[1.0, 0.0, 0.0]], dtype=F64, requires_grad=True)
    found = []
    for adjoint in (CheckpointAdjoint(), BacksolveAdjoint()):
        calls = 0

        def field(t, y, k):
            nonlocal calls
            calls += 1
            one = -k[0] * y[:, 0] + k[2] * y[:, 1] * y[:, 2]
            three = k[1] * y[:, 1] ** 2
            return torch.stack([one, -one - three, three], 1)

        options = {"solver": Kvaerno3(), "rtol": 1e-3, "atol": 1e-7, "adjoint": adjoint}
        options["controller"] = PIDController(per_sample=per_sample)
        solution = solve_ode(field, y0, (0.0, 100.0), (rates,), **options)
        forward = calls
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found.append(torch.autograd.grad(solution.value[-1, :, 1].sum() * 1e4, [y0, rates]))
    (warning,) = caught
    assert re.search(r"sample 0 came to t = [\d.]+ in \d+ attempts.* not come to 0 in 10000", str(warning.message))
    # The budget of 10,000 attempts costs more than ten evaluations each.
    assert calls - forward < 10_000
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-10)


@PER_SAMPLE
def test_a_backward_solve_may_take_many_more_steps_than_the_forward_one(per_sample):
    """Hundreds of steps of a low order within one interval that the forward solve passed in a few."""
    rate = torch.tensor([[0.5, -1.0], [1.0, 0.5]], dtype=F64, requires_grad=True)
    y0 = torch.tensor([[1.0, 0.5], [0.3, -0.2]], dtype=F64, requires_grad=True)
    found = []
    for adjoint in (CheckpointAdjoint(), BacksolveAdjoint(solver=Bosh3(), rtol=1e-8, atol=1e-8, fallback=False)):
        options = {"solver": Dopri8(), "rtol": 1e-9, "atol": 1e-9, "adjoint": adjoint}
        options["controller"] = PIDController(per_sample=per_sample)
        solution = solve_ode(lambda t, y: torch.sin(y @ rate), y0, (0.0, 4.0), **options)
        found.append(torch.autograd.grad(solution.value[-1].square().sum(), [y0, rate]))
    assert int(solution.adjoint_stats.accepted[0]) > 100 + 10 * int(solution.stats.accepted[0])
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-6)


@PER_SAMPLE
def test_a_backward_solve_may_be_tighter_than_the_forward_one(per_sample):
    """The state on the way back then comes off by the error of the way there."""
    weight = torch.tensor([[0.4, -1.0], [1.0, 0.3]], dtype=F64, requires_grad=True)
    y0 = torch.tensor([[1.0, 0.5], [0.3, -0.2]], dtype=F64, requires_grad=True)
    adjoint = BacksolveAdjoint(solver=Dopri8(), rtol=1e-11, atol=1e-11, fallback=False)
    found = []
    for options in ({"rtol": 1e-4, "atol": 1e-4, "adjoint": adjoint}, {"rtol": 1e-9, "atol": 1e-9}):
        solution = solve_ode(
            lambda t, y: torch.sin(y @ weight),
            y0,
            (0.0, 3.0),
            controller=PIDController(per_sample=per_sample),
            **options,
        )
        found.append(torch.autograd.grad(solution.value[-1].square().sum(), [y0, weight]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-2, atol=1e-3)


def test_statistics_of_the_backward_pass():
    y0 = torch.ones(2, 1, dtype=F64, requires_grad=True)
    solution = solve_ode(lambda t, y: -y, y0, (0.0, 1.0), adjoint=CheckpointAdjoint(segments=2))
    assert solution.adjoint_stats is None
    solution.value.sum().backward()
    stats = solution.adjoint_stats
    assert (stats.accepted == solution.stats.accepted).all()
    assert (stats.rejected == 0).all()
    assert (stats.evaluations > 0).all()


def test_no_reference_cycle_keeps_a_solution_alive():
    net = nn.Linear(2, 2)
    gc.collect()
    gc.disable()
    try:
        for adjoint in (CheckpointAdjoint(), CheckpointAdjoint(segments=2), BacksolveAdjoint(), InterpolatedAdjoint()):
            solution = solve_ode(lambda t, y: net(y), torch.randn(3, 2), (0.0, 0.5, 1.0), adjoint=adjoint)
            solution.value.sum().backward()
            refs = [weakref.ref(solution), weakref.ref(solution.value)]
            del solution
            assert [ref() for ref in refs] == [None, None], adjoint
    finally:
        gc.enable()


def test_without_derivatives_nothing_is_recorded():
    calls = []

    def field(t, y):
        calls.append(torch.is_grad_enabled())
        return -y

    solution = solve_ode(field, torch.ones(1, 1), (0.0, 1.0))
    assert not solution.value.requires_grad
    with torch.no_grad():
        solve_ode(field, torch.ones(1, 1, requires_grad=True), (0.0, 1.0))
    assert not any(calls[1:])


@pytest.mark.parametrize("adjoint", [*EXACT, *CONTINUOUS], ids=repr)
def test_constant_and_linear_fields(adjoint):
    """A derivative that does not depend on the state, and one that is the state itself."""
    y0 = torch.tensor([[1.0, 2.0]], dtype=F64, requires_grad=True)
    rate = torch.tensor([[0.5, -1.0]], dtype=F64, requires_grad=True)
    value = solve_ode(lambda t, y: rate, y0, (0.0, 2.0), adjoint=adjoint).value[-1].sum()
    got = torch.autograd.grad(value, [y0, rate])
    torch.testing.assert_close(got, (torch.ones_like(y0), torch.full_like(rate, 2.0)))
    value = solve_ode(lambda t, y: y, y0, (0.0, 1.0), rtol=1e-9, atol=1e-9, adjoint=adjoint).value[-1].sum()
    torch.testing.assert_close(torch.autograd.grad(value, y0)[0], torch.full_like(y0, torch.e), rtol=1e-6, atol=0)
    value = solve_ode(lambda t, y: torch.zeros_like(y), y0, (0.0, 1.0), adjoint=adjoint).value[-1].sum()
    torch.testing.assert_close(torch.autograd.grad(value, y0)[0], torch.ones_like(y0))
