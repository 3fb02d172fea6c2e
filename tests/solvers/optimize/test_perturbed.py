"""Argmax smoothed by noise, and the losses of the simplex maps."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from restpoint.solvers import (
    entmax,
    entmax15,
    fenchel_young_loss,
    perturbed_argmax,
    perturbed_loss,
    sparsemax,
)

D = torch.float64


def generator():
    return torch.Generator().manual_seed(0)


def scores(*shape):
    return torch.randn(*shape, generator=generator(), dtype=D)


class TestPerturbedArgmax:
    def test_two_options_are_a_normal_distribution_function(self):
        """P(a + s Z1 > b + s Z2) = Phi((a - b) / (s sqrt 2)), with its derivatives of two orders."""
        theta = torch.tensor([[0.3, -0.2]], dtype=D, requires_grad=True)
        normal = torch.distributions.Normal(torch.tensor(0.0, dtype=D), torch.tensor(1.0, dtype=D))
        exact = normal.cdf((theta[:, 0] - theta[:, 1]) / (0.5 * 2**0.5))
        value = perturbed_argmax(theta, temperature=0.5, samples=400_000, generator=generator())[:, 0]
        torch.testing.assert_close(value, exact, rtol=0, atol=4e-3)
        slopes = [torch.autograd.grad(v, theta, create_graph=True)[0] for v in (value, exact)]
        torch.testing.assert_close(*slopes, rtol=0, atol=1e-2)
        bends = [torch.autograd.grad(s[0, 0], theta)[0] for s in slopes]
        torch.testing.assert_close(*bends, rtol=0, atol=6e-2)

    def test_a_maximizer_of_ones_own(self):
        """The two largest of four: means sum to two, and the gradient of their sum is zero."""

        def top2(theta):
            return torch.zeros_like(theta).scatter_(1, theta.topk(2, dim=1).indices, 1.0)

        theta = scores(3, 4).requires_grad_()
        value = perturbed_argmax(theta, top2, temperature=0.3, samples=500, generator=generator())
        torch.testing.assert_close(value.sum(1), torch.full((3,), 2.0, dtype=D))
        (gradient,) = torch.autograd.grad(value.sum(), theta, retain_graph=True)
        torch.testing.assert_close(gradient, torch.zeros_like(theta), rtol=0, atol=1e-12)
        (gradient,) = torch.autograd.grad(value[:, 0].sum(), theta)
        assert (gradient[:, 0] >= 0).all()
        assert (gradient[:, 0] > 0).any()

    def test_the_loss_has_the_mean_less_the_target_as_its_gradient(self):
        theta = scores(3, 4).requires_grad_()
        target = torch.eye(4, dtype=D)[:3]
        loss = perturbed_loss(theta, target, samples=50, generator=generator())
        mean = perturbed_argmax(theta, samples=50, generator=generator())
        (gradient,) = torch.autograd.grad(loss.sum(), theta, retain_graph=True)
        torch.testing.assert_close(gradient, mean.detach() - target)
        (gradient,) = torch.autograd.grad(loss.sum(), theta, create_graph=True)
        weight = scores(3, 4)
        second = [torch.autograd.grad((weight * t).sum(), theta, retain_graph=True)[0] for t in (gradient, mean)]
        torch.testing.assert_close(*second)

    def test_what_does_not_fit_is_said(self):
        with pytest.raises(ValueError, match="temperature"):
            perturbed_argmax(scores(2, 3), temperature=0.0)
        with pytest.raises(ValueError, match="samples"):
            perturbed_argmax(scores(2, 3), samples=0)
        with pytest.raises(ValueError, match=r"maximizer\(scores\): expected shape"):
            perturbed_argmax(scores(2, 3), lambda theta: theta.argmax(1))


class TestFenchelYoung:
    MAPS = ((1, lambda x: x.softmax(-1)), (1.3, lambda x: entmax(x, 1.3)), (1.5, entmax15), (2, sparsemax))

    @pytest.mark.parametrize(("alpha", "map"), MAPS, ids=lambda a: str(a) if isinstance(a, (int, float)) else "")
    def test_the_gradient_is_the_map_less_the_target(self, alpha, map):
        x = (2 * scores(5, 4)).requires_grad_()
        target = torch.tensor([0, 3, 1, 1, 2])
        weights = torch.nn.functional.one_hot(target, 4).to(D)
        for aim, y in ((target, weights), (scores(5, 4).softmax(1), scores(5, 4).softmax(1))):
            loss = fenchel_young_loss(x, aim, alpha)
            (gradient,) = torch.autograd.grad(loss.sum(), x)
            torch.testing.assert_close(gradient, map(x).detach() - y, rtol=0, atol=1e-12)
            assert (loss >= 0).all()
            assert gradcheck(lambda x, aim=aim: fenchel_young_loss(x, aim, alpha), x)
            assert gradgradcheck(lambda x, aim=aim: fenchel_young_loss(x, aim, alpha), x)
            reached = fenchel_young_loss(x.detach(), map(x.detach()), alpha)
            torch.testing.assert_close(reached, torch.zeros(5, dtype=D), rtol=0, atol=1e-12)

    def test_softmax_is_cross_entropy(self):
        x, target = scores(5, 4), torch.tensor([0, 3, 1, 1, 2])
        expected = torch.nn.functional.cross_entropy(x, target, reduction="none")
        torch.testing.assert_close(fenchel_young_loss(x, target, 1), expected)

    @pytest.mark.parametrize("alpha", [1.5, 2])
    def test_is_zero_beyond_the_margin(self, alpha):
        x = torch.tensor([[1 / (alpha - 1) + 0.01, 0.0, 0.0]], dtype=D)
        assert float(fenchel_young_loss(x, torch.tensor([0]), alpha)) == pytest.approx(0, abs=1e-12)
        assert float(fenchel_young_loss(x - torch.tensor([0.1, 0, 0]), torch.tensor([0]), alpha)) > 1e-4

    def test_masks_and_dimensions(self):
        x = scores(3, 4).requires_grad_()
        mask = torch.tensor([True, True, False, True])
        masked = fenchel_young_loss(x, torch.tensor([0, 1, 3]), mask=mask)
        torch.testing.assert_close(masked, fenchel_young_loss(x[:, mask], torch.tensor([0, 1, 2])))
        (gradient,) = torch.autograd.grad(masked.sum(), x)
        assert gradient.isfinite().all()
        assert (gradient[:, 2] == 0).all()
        torch.testing.assert_close(fenchel_young_loss(x.T, torch.tensor([0, 1, 3]), dim=0, mask=mask[:, None]), masked)
        assert fenchel_young_loss(x, torch.tensor([2, 2, 2]), mask=mask).isposinf().all()
        with pytest.raises(ValueError, match="alpha"):
            fenchel_young_loss(x, torch.tensor([0, 1, 3]), 3)
        with pytest.raises(ValueError, match="class indices"):
            fenchel_young_loss(x, torch.tensor([0, 1]))
