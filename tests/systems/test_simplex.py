"""Systems of implicit differentiation for machine learning: regularised argmax, sorting and ranking."""

import itertools

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from restpoint.solvers import (
    ImplicitAdjoint,
    entmax15,
    quadratic_program,
    root,
    soft_rank,
    soft_sort,
    soft_topk,
    sparsemax,
)

# Forward-mode differentiation makes torch load decompositions that it scripts.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")

D = torch.float64


def scores(batch=6, n=5):
    return torch.randn(batch, n, dtype=D, generator=torch.Generator().manual_seed(4))


def jacobians(f, z):
    """The Jacobian of each sample."""
    rows = [torch.autograd.grad(column.sum(), z, retain_graph=True)[0] for column in f(z).unbind(1)]
    return torch.stack(rows, 1)


def by_programme(z):
    """argmin 1/2 |p|^2 - p'z over p >= 0, 1'p = 1."""
    n = z.shape[1]
    eye = torch.eye(n, dtype=D)
    return quadratic_program(
        eye, -z, -eye, torch.zeros(n, dtype=D), torch.ones(1, n, dtype=D), torch.ones(1, dtype=D)
    ).value


def by_kkt(z, stationarity, total, start):
    """The implicit function theorem on stationarity, the sum, and complementarity as min(p, multiplier) = 0."""

    def residual(state, z):
        p, multiplier, tau = state["p"], state["multiplier"], state["tau"]
        return {
            "p": stationarity(p) - z + tau - multiplier,
            "multiplier": torch.minimum(p, multiplier),
            "tau": total(p).sum(1, keepdim=True) - 1,
        }

    p = start(z.detach())
    tau = (z.detach() - stationarity(p)).where(p > 0, -torch.inf).amax(1, keepdim=True)
    guess = {"p": p + 1e-3, "multiplier": stationarity(p) - z.detach() + tau + 1e-3, "tau": tau}
    solution = root(residual, guess, (z,), rtol=1e-13, adjoint=ImplicitAdjoint(order=2), throw=True)
    return total(solution.value["p"])


class TestSparsemax:
    def by_kkt(self, z):
        return by_kkt(z, lambda p: p, lambda p: p, sparsemax)

    def test_programme_closed_form_and_theorem_agree(self):
        z = scores().requires_grad_()
        weights = torch.randn(z.shape, dtype=D)
        found = [f(z) for f in (sparsemax, by_programme, self.by_kkt)]
        gradients = [torch.autograd.grad((p * weights).sum(), z)[0] for p in found]
        for p, gradient in zip(found[1:], gradients[1:], strict=True):
            torch.testing.assert_close(p, found[0], rtol=0, atol=1e-9)
            torch.testing.assert_close(gradient, gradients[0], rtol=0, atol=1e-9)

    def test_jacobian_on_the_support(self):
        z = scores().requires_grad_()
        s = (sparsemax(z) > 0).to(D)
        assert s.sum(1).min() >= 1 and s.sum(1).max() > 2 and (s == 0).any()
        wanted = torch.diag_embed(s) - s[:, :, None] * s[:, None] / s.sum(1)[:, None, None]
        for f in (sparsemax, by_programme, self.by_kkt):
            torch.testing.assert_close(jacobians(f, z), wanted, rtol=0, atol=1e-9)


class TestEntmax:
    def test_closed_form_and_theorem_agree(self):
        """In the square roots r of the weights: 2 r_i = z_i - tau + multiplier, and the squares sum to one."""

        def theorem(z):
            return by_kkt(z, lambda r: 2 * r, lambda r: r.square(), lambda t: entmax15(t).sqrt())

        z = scores().requires_grad_()
        torch.testing.assert_close(theorem(z), entmax15(z), rtol=0, atol=1e-9)
        torch.testing.assert_close(jacobians(theorem, z), jacobians(entmax15, z), rtol=0, atol=1e-9)
        weights = torch.randn(z.shape, dtype=D)
        hessians = []
        for f in (theorem, entmax15):
            (gradient,) = torch.autograd.grad((f(z) * weights).sum(), z, create_graph=True)
            hessians.append(torch.autograd.grad((gradient * weights.flip(1)).sum(), z)[0])
        torch.testing.assert_close(*hessians, rtol=0, atol=1e-9)


class TestSortingAndRanking:
    def test_gradcheck(self):
        x = scores(3, 6).requires_grad_()
        for f in (soft_sort, soft_rank, lambda t: soft_topk(t, 2)):
            assert gradcheck(f, (x,), check_forward_ad=True)
            assert gradgradcheck(f, (x,))

    def test_hard_as_the_temperature_falls(self):
        x = scores(4, 7)
        order, ranks = x.sort(1).values, x.argsort(1).argsort(1).to(D) + 1
        far = [[], []]
        for temperature in (100.0, 10.0, 1.0, 0.1, 0.01, 1e-3, 1e-6):
            far[0].append((soft_sort(x, temperature=temperature) - order).abs().max().item())
            far[1].append((soft_rank(x, temperature=temperature) - ranks).abs().max().item())
        for errors in far:
            assert all(a >= b for a, b in itertools.pairwise(errors))
            assert errors[0] > 0.5 and errors[-1] < 1e-9

    def test_ranks_can_be_learnt(self):
        """Scores that start in the opposite order of what is wanted, by Spearman's correlation alone."""
        wanted = torch.arange(1, 9, dtype=D)
        x = torch.linspace(1, -1, 8, dtype=D).requires_grad_()
        optimiser = torch.optim.Adam([x], lr=0.1)
        for _ in range(100):
            optimiser.zero_grad()
            (soft_rank(x, temperature=0.3) - wanted).square().mean().backward()
            optimiser.step()
        assert x.argsort().tolist() == list(range(8))
