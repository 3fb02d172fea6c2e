"""Newton's method on functions and in types that its linear algebra has to work around."""

import pytest
import torch
from torch.autograd.function import once_differentiable

from restpoint.solvers import Anderson, CheckpointAdjoint, Newton, UnrollAdjoint, fixed_point
from restpoint.solvers.diagnose import certificate


class Once(torch.autograd.Function):
    """A half of the sine, as of a kernel of somebody's own, or of compiled code."""

    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return 0.5 * z.sin()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return 0.5 * ctx.saved_tensors[0].cos() * grad


class TestWithoutASecondDerivative:
    """Newton-Krylov applies a Jacobian by differentiating twice, which not every function can stand."""

    @staticmethod
    def attention(z, x):
        return 0.2 * torch.nn.functional.scaled_dot_product_attention(z, z, z) + x

    @staticmethod
    def nested(z, x):
        return 0.3 * fixed_point(lambda y, z: 0.5 * torch.sin(y) + z, torch.zeros_like(z), (z,), rtol=1e-7).value + x

    @staticmethod
    def once(z, x):
        return Once.apply(z) + x

    @pytest.mark.parametrize("which", ["attention", "nested", "once"])
    def test_newton_finds_the_rest_point(self, which):
        f, x = getattr(self, which), torch.randn(3, 8, 8)
        found, expected = (
            fixed_point(f, torch.zeros_like(x), (x,), solver=solver, rtol=1e-5) for solver in (Newton(), Anderson())
        )
        assert found.converged.all()
        assert (found.stats.steps < expected.stats.steps).all()
        torch.testing.assert_close(found.value, expected.value, rtol=1e-3, atol=1e-3)

    def test_the_certificate_has_its_singular_values(self):
        x = torch.randn(2, 8, 8)
        z = fixed_point(self.attention, torch.zeros_like(x), (x,), rtol=1e-6).value
        assert certificate(self.attention, z.detach(), (x,)).trusted.all()

    def test_a_large_state_is_an_error_that_says_why(self):
        x = torch.randn(1, 64, 64)
        with pytest.raises(
            ValueError, match=r"at most 2048 numbers.*this state has 4096.*Its own error was: derivative"
        ):
            fixed_point(self.attention, torch.zeros_like(x), (x,), solver=Newton())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adjoint", [UnrollAdjoint(), CheckpointAdjoint()])
def test_recorded_steps_in_half_precision(dtype, adjoint):
    x = torch.linspace(-1, 1, 6).to(dtype).reshape(2, 3).requires_grad_()
    value = fixed_point(
        lambda z, x: 0.5 * torch.sin(z) + x, torch.zeros_like(x), (x,), solver=Newton(), adjoint=adjoint, rtol=1e-2
    ).value
    value.sum().backward()
    torch.testing.assert_close(x.grad, 1 / (1 - 0.5 * value.detach().cos()), rtol=0.1, atol=0.1)
