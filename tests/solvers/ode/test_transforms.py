"""solve_ode under autocast and inside the transforms of torch.func."""

import pytest
import torch
from torch import nn

from restpoint.solvers.ode import (
    BacksolveAdjoint,
    CheckpointAdjoint,
    ConstantController,
    DirectAdjoint,
    Event,
    InterpolatedAdjoint,
    Midpoint,
    PIDController,
    Reversible,
    ReversibleAdjoint,
    Tsit5,
    solve_ode,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")
F64 = torch.float64
ADJOINTS = [
    (Tsit5(), DirectAdjoint()),
    (Tsit5(), CheckpointAdjoint()),
    (Tsit5(), CheckpointAdjoint(segments=2)),
    (Tsit5(), CheckpointAdjoint(recursive=True)),
    (Tsit5(), BacksolveAdjoint(rtol=1e-2, atol=1e-3)),
    (Tsit5(), InterpolatedAdjoint(rtol=1e-2, atol=1e-3)),
    (Reversible(Midpoint()), ReversibleAdjoint()),
]


class TestAutocast:
    @pytest.mark.parametrize("per_sample", [False, True])
    @pytest.mark.parametrize("solver, adjoint", ADJOINTS, ids=repr)
    def test_gradients(self, solver, adjoint, per_sample):
        """The field computes in bfloat16; what the solver adds up stays in float32."""
        net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 4))
        y0 = torch.randn(3, 4, requires_grad=True)
        seen = set()

        def field(t, y):
            out = net(y)
            seen.add(out.dtype)
            return out

        def gradients(autocast):
            control = ConstantController(dt=0.25, per_sample=per_sample)
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                solution = solve_ode(field, y0, (0.0, 0.6, 1.0), solver=solver, controller=control, adjoint=adjoint)
                assert solution.value.dtype == torch.float32
                loss = (solution.value**2).sum()
            return torch.autograd.grad(loss, [y0, *net.parameters()])

        expected = gradients(False)
        assert seen == {torch.float32}
        found = gradients(True)
        assert torch.bfloat16 in seen
        for got, want in zip(found, expected):
            assert got.dtype == torch.float32
            assert (got - want).norm() < 0.02 * want.norm()

    def test_reaches_the_field_alone(self):
        """A field that bfloat16 does not touch is solved as accurately as without it."""
        matrix = torch.tensor([[-0.5, 2.0], [-2.0, -0.3]])
        y0 = torch.randn(3, 2, requires_grad=True)

        def run(autocast):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                solution = solve_ode(lambda t, y: (y.unsqueeze(1) * matrix.T).sum(-1), y0, (0.0, 0.7, 2.0), dense=True)
                inside = solution.interpolation(torch.tensor([0.3, 1.1]))
                rate = solution.interpolation.derivative(torch.tensor([0.3, 1.1]))
            return solution.value, inside, rate, *torch.autograd.grad(solution.value.sum() + inside.sum(), y0)

        torch.testing.assert_close(run(True), run(False), rtol=0, atol=0)


def field(t, y, scale):
    return torch.tanh(y) * scale + torch.sin(t.reshape(-1, 1))


def inputs():
    return torch.randn(3, 2, dtype=F64), torch.rand(3, 1, dtype=F64)


def end(y0, scale, **options):
    return solve_ode(field, y0, (0.0, 0.4, 1.0), (scale,), rtol=1e-6, atol=1e-6, **options).value


@pytest.mark.parametrize(
    "adjoint", [DirectAdjoint(), CheckpointAdjoint(), BacksolveAdjoint(), InterpolatedAdjoint()], ids=repr
)
class TestFunc:
    def test_reverse(self, adjoint):
        y0, scale = inputs()
        leaves = y0.clone().requires_grad_(), scale.clone().requires_grad_()
        expected = torch.autograd.grad((end(*leaves) ** 2).sum(), leaves)
        got = torch.func.grad(lambda *x: (end(*x, adjoint=adjoint) ** 2).sum(), (0, 1))(y0, scale)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)
        value, pull = torch.func.vjp(lambda *x: end(*x, adjoint=adjoint), y0, scale)
        torch.testing.assert_close(pull(2 * value), expected, rtol=1e-9, atol=1e-10)

    def test_jacobians(self, adjoint):
        y0, scale = inputs()

        def last(scale):
            return end(y0, scale, adjoint=adjoint)[-1].sum(1)

        reverse = torch.func.jacrev(last)(scale)
        nudge = 1e-6 * torch.eye(3, dtype=F64)
        differences = [(last(scale + n[:, None]) - last(scale - n[:, None])) / 2e-6 for n in nudge]
        torch.testing.assert_close(reverse.squeeze(-1), torch.stack(differences, 1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.func.jacfwd(last)(scale), reverse, rtol=1e-9, atol=1e-10)

    def test_forward(self, adjoint):
        y0, scale = inputs()
        tangents = torch.randn_like(y0), torch.randn_like(scale)
        value, tangent = torch.func.jvp(lambda *x: end(*x, adjoint=adjoint), (y0, scale), tangents)
        torch.testing.assert_close(value, end(y0, scale), rtol=1e-9, atol=1e-10)
        cotangent = torch.randn_like(value)
        pulled = torch.func.vjp(lambda *x: end(*x), y0, scale)[1](cotangent)
        paired = sum((p * x).sum() for p, x in zip(pulled, tangents))
        torch.testing.assert_close((cotangent * tangent).sum(), paired, rtol=1e-9, atol=1e-10)

    def test_vmap(self, adjoint):
        y0, scale = inputs()

        def one(y, s):
            return end(y[None], s[None], adjoint=adjoint)[:, 0]

        # The steps are those of the worst example, so that results agree to tolerance only.
        found = torch.func.vmap(one)(y0, scale)
        torch.testing.assert_close(found, end(y0, scale).transpose(0, 1), rtol=1e-5, atol=1e-5)
        found = torch.func.vmap(torch.func.grad(lambda y, s: one(y, s)[-1].sum()))(y0, scale)
        expected = torch.func.grad(lambda y: end(y, scale)[-1].sum())(y0)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


class TestFuncWithStepsPerSample:
    CONTROL = PIDController(per_sample=True)

    def test_derivatives(self):
        y0, scale = inputs()
        leaf = scale.clone().requires_grad_()

        def loss(scale):
            return (end(y0, scale, controller=self.CONTROL) ** 2).sum()

        (expected,) = torch.autograd.grad(loss(leaf), leaf)
        torch.testing.assert_close(torch.func.grad(loss)(scale), expected, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(torch.func.jacfwd(loss)(scale), expected, rtol=1e-9, atol=1e-10)

    @pytest.mark.parametrize("mapped", [0, 1])
    def test_vmap_is_refused(self, mapped):
        y0, scale = inputs()
        dims = (0, None) if mapped == 0 else (None, 0)
        given = (y0.expand(2, -1, -1), scale) if mapped == 0 else (y0, scale.expand(2, -1, -1))
        with pytest.raises(NotImplementedError, match="steps per sample are not supported for what .*vmap maps over"):
            torch.func.vmap(lambda y, s: end(y, s, controller=self.CONTROL), dims)(*given)

    def test_vmap_over_something_else(self):
        """Nothing in the solve is mapped over, and so nothing speaks against steps per sample."""
        y0, scale = inputs()
        factor = torch.tensor([1.0, 2.0], dtype=F64)
        found = torch.func.vmap(lambda a: a * end(y0, scale, controller=self.CONTROL))(factor)
        expected = end(y0, scale, controller=self.CONTROL)
        torch.testing.assert_close(found, torch.stack([expected, 2 * expected]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("per_sample", [False, True])
class TestEventsInsideFunc:
    """A body falls from y0 to a level that the condition closes over: t = sqrt(2 (y0 - level) / g)."""

    def time(self, height, level, per_sample):
        g = 9.81
        y0 = torch.stack([height, torch.zeros_like(height)], 1)
        event = Event(lambda t, y: y[:, 0] - level)
        solution = solve_ode(
            lambda t, y: torch.stack([y[:, 1], torch.full_like(y[:, 1], -g)], 1),
            y0,
            (0.0, 2.0),
            events=event,
            controller=PIDController(per_sample=per_sample),
        )
        return solution.event.t, torch.sqrt(2 * (height - level) / g)

    def test_first_and_second_derivatives(self, per_sample):
        height, level = torch.tensor([1.0, 3.0], dtype=F64), torch.tensor(0.2, dtype=F64)

        def found(height, level):
            return self.time(height, level, per_sample)[0].sum()

        def exact(height, level):
            return self.time(height, level, per_sample)[1].sum()

        for transform in (torch.func.grad, torch.func.jacfwd, torch.func.hessian):
            got, want = (transform(f, (0, 1))(height, level) for f in (found, exact))
            torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("controller", [PIDController(), PIDController(per_sample=True), ConstantController(dt=0.1)])
def test_vmap_over_times_is_refused(controller):
    """The way that works is named, and gives what single solves give."""
    y0 = torch.tensor([[1.0, -0.5]], dtype=F64)
    times = torch.tensor([[0.0, 0.5, 1.0], [0.0, 0.2, 2.0]], dtype=F64)

    def solve(y, t):
        return solve_ode(lambda t, y: torch.sin(y), y, t, controller=controller, rtol=1e-9, atol=1e-9).value

    with pytest.raises(ValueError, match=r"times that vmap maps over are not supported; .* one tensor \(batch, T\)"):
        torch.func.vmap(solve, (None, 0))(y0, times)
    together = solve(y0.expand(2, -1), times)
    for i, row in enumerate(times):
        torch.testing.assert_close(together[:, i], solve(y0, row)[:, 0], rtol=1e-7, atol=1e-7)
