import math
import subprocess
import sys

import hypothesis
import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from restpoint.solvers import entmax, entmax15, sparsemax

# Forward-mode differentiation makes torch load decompositions that it scripts.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")

D = torch.float64
MAPS = {"sparsemax": sparsemax, "entmax15": entmax15, "entmax": lambda z, dim=-1, mask=None: entmax(z, 1.3, dim, mask)}
ALPHAS = {"sparsemax": 2.0, "entmax15": 1.5, "entmax": 1.3}


@pytest.fixture(params=MAPS)
def name(request):
    return request.param


@pytest.fixture
def simplex_map(name):
    return MAPS[name]


def oracle(scores, alpha):
    """The threshold by scipy's bracketing root finder, a slice at a time."""
    flat = scores.reshape(-1, scores.shape[-1]).double().numpy()
    rows = []
    for z in flat:
        kept = z[np.isfinite(z)]
        top, a = kept.max(), alpha - 1

        def weights(theta, z=z, top=top, a=a):
            return np.maximum(1 + a * (np.maximum(z, top - 1e3) - top - theta), 0) ** (1 / a)

        upper = (1 - len(z) ** -a) / a + 1e-9
        theta = scipy.optimize.brentq(lambda t, w=weights: w(t).sum() - 1, 0, upper, xtol=1e-15, rtol=1e-15)
        rows.append(weights(theta))
    return torch.tensor(np.array(rows)).reshape(scores.shape)


def scores_of(*shape, seed=0):
    return torch.randn(*shape, dtype=D, generator=torch.Generator().manual_seed(seed)) * 1.5


class TestValues:
    def test_against_a_root_finder(self, name, simplex_map):
        for scale in (0.1, 1.0, 10.0):
            z = scores_of(20, 13) * scale
            torch.testing.assert_close(simplex_map(z), oracle(z, ALPHAS[name]), rtol=1e-10, atol=1e-10)

    def test_sparsemax_is_a_projection(self):
        """Against a general-purpose solver of the quadratic programme."""
        for z in scores_of(5, 6):
            target = z.numpy()
            found = scipy.optimize.minimize(
                lambda p, target=target: ((p - target) ** 2).sum(),
                np.full(6, 1 / 6),
                jac=lambda p, target=target: 2 * (p - target),
                bounds=[(0, 1)] * 6,
                constraints={"type": "eq", "fun": lambda p: p.sum() - 1, "jac": lambda p: np.ones(6)},
                options={"ftol": 1e-14},
            )
            torch.testing.assert_close(sparsemax(z), torch.tensor(found.x), rtol=0, atol=1e-6)

    @pytest.mark.parametrize("alpha", [1.0, 1 + 1e-9, 1.01, 1.25, 1.5, 1.75, 1.999, 2.0])
    def test_alphas(self, alpha):
        z = scores_of(9, 30)
        for given_as in (alpha, torch.tensor(alpha, dtype=D)):
            p = entmax(z, given_as)
            torch.testing.assert_close(p.sum(-1), torch.ones(9, dtype=D), rtol=0, atol=1e-14)
            wanted = z.softmax(-1) if alpha < 1.001 else oracle(z, alpha)
            torch.testing.assert_close(p, wanted, rtol=1e-7, atol=1e-12 if alpha in (1.0, 1.5, 2.0) else 1e-7)

    def test_any_dimension(self, simplex_map):
        z = scores_of(3, 4, 5)
        for dim in (0, 1, 2, -1, -2, -3):
            p = simplex_map(z, dim)
            torch.testing.assert_close(p, simplex_map(z.movedim(dim, -1).contiguous()).movedim(-1, dim))
            torch.testing.assert_close(p.sum(dim), torch.ones_like(p.sum(dim)))
        assert simplex_map(scores_of(1)).tolist() == [1.0]

    def test_mask_is_minus_infinity_is_absence(self, simplex_map):
        z, keep = scores_of(6, 8), torch.tensor([True, False, True, True, False, True, True, False])
        p = simplex_map(z, mask=keep)
        torch.testing.assert_close(p[:, keep], simplex_map(z[:, keep]))
        assert (p[:, ~keep] == 0).all()
        assert torch.equal(p, simplex_map(z.masked_fill(~keep, -torch.inf)))
        turned = simplex_map(z.T.contiguous(), 0, keep.unsqueeze(1))
        torch.testing.assert_close(turned.T, p)

    def test_extreme_scores(self, simplex_map):
        for dtype in (torch.float32, D):
            z = (scores_of(50, 40) * 1e4).to(dtype)
            p = simplex_map(z)
            assert (p.argmax(-1) == z.argmax(-1)).all()
            torch.testing.assert_close(p.sum(-1), torch.ones(50, dtype=dtype))
            equal = simplex_map(torch.full((2, 1000), 1e4, dtype=dtype))
            torch.testing.assert_close(equal, torch.full_like(equal, 1e-3), rtol=1e-3 if dtype != D else 1e-9, atol=0)
        lowest = torch.finfo(torch.float32).min
        assert simplex_map(torch.tensor([lowest, 0.0, lowest])).tolist() == [0, 1, 0]

    @pytest.mark.parametrize("n", [1, 5000, 200_000])
    @pytest.mark.parametrize("dtype", [torch.float32, D])
    def test_sums_of_many_small_weights(self, simplex_map, n, dtype):
        for scale in (1e-6, 1.0):
            z = (scale * scores_of(2, n)).to(dtype)
            assert ((simplex_map(z).double().sum(-1) - 1).abs() < 50 * torch.finfo(dtype).eps).all()

    def test_staircases_that_lose_an_entry_a_step(self, name, simplex_map):
        """Scores for which the support shrinks as slowly as it can."""
        stairs = [-(2.0**-k) for k in range(60)]
        for z in (
            torch.tensor(stairs, dtype=D),
            -torch.arange(500, dtype=D) / 500,
            -(torch.linspace(0, 1, 3000).double() ** 9),
        ):
            torch.testing.assert_close(simplex_map(z), oracle(z, ALPHAS[name]), rtol=1e-9, atol=1e-12)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_float32_rounded_once(self, simplex_map, dtype):
        z = scores_of(64, 300).to(dtype)
        p = simplex_map(z)
        assert p.dtype == dtype
        assert torch.equal(p, simplex_map(z.float()).to(dtype))
        # Each weight is off by half a unit in its last place at most, and so is their sum.
        assert ((p.double().sum(-1) - 1).abs() <= torch.finfo(dtype).eps / 2 + 1e-6).all()

    def test_a_nan_stays_in_its_slice(self, simplex_map):
        z = scores_of(4, 6)
        broken = z.clone()
        broken[2, 3] = torch.nan
        p = simplex_map(broken)
        assert p[2].isnan().all()
        kept = [0, 1, 3]
        assert torch.equal(p[kept], simplex_map(z)[kept])

    @hypothesis.given(
        st.lists(st.floats(-50, 50), min_size=1, max_size=12), st.floats(-1e3, 1e3), st.floats(1.0, 2.0), st.randoms()
    )
    @hypothesis.settings(max_examples=60)
    def test_invariants(self, values, shift, alpha, random):
        z = torch.tensor(values, dtype=D)
        order = list(range(len(values)))
        random.shuffle(order)
        for f in (sparsemax, entmax15, lambda s: entmax(s, alpha)):
            p = f(z)
            assert (p >= 0).all()
            assert p.sum().item() == pytest.approx(1, abs=1e-12)
            torch.testing.assert_close(f(z + shift), p, rtol=0, atol=1e-9)
            torch.testing.assert_close(f(z[order]), p[order], rtol=0, atol=1e-12)
            # A larger score never has a smaller weight.
            assert (p[z.argsort()].diff() >= -1e-12).all()
        torch.testing.assert_close(sparsemax(sparsemax(z)), sparsemax(z), rtol=0, atol=1e-14)


class TestDerivatives:
    def test_gradcheck(self, simplex_map):
        z = scores_of(4, 5).requires_grad_()
        for dim in (-1, 0):
            assert gradcheck(simplex_map, (z, dim), check_forward_ad=True, check_batched_grad=True)

    def test_gradgradcheck(self, simplex_map):
        """entmax's own 1.5 and bisection have wrong second derivatives, and say nothing."""
        z = scores_of(4, 5).requires_grad_()
        assert gradgradcheck(simplex_map, (z,), check_fwd_over_rev=True)

    def test_with_mask(self, simplex_map):
        z, keep = scores_of(3, 6).requires_grad_(), torch.tensor([True, True, False, True, True, False])
        assert gradcheck(lambda s: simplex_map(s, mask=keep), (z,))
        assert gradgradcheck(lambda s: simplex_map(s, mask=keep), (z,))
        (gradient,) = torch.autograd.grad((simplex_map(z, mask=keep) ** 2).sum(), z)
        assert (gradient[:, ~keep] == 0).all()
        assert gradient.isfinite().all()

    @pytest.mark.parametrize("alpha", [1.0, 1.000001, 1.2, 1.5, 1.8])
    def test_towards_alpha(self, alpha):
        z = scores_of(3, 5).requires_grad_()
        # Forward differences at the lower end of the interval would leave it.
        a = torch.full((3, 1), max(alpha, 1 + 2e-6), dtype=D, requires_grad=True)
        assert gradcheck(entmax, (z, a), check_forward_ad=True, check_batched_grad=True)
        assert gradgradcheck(entmax, (z, a), check_fwd_over_rev=True)

    def test_towards_alpha_at_softmax(self):
        """The limit of the derivative: -p (w^2 - E w^2) / 2 with w = log p."""
        z, a = scores_of(3, 7), torch.ones((), dtype=D, requires_grad=True)
        slope = torch.func.jacfwd(lambda t: entmax(z, t))(a)
        p, w = z.softmax(-1), z.log_softmax(-1)
        wanted = -p * (w.square() - (p * w.square()).sum(-1, keepdim=True)) / 2
        torch.testing.assert_close(slope, wanted, rtol=1e-12, atol=1e-14)

    def test_towards_alpha_through_sparsemax(self):
        """At alpha = 2 itself, from the left."""
        z, a = scores_of(3, 7), torch.full((), 2.0, dtype=D)
        slope = torch.func.jacrev(lambda t: entmax(z, t))(a)
        h = 1e-6
        numerical = (3 * entmax(z, a) - 4 * entmax(z, a - h) + entmax(z, a - 2 * h)) / (2 * h)
        torch.testing.assert_close(slope, numerical, rtol=1e-5, atol=1e-7)

    def test_alpha_broadcasts(self):
        z = scores_of(2, 3, 4, 5)
        alpha = torch.tensor([1.1, 1.5, 1.9], dtype=D).reshape(3, 1, 1).requires_grad_()
        p = entmax(z, alpha)
        for head in range(3):
            torch.testing.assert_close(p[:, head], entmax(z[:, head], alpha[head].item()))
        assert gradcheck(lambda a: entmax(z, a), (alpha,))
        # Along another dimension, and with one alpha a slice.
        each = torch.full((2, 1, 4, 5), 1.25, dtype=D)
        torch.testing.assert_close(entmax(z, each, 1), entmax(z, 1.25, 1))

    def test_jacobian_of_sparsemax_on_its_support(self):
        z = scores_of(6) / 3
        p = sparsemax(z)
        s = (p > 0).double()
        assert 1 < s.sum() < 6
        torch.testing.assert_close(torch.func.jacrev(sparsemax)(z), s.diag() - s.outer(s) / s.sum())

    def test_jacobian_of_entmax15(self):
        z = scores_of(6)
        s = entmax15(z).sqrt()
        torch.testing.assert_close(torch.func.jacrev(entmax15)(z), s.diag() - s.outer(s) / s.sum())

    def test_second_derivative_is_that_of_the_formula(self):
        """On its support 1.5-entmax is a formula of which autograd finds any derivative."""

        def formula(z):
            # (x - tau)^2 sums to one over the support: a quadratic equation.
            x = z[entmax15(z.detach()) > 0] / 2
            variance = (x - x.mean()).square().sum()
            return (x - x.mean() + ((1 - variance) / len(x)).sqrt()).square()

        z = scores_of(7)
        kept = entmax15(z) > 0
        assert 1 < kept.sum() < 7
        for differentiate in (torch.func.jacrev, torch.func.jacfwd):
            ours = torch.func.hessian(lambda s: (entmax15(s)[kept] ** 3).sum())(z)
            twice = differentiate(torch.func.grad(lambda s: (entmax15(s)[kept] ** 3).sum()))(z)
            wanted = torch.autograd.functional.hessian(lambda s: (formula(s) ** 3).sum(), z)
            torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(twice, wanted, rtol=1e-10, atol=1e-12)

    def test_torch_func(self, simplex_map):
        z, v = scores_of(4, 5), scores_of(4, 5, seed=1)
        torch.testing.assert_close(torch.func.vmap(simplex_map)(z), simplex_map(z))
        torch.testing.assert_close(
            torch.func.vmap(lambda s: simplex_map(s, 0), in_dims=1, out_dims=1)(z), simplex_map(z, 0)
        )
        jacobians = torch.func.vmap(torch.func.jacrev(simplex_map))(z)
        torch.testing.assert_close(jacobians, torch.func.vmap(torch.func.jacfwd(simplex_map))(z))
        _, moved = torch.func.jvp(simplex_map, (z,), (v,))
        torch.testing.assert_close(moved, torch.einsum("bij,bj->bi", jacobians, v))
        gradients = torch.func.vmap(torch.func.grad(lambda s, w: (simplex_map(s) * w).sum()))(z, v)
        torch.testing.assert_close(gradients, moved)

    def test_vmap_over_alpha(self):
        z, alphas = scores_of(4, 5), torch.tensor([1.0, 1.4, 2.0], dtype=D)
        p = torch.func.vmap(entmax, in_dims=(None, 0))(z, alphas)
        for found, alpha in zip(p, alphas, strict=True):
            torch.testing.assert_close(found, entmax(z, float(alpha)))
        slopes = torch.func.vmap(torch.func.jacrev(entmax, argnums=1), in_dims=(None, 0))(z, alphas)
        assert slopes.shape == (3, 4, 5)
        torch.testing.assert_close(slopes.sum(-1), torch.zeros(3, 4, dtype=D), rtol=0, atol=1e-13)

    def test_bf16_gradient(self, simplex_map):
        z = scores_of(8, 20).bfloat16().requires_grad_()
        w = scores_of(8, 20, seed=1).bfloat16()
        (gradient,) = torch.autograd.grad((simplex_map(z) * w).sum(), z)
        wide = z.detach().float().requires_grad_()
        (wanted,) = torch.autograd.grad((simplex_map(wide) * w.float()).sum(), wide)
        assert gradient.dtype == torch.bfloat16
        torch.testing.assert_close(gradient.float(), wanted, rtol=2**-8, atol=1e-6)


class TestErrors:
    def test_wholly_masked(self, simplex_map):
        keep = torch.ones(3, 4, 5, dtype=torch.bool)
        keep[1, 2] = keep[2, 0] = False
        with pytest.raises(ValueError, match=r"slice at \(1, 2\) .* wholly masked"):
            simplex_map(scores_of(3, 4, 5), mask=keep)
        with pytest.raises(ValueError, match=r"slice at \(1, 2\)"):
            simplex_map(scores_of(3, 5, 4), 1, keep.movedim(-1, 1))
        with pytest.raises(ValueError, match=r"the only slice"):
            simplex_map(torch.full((3,), -torch.inf))
        with pytest.raises(ValueError, match=r"slice at \(2,\)"):
            torch.func.vmap(simplex_map)(torch.tensor([[0.0], [1.0], [-torch.inf]]))

    def test_empty(self, simplex_map):
        with pytest.raises(ValueError, match=r"dim=-1 is empty in scores of shape \(3, 0\)"):
            simplex_map(torch.zeros(3, 0))
        with pytest.raises(ValueError, match="at least one dimension"):
            simplex_map(torch.tensor(1.0))
        assert simplex_map(torch.zeros(0, 3)).shape == (0, 3)

    def test_what_does_not_fit(self, simplex_map):
        with pytest.raises(
            ValueError, match=r"mask has to broadcast to the shape of the scores, \(2, 3\); got \(3, 2\)"
        ):
            simplex_map(torch.zeros(2, 3), mask=torch.ones(3, 2, dtype=torch.bool))
        with pytest.raises(IndexError):
            simplex_map(torch.zeros(2, 3), 2)

    def test_alpha(self):
        z = torch.zeros(2, 3)
        for wrong in (0.99, 2.5, math.nan, torch.tensor([[1.5], [3.0]])):
            with pytest.raises(ValueError, match=r"alpha must lie in \[1, 2\]"):
                entmax(z, wrong)
        with pytest.raises(ValueError, match=r"alpha has to broadcast to shape \(2, 1\)"):
            entmax(z, torch.full((3,), 1.5))


def test_compiled_in_a_process_of_its_own():
    """Compiled, a map breaks the graph once and computes the same, gradient included."""
    program = (
        "import torch; from restpoint.solvers import entmax15\n"
        "f = lambda z: entmax15(2 * z).square().sum()\n"
        "z = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)\n"
        "a, = torch.autograd.grad(f(z), z)\n"
        "b, = torch.autograd.grad(torch.compile(f, backend='aot_eager')(z), z)\n"
        "torch.testing.assert_close(a, b)\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, timeout=120)
