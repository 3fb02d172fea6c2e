import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from restpoint.solvers import project_permutahedron, soft_rank, soft_sort, soft_topk, sparsemax

# Forward-mode differentiation makes torch load decompositions that it scripts.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")

D = torch.float64
MAPS = {
    "sort": soft_sort,
    "rank": soft_rank,
    "topk": lambda x, dim=-1, temperature=1.0: soft_topk(x, 2, dim, temperature),
}


@pytest.fixture(params=MAPS)
def soft(request):
    return MAPS[request.param]


def values_of(*shape, seed=0):
    return torch.randn(*shape, dtype=D, generator=torch.Generator().manual_seed(seed))


class TestValues:
    @hypothesis.given(
        st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=8), st.lists(st.floats(-5, 5), min_size=8, max_size=8)
    )
    def test_projection_is_optimal(self, values, vertex):
        """In the hull, and no vertex lies beyond it in the direction of the point."""
        x = torch.tensor(values, dtype=D)
        w = torch.tensor(vertex[: len(values)], dtype=D)
        p = project_permutahedron(x, w)
        largest, sums = w.sort(descending=True).values.cumsum(0), p.sort(descending=True).values.cumsum(0)
        assert (sums <= largest + 1e-9).all()
        assert sums[-1].item() == pytest.approx(largest[-1].item(), abs=1e-9)
        beyond = x - p
        best = (beyond.sort().values * w.sort().values).sum()
        assert beyond @ p == pytest.approx(best.item(), abs=1e-8 * (1 + x.abs().sum().item()))
        torch.testing.assert_close(project_permutahedron(p, w), p, rtol=1e-10, atol=1e-10)

    def test_hard_as_the_temperature_falls(self):
        x = values_of(20, 7)
        gap = x.sort(-1).values.diff(dim=-1).min().item()
        ranks = x.argsort(-1).argsort(-1).double() + 1
        for temperature in (gap * 0.99, 1e-6, 1e-12):
            assert torch.equal(soft_sort(x, temperature=temperature), x.sort(-1).values)
            assert torch.equal(soft_sort(x, temperature=temperature, descending=True), x.sort(-1, True).values)
            torch.testing.assert_close(soft_rank(x, temperature=temperature), ranks, rtol=0, atol=1e-12)
            torch.testing.assert_close(soft_rank(x, temperature=temperature, descending=True), 8 - ranks)
            torch.testing.assert_close(soft_topk(x, 3, temperature=temperature), (ranks > 4).double())
        errors = [(soft_rank(x, temperature=t) - ranks).abs().max().item() for t in (10, 1, 0.1, 0.01, 1e-3)]
        assert errors == sorted(errors, reverse=True)

    def test_means_as_the_temperature_rises(self):
        x = values_of(20, 7)
        torch.testing.assert_close(
            soft_sort(x, temperature=1e9), x.mean(-1, keepdim=True).expand_as(x), rtol=0, atol=1e-6
        )
        torch.testing.assert_close(soft_rank(x, temperature=1e9), torch.full_like(x, 4), rtol=0, atol=1e-6)
        torch.testing.assert_close(soft_topk(x, 3, temperature=1e9), torch.full_like(x, 3 / 7), rtol=0, atol=1e-6)

    @hypothesis.given(st.lists(st.floats(-100, 100), min_size=1, max_size=10), st.floats(1e-3, 1e3), st.randoms())
    @hypothesis.settings(max_examples=50)
    def test_invariants(self, values, temperature, random):
        x, n = torch.tensor(values, dtype=D), len(values)
        order = list(range(n))
        random.shuffle(order)
        ordered, ranks = soft_sort(x, temperature=temperature), soft_rank(x, temperature=temperature)
        assert (ordered.diff() >= -1e-9).all()
        assert ordered.sum().item() == pytest.approx(x.sum().item(), abs=1e-9)
        assert ranks.sum().item() == pytest.approx(n * (n + 1) / 2, abs=1e-8)
        assert (ranks[x.argsort()].diff() >= -1e-8).all()
        assert ranks.min() >= 1 - 1e-8 and ranks.max() <= n + 1e-8
        torch.testing.assert_close(soft_sort(x[order], temperature=temperature), ordered, rtol=0, atol=1e-9)
        torch.testing.assert_close(soft_rank(x[order], temperature=temperature), ranks[order], rtol=0, atol=1e-8)
        torch.testing.assert_close(soft_rank(x + 7, temperature=temperature), ranks, rtol=0, atol=1e-7)
        chosen = soft_topk(x, (n + 1) // 2, temperature=temperature)
        assert chosen.min() >= -1e-9 and chosen.max() <= 1 + 1e-9
        assert chosen.sum().item() == pytest.approx((n + 1) // 2, abs=1e-9)

    def test_one_of_them_is_sparsemax(self):
        x = values_of(5, 9)
        torch.testing.assert_close(soft_topk(x, 1, temperature=0.3), sparsemax(x / 0.3))

    @pytest.mark.parametrize("dtype", [torch.float32, D])
    def test_equal_values_share_their_ranks_at_any_temperature(self, dtype):
        x = torch.tensor([1.0, 0.3, 1.0, 1.0], dtype=dtype)
        for temperature in (0.1, 1e-4, 1e-9):
            torch.testing.assert_close(soft_rank(x, temperature=temperature), torch.tensor([3.0, 1, 3, 3], dtype=dtype))
            assert torch.equal(soft_sort(x, temperature=temperature), x.sort().values)

    def test_dimensions(self, soft):
        x = values_of(3, 4, 5)
        torch.testing.assert_close(soft(x, 1), soft(x.mT.contiguous()).mT)
        heat = torch.tensor([0.1, 1.0, 10.0], dtype=D).reshape(3, 1, 1)
        for i in range(3):
            torch.testing.assert_close(soft(x, -1, heat)[i], soft(x[i], -1, heat[i].item()))
        half = x.bfloat16()
        assert torch.equal(soft(half), soft(half.float()).bfloat16())


class TestDerivatives:
    def test_gradcheck(self, soft):
        x = values_of(3, 5).requires_grad_()
        heat = torch.tensor([[0.2], [1.0], [3.0]], dtype=D, requires_grad=True)
        assert gradcheck(lambda v, t: soft(v, -1, t), (x, heat), check_forward_ad=True, check_batched_grad=True)
        assert gradgradcheck(lambda v, t: soft(v, -1, t), (x, heat), check_fwd_over_rev=True)

    def test_of_a_permutahedron(self):
        x, w = values_of(3, 5).requires_grad_(), values_of(5, seed=1).requires_grad_()
        assert gradcheck(project_permutahedron, (x, w), check_forward_ad=True)
        assert gradgradcheck(project_permutahedron, (x, w))

    def test_torch_func(self, soft):
        x = values_of(4, 5)
        torch.testing.assert_close(torch.func.vmap(soft)(x), soft(x))
        jacobians = torch.func.vmap(torch.func.jacrev(soft))(x)
        torch.testing.assert_close(torch.func.vmap(torch.func.jacfwd(soft))(x), jacobians)
        each = torch.stack([torch.autograd.functional.jacobian(soft, row) for row in x])
        torch.testing.assert_close(jacobians, each)


def test_errors():
    x = values_of(2, 3)
    for wrong in (0.0, -1.0, float("nan")):
        for soft in MAPS.values():
            with pytest.raises(ValueError, match="temperature must be positive and finite; got"):
                soft(x, -1, wrong)
    for k in (0, 4):
        with pytest.raises(ValueError, match=f"k must lie between 1 and 3, the length of dim=-1; got {k}"):
            soft_topk(x, k)
    with pytest.raises(ValueError, match=r"vertex has to broadcast to the shape of the points, \(2, 3\); got \(4,\)"):
        project_permutahedron(x, torch.ones(4, dtype=D))
    with pytest.raises(ValueError, match="at least one dimension"):
        soft_rank(torch.tensor(1.0))
    with pytest.raises(IndexError):
        soft_rank(x, 2)
