"""Every structured distribution and every query against enumeration."""

import copy
import math
import pickle

import pytest
import torch
from scipy import stats

from tests.solvers.inference.enumeration import CASES, D, pick

pytestmark = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def holes(case, share=0.3, seed=5):
    """Potentials with true minus infinities that leave every sample some structure."""
    rng = torch.Generator().manual_seed(seed)
    parts = case.parts(seed=seed)
    kept = [case.matrix(b)[-1] for b in range(case.batch)]
    drop = torch.rand(case.flat(parts).shape, generator=rng) < share
    drop &= torch.stack(kept) == 0
    sizes = [p[0].numel() for p in parts]
    masks = [d.reshape(p.shape) for d, p in zip(drop.split(sizes, 1), parts, strict=True)]
    return tuple(p.masked_fill(m, -math.inf) for p, m in zip(parts, masks, strict=True))


def reference(case, parts, sample):
    """Log-partition, probabilities and marginals."""
    scores = case.scores(parts, sample)
    total = scores.logsumexp(0)
    p = (scores - total).exp()
    return total, p, p @ case.matrix(sample)


@pytest.mark.parametrize("potentials", [lambda c: c.parts(), lambda c: c.parts(20.0), holes], ids=["1", "20", "-inf"])
class TestEnumeration:
    def test_log_partition_and_marginals(self, case, potentials):
        parts = potentials(case)
        d = case.distribution(parts)
        marginals = case.flat(d.marginals)
        for b in range(case.batch):
            total, _, expected = reference(case, parts, b)
            torch.testing.assert_close(d.log_partition[b], total, **EXACT)
            torch.testing.assert_close(marginals[b], expected, **EXACT)

    def test_entropy(self, case, potentials):
        parts = potentials(case)
        entropy = case.distribution(parts).entropy
        for b in range(case.batch):
            _, p, _ = reference(case, parts, b)
            torch.testing.assert_close(entropy[b], -torch.xlogy(p, p).sum(), **EXACT)

    def test_divergence(self, case, potentials):
        parts, others = potentials(case), case.parts(2.0, seed=9)
        kl = case.distribution(parts).kl(case.distribution(others))
        for b in range(case.batch):
            _, p, _ = reference(case, parts, b)
            _, q, _ = reference(case, others, b)
            torch.testing.assert_close(kl[b], (torch.xlogy(p, p) - torch.xlogy(p, q)).sum(), rtol=1e-12, atol=1e-11)

    def test_divergence_is_infinite_where_only_the_other_excludes(self, case, potentials):
        parts, others = potentials(case), holes(case, 0.2, seed=11)
        kl = case.distribution(parts).kl(case.distribution(others))
        for b in range(case.batch):
            p, q = reference(case, parts, b)[1], reference(case, others, b)[1]
            if ((p > 0) & (p < 1e-9) & (q == 0)).any():
                continue
            expected = (torch.xlogy(p, p) - torch.xlogy(p, q)).sum()
            torch.testing.assert_close(kl[b], expected, rtol=1e-12, atol=1e-11)

    def test_argmax(self, case, potentials):
        parts = potentials(case)
        best = case.distribution(parts).argmax
        for b in range(case.batch):
            scores = case.scores(parts, b)
            assert torch.equal(case.row(pick(best, b), b), case.matrix(b)[scores.argmax()])

    def test_kbest(self, case, potentials):
        parts, k = potentials(case), 4
        d = case.distribution(parts)
        found, log_prob = d.kbest(k)
        for b in range(case.batch):
            scores = case.scores(parts, b)
            order = scores.argsort(descending=True)[:k]
            for rank in range(k):
                if rank >= len(order) or scores[order[rank]] == -math.inf:
                    assert log_prob[rank, b] == -math.inf
                    continue
                assert torch.equal(case.row(pick(found, rank, b), b), case.matrix(b)[order[rank]])
                torch.testing.assert_close(log_prob[rank, b], scores[order[rank]] - scores.logsumexp(0), **EXACT)

    def test_log_prob(self, case, potentials):
        parts = potentials(case)
        d = case.distribution(parts)
        found = d.sample(1, torch.Generator().manual_seed(1))
        value = d.log_prob(pick(found, 0))
        for b in range(case.batch):
            scores = case.scores(parts, b)
            row = case.row(pick(found, 0, b), b)
            (index,) = (case.matrix(b) == row).all(1).nonzero()
            torch.testing.assert_close(value[b], (scores - scores.logsumexp(0))[index[0]], **EXACT)


def test_samples_have_the_right_frequencies(case):
    n = 2000
    parts = case.parts(0.7, seed=3)
    found = case.distribution(parts).sample(n, torch.Generator().manual_seed(7))
    for b in range(case.batch):
        _, p, _ = reference(case, parts, b)
        rows = {tuple(r.tolist()): i for i, r in enumerate(case.matrix(b))}
        drawn = torch.tensor([rows[tuple(case.row(pick(found, i, b), b).tolist())] for i in range(n)])
        observed = torch.bincount(drawn, minlength=len(p)).double()
        rare = p * n < 5
        observed, expected = (torch.cat([x[~rare], x[rare].sum().reshape(1)]) for x in (observed, p * n))
        keep = expected > 0
        if keep.sum() > 1:
            assert stats.chisquare(observed[keep], expected[keep]).pvalue > 1e-3
        assert observed[~keep].sum() == 0


def test_samples_repeat_with_their_seed(case):
    d = case.distribution(case.parts())
    first, second = (d.sample(5, torch.Generator().manual_seed(2)) for _ in range(2))
    for a, b in zip(first if isinstance(first, tuple) else [first], second if isinstance(second, tuple) else [second]):
        assert torch.equal(a, b)


def test_samples_respect_what_is_excluded(case):
    parts = holes(case, 0.5)
    found = case.distribution(parts).sample(20, torch.Generator().manual_seed(2))
    for b in range(case.batch):
        flat = case.flat(parts)[b]
        for i in range(20):
            assert (flat[case.row(pick(found, i, b), b) > 0] > -math.inf).all()


@pytest.mark.parametrize("scale", [20.0, 1000.0, 1e6])
def test_large_scales_in_float32(case, scale):
    parts = case.parts(scale, dtype=torch.float32)
    exact = tuple(p.double() for p in parts)
    for p in parts:
        p.requires_grad_()
    d = case.distribution(parts)
    marginals = case.flat(d.marginals)
    grads = case.flat(torch.autograd.grad(d.log_partition.sum(), parts, retain_graph=True, materialize_grads=True))
    curvature = torch.autograd.grad((marginals**2).sum(), parts, allow_unused=True)
    assert all(g is None or torch.isfinite(g).all() for g in curvature)
    assert (d.entropy >= 0).all()
    for b in range(case.batch):
        total, p, expected = reference(case, exact, b)
        torch.testing.assert_close(d.log_partition[b].double(), total, rtol=1e-6, atol=1e-5)
        # What float32 cannot resolve in the potentials is not held against the recursion.
        slack = max(1e-6, 3e-7 * scale) if scale < 100 else 1e-3
        torch.testing.assert_close(marginals[b].double(), expected, rtol=0, atol=slack)
        torch.testing.assert_close(grads[b].double(), expected, rtol=0, atol=slack)
        torch.testing.assert_close(d.entropy[b].double(), -torch.xlogy(p, p).sum(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("query", ["log_partition", "marginals", "entropy", "kl", "log_prob"])
@pytest.mark.parametrize("order", [1, 2])
def test_derivatives(case, query, order):
    parts = tuple(p.requires_grad_() for p in case.parts(0.8, seed=2))
    others = case.parts(0.8, seed=4)
    structure = case.distribution(others).argmax
    rng = torch.Generator().manual_seed(1)
    probe = torch.randn(case.flat(parts).shape, generator=rng, dtype=D)

    def f(*parts):
        d = case.distribution(parts)
        if query == "marginals":
            return (case.flat(d.marginals) * probe).sum(1)
        if query == "kl":
            return d.kl(case.distribution(others)) + 0.5 * case.distribution(others).kl(d)
        if query == "log_prob":
            return d.log_prob(structure)
        return getattr(d, query)

    check = torch.autograd.gradcheck if order == 1 else torch.autograd.gradgradcheck
    assert check(f, parts, fast_mode=True)


def test_derivatives_where_parts_are_excluded(case):
    """No NaN from minus infinities, to second order, and the same numbers as on what is left."""
    parts = tuple(p.requires_grad_() for p in holes(case))
    d = case.distribution(parts)
    for value in (d.log_partition.sum(), d.entropy.sum(), (case.flat(d.marginals) ** 2).sum()):
        first = torch.autograd.grad(value, parts, create_graph=True, materialize_grads=True)
        assert all(torch.isfinite(g).all() for g in first)
        assert all((g[p == -math.inf] == 0).all() for g, p in zip(first, parts, strict=True))
        if not any(g.requires_grad for g in first):
            continue
        second = torch.autograd.grad(sum((g**2).sum() for g in first), parts, retain_graph=True, allow_unused=True)
        assert all(g is None or torch.isfinite(g).all() for g in second)


def test_transforms(case):
    """torch.func sees the same derivatives."""
    parts = case.parts()

    def f(*parts):
        d = case.distribution(parts)
        return d.log_partition.sum() + (case.flat(d.marginals) ** 2).sum()

    everything = tuple(range(len(parts)))
    taped = tuple(p.clone().requires_grad_() for p in parts)
    expected = torch.autograd.grad(f(*taped), taped, materialize_grads=True)
    for actual, e in zip(torch.func.grad(f, everything)(*parts), expected, strict=True):
        torch.testing.assert_close(actual, e, **EXACT)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")
def test_forward_mode(case):
    """Derivatives along a direction, of values and of derivatives, and of recursions that keep few of their steps."""
    parts, tangents = case.parts(0.7), case.parts(seed=4)

    def f(*parts):
        d = case.distribution(parts)
        return d.log_partition.sum() + d.checkpointed().entropy.sum()

    taped = tuple(p.clone().requires_grad_() for p in parts)
    first = torch.autograd.grad(f(*taped), taped, create_graph=True, materialize_grads=True)
    slope = sum((g * t).sum() for g, t in zip(first, tangents, strict=True))
    torch.testing.assert_close(torch.func.jvp(f, parts, tangents)[1], slope.detach(), rtol=1e-10, atol=1e-11)
    second = torch.autograd.grad(slope, taped, materialize_grads=True, allow_unused=True)
    gradient = torch.func.grad(f, tuple(range(len(parts))))
    for a, b in zip(torch.func.jvp(gradient, parts, tangents)[1], second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_padding_is_never_looked_at(case):
    if len(set(case.lengths)) == 1:
        return
    clean = case.parts()
    used = torch.stack([case.matrix(b).any(0) for b in range(case.batch)])
    sizes = [p[0].numel() for p in clean]
    masks = [u.reshape(p.shape) for u, p in zip(used.split(sizes, 1), clean, strict=True)]
    dirty = tuple(torch.where(m, p, math.nan).requires_grad_() for m, p in zip(masks, clean, strict=True))
    a, b = case.distribution(clean), case.distribution(dirty)
    torch.testing.assert_close(a.log_partition, b.log_partition, **EXACT)
    torch.testing.assert_close(case.flat(a.marginals), case.flat(b.marginals), **EXACT)
    torch.testing.assert_close(a.entropy, b.entropy, **EXACT)
    grads = torch.autograd.grad(b.log_partition.sum() + b.entropy.sum(), dirty, materialize_grads=True)
    assert all(torch.isfinite(g).all() for g in grads)


def test_modes(case):
    """What was computed without a graph is not handed to who wants one; inference mode; copies."""
    parts = tuple(p.requires_grad_() for p in case.parts())
    d = case.distribution(parts)
    with torch.no_grad():
        plain = d.log_partition
        case.flat(d.marginals)
    assert not plain.requires_grad
    assert d.log_partition.requires_grad
    torch.testing.assert_close(d.log_partition.detach(), plain, **EXACT)
    with torch.inference_mode():
        d = case.distribution(case.parts())
        assert torch.allclose(d.log_partition, plain)
        case.flat(d.marginals)
        assert (d.log_prob(d.argmax) <= 0).all()
        d.sample(2)
    d = case.distribution(case.parts())
    for other in (copy.deepcopy(d), pickle.loads(pickle.dumps(d))):  # noqa: S301
        assert torch.equal(other.log_partition, d.log_partition)


def test_the_callers_tensors_stay_as_they_are(case):
    """No query asks for derivatives in the caller's name, nor leaves one behind (torch-struct does the first)."""
    for wanted in (False, True):
        parts = tuple(p.requires_grad_(wanted) for p in case.parts())
        before = tuple(p.detach().clone() for p in parts)
        d = case.distribution(parts)
        for query in ("log_partition", "marginals", "entropy", "argmax"):
            getattr(d, query)
        d.kbest(2), d.sample(2), d.kl(d)
        assert [p.requires_grad for p in parts] == [wanted] * len(parts)
        assert all(p.grad is None for p in parts)
        assert all(torch.equal(p, b) for p, b in zip(parts, before, strict=True))


def test_half_precision_is_computed_in_float32(case):
    parts = case.parts(dtype=torch.bfloat16)
    value = case.distribution(parts).log_partition
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), case.distribution(tuple(p.double() for p in parts)).log_partition)


def test_nothing_left(case):
    parts = tuple(torch.full_like(p, -math.inf) for p in case.parts())
    d = case.distribution(parts)
    assert (d.log_partition == -math.inf).all()
    for query in ("marginals", "entropy", "argmax"):
        with pytest.raises(ValueError, match="leave no structure to sample 0"):
            getattr(d, query)
    for call in (lambda: d.sample(2), lambda: d.kbest(2), lambda: d.kl(case.distribution(case.parts()))):
        with pytest.raises(ValueError, match="leave no structure to sample 0"):
            call()


def test_bad_numbers(case):
    for value in (math.nan, math.inf):
        parts = case.parts()
        index = tuple(case.structures(case.lengths[-1]).__next__())
        which = next(i for i, used in enumerate(index) if used)
        parts[which][(-1, *index[which][0])] = value
        with pytest.raises(ValueError, match=rf"the entry \({case.batch - 1}, .* is {value}"):
            case.distribution(parts)


def test_bad_lengths(case):
    for wrong in (0, -1, 99):
        lengths = torch.tensor(case.lengths)
        lengths[-1] = wrong
        with pytest.raises(ValueError, match=rf"sample {case.batch - 1} has length -?\d+; expected at least"):
            case.build(case.parts(), lengths)
    with pytest.raises(ValueError, match=r"lengths: expected shape \(batch,"):
        case.build(case.parts(), torch.ones(case.batch + 1, dtype=torch.int64))


def test_bad_shapes(case):
    parts = case.parts()
    with pytest.raises(ValueError, match=r"expected shape \(.*\), got \("):
        case.distribution((parts[0].unsqueeze(-1), *parts[1:]))


def test_bad_counts(case):
    d = case.distribution(case.parts())
    with pytest.raises(ValueError, match="n must be an integer of at least 1; got 0"):
        d.sample(0)
    with pytest.raises(ValueError, match="k must be an integer of at least 1; got 0"):
        d.kbest(0)


def test_divergence_of_strangers(case):
    d = case.distribution(case.parts())
    rows = slice(0, 1)
    other = case.build(tuple(p[rows].double() for p in case.parts()), torch.tensor(case.lengths[:1]))
    if case.batch > 1:
        with pytest.raises(ValueError, match="kl: expected"):
            d.kl(other)
    narrow = case.build(case.parts(dtype=torch.float32), torch.tensor(case.lengths))
    with pytest.raises(ValueError, match="kl: expected"):
        d.kl(narrow)
