"""Structured attention against enumeration, torch's signature, and padding that changes nothing."""

import functools
import inspect
import itertools

import pytest
import torch
from torch import nn

from restpoint.models.attention import StructuredAttention, StructuredLatent
from restpoint.models.attention.structured import STRUCTURES
from restpoint.solvers.inference import DependencyTree, LinearChain, SemiMarkov

D = torch.float64
every = pytest.mark.parametrize("structure", STRUCTURES)


def layer(structure, heads=2, dim=8, **options):
    attention = StructuredAttention(
        dim, heads, batch_first=True, dtype=D, structure=structure, **{"longest": 3, **options}
    )
    for parameter in attention.structure.parameters():
        nn.init.normal_(parameter)
    return attention


def data(batch=2, length=5, dim=8, seed=0):
    return torch.randn(batch, length, dim, dtype=D, generator=torch.Generator().manual_seed(seed))


def scores_of(attention, x):
    q, k, _ = (attention._heads(t) for t in attention._projected(x, x, x))
    return q, q @ k.mT / attention.head_dim**0.5


class TestEnumeration:
    @staticmethod
    def check(attention, x, chosen):
        """`chosen(head, query, scores)` yields log-weights and the keys that are chosen."""
        _, weights = attention(x, x, x, average_attn_weights=False)
        _, scores = scores_of(attention, x)
        for head, query in itertools.product(range(attention.num_heads), range(x.shape[1])):
            worth, rows = zip(*chosen(head, query, scores[0, head]), strict=True)
            expected = torch.stack(worth).softmax(0) @ torch.tensor(rows, dtype=D)
            torch.testing.assert_close(weights[0, head, query], expected, rtol=0, atol=1e-12)

    def test_chain(self):
        attention, x = layer("chain", normalize=False), data(1, 4)

        def subsets(head, query, scores):
            for z in itertools.product(range(2), repeat=4):
                moves = sum(attention.structure.transitions[head, a, b] for a, b in itertools.pairwise(z))
                yield (scores[query] * torch.tensor(z)).sum() + moves, z

        self.check(attention, x, subsets)

    def test_semi_markov(self):
        attention, x = layer("semi-markov", normalize=False), data(1, 4)
        inner = attention.structure

        def segmentations(head, query, scores):
            for cut in itertools.product([False, True], repeat=3):
                ends = [0, *(i + 1 for i in range(3) if cut[i]), 4]
                sizes = [b - a for a, b in itertools.pairwise(ends)]
                if max(sizes) > 3:
                    continue
                for labels in itertools.product(range(2), repeat=len(sizes)):
                    z = [label for label, size in zip(labels, sizes, strict=True) for _ in range(size)]
                    worth = (scores[query] * torch.tensor(z)).sum()
                    worth = worth + sum(inner.durations[head, s - 1, c] for s, c in zip(sizes, labels, strict=True))
                    worth = worth + sum(inner.transitions[head, a, b] for a, b in itertools.pairwise(labels))
                    yield worth, z

        self.check(attention, x, segmentations)

    @pytest.mark.parametrize("structure", ["tree", "projective-tree"])
    def test_tree(self, structure):
        attention, x = layer(structure), data(1, 3)
        q, _ = scores_of(attention, x)
        root = (q[0] * attention.structure.root.unsqueeze(1)).sum(-1) / attention.head_dim**0.5

        def trees(head, query, scores):
            for heads in itertools.product(range(4), repeat=3):
                # Of three words, those that lead to the root in at most three steps; none of these trees cross but one.
                up = [0, *heads]
                reach = all(functools.reduce(lambda node, _: up[node], range(4), m) == 0 for m in range(1, 4))
                crossing = heads[1] == 0 and (heads[0] == 3 or heads[2] == 1)
                if reach and heads.count(0) == 1 and not (structure == "projective-tree" and crossing):
                    worth = sum(root[head, m] if h == 0 else scores[m, h - 1] for m, h in enumerate(heads))
                    yield worth, [float(heads[query] == k + 1) for k in range(3)]

        self.check(attention, x, trees)


def test_the_signature_is_that_of_torch():
    for name in ("__init__", "forward"):
        theirs = inspect.signature(getattr(nn.MultiheadAttention, name)).parameters
        ours = inspect.signature(getattr(StructuredAttention, name)).parameters
        assert list(ours)[: len(theirs)] == list(theirs)
        assert all(ours[p].default == theirs[p].default for p in theirs)
    weights = nn.MultiheadAttention(8, 2, kdim=3, vdim=5).state_dict()
    missing, unexpected = StructuredAttention(8, 2, kdim=3, vdim=5).load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(name.startswith("structure.") for name in missing)


@every
@pytest.mark.parametrize("float_mask", [False, True])
def test_padding_changes_nothing(structure, float_mask):
    attention, x = layer(structure), data(3, 6)
    mask = torch.zeros(3, 6, dtype=torch.bool)
    mask[0, 4:] = mask[1, [1, 4]] = mask[2, 1:] = True
    given = torch.zeros(3, 6, dtype=D).masked_fill(mask, -torch.inf) if float_mask else mask
    output, weights = attention(x, x, x, key_padding_mask=given)
    assert (weights.masked_select(mask.unsqueeze(1)) == 0).all()
    for b in range(3):
        kept = x[b : b + 1, ~mask[b]]
        alone, _ = attention(kept, kept, kept)
        torch.testing.assert_close(output[b, ~mask[b]], alone[0], rtol=0, atol=1e-12)
    changed = x.masked_fill(mask.unsqueeze(2), 1e6)
    torch.testing.assert_close(attention(changed, changed, changed, given)[0][~mask], output[~mask])


@every
def test_layouts(structure):
    attention, x = layer(structure), data()
    output, weights = attention(x, x, x)
    assert weights.shape == (2, 5, 5)
    assert attention(x, x, x, need_weights=False)[1] is None
    single, shown = attention(x[0], x[0], x[0], average_attn_weights=False)
    torch.testing.assert_close(single, output[0])
    torch.testing.assert_close(shown.mean(0), weights[0])
    attention.batch_first = False
    swapped, _ = attention(*[x.transpose(0, 1)] * 3)
    torch.testing.assert_close(swapped.transpose(0, 1), output)


@pytest.mark.parametrize("structure", ["chain", "semi-markov"])
def test_other_keys_and_masks(structure):
    attention = StructuredAttention(8, 2, kdim=3, vdim=4, batch_first=True, dtype=D, structure=structure)
    query, key, value = data(2, 3), data(2, 7, 3), data(2, 7, 4)
    mask = torch.zeros(3, 7, dtype=torch.bool)
    mask[0, 2:] = mask[2, 0] = True
    output, weights = attention(query, key, value, attn_mask=mask)
    assert output.shape == (2, 3, 8)
    assert (weights[:, mask] == 0).all()
    torch.testing.assert_close(weights.sum(2), torch.ones(2, 3, dtype=D))
    added = torch.zeros(3, 7, dtype=D).masked_fill(mask, -torch.inf)
    torch.testing.assert_close(attention(query, key, value, attn_mask=added.expand(4, 3, 7))[0], output)
    later = key.clone()
    later[:, 2:] += 1
    torch.testing.assert_close(attention(query, later, value, attn_mask=mask)[0][:, 0], output[:, 0])


@every
def test_derivatives(structure):
    attention, x = layer(structure, heads=1, dim=4), data(2, 3, 4).requires_grad_()
    mask = torch.tensor([[False, False, False], [False, True, False]])
    parameters = dict(attention.named_parameters())

    def output(x, *values):
        arguments = (dict(zip(parameters, values, strict=True)), (x, x, x, mask))
        return torch.func.functional_call(attention, *arguments)[0][~mask]

    points = (x, *(p.detach().requires_grad_() for p in parameters.values()))
    assert torch.autograd.gradcheck(output, points, fast_mode=True)
    assert torch.autograd.gradgradcheck(output, points, fast_mode=True)

    def total(*values):
        return output(*values).square().sum()

    expected = torch.autograd.grad(total(*points), points)
    found = torch.func.grad(total, argnums=tuple(range(len(points))))(*(p.detach() for p in points))
    torch.testing.assert_close(found, expected)


@every
@pytest.mark.parametrize("dtype", [torch.float32, D])
@pytest.mark.parametrize("scale", [30.0, 1000.0])
def test_large_scores(structure, dtype, scale):
    attention, x = layer(structure).to(dtype), (scale * data(seed=3)).to(dtype).requires_grad_()
    output, weights = attention(x, x, x, torch.arange(5) >= torch.tensor([[5], [2]]))
    assert ((weights >= 0) & (weights <= 1 + 1e-6)).all()
    (slope,) = torch.autograd.grad(output.sum(), x)
    assert output.isfinite().all()
    assert slope.isfinite().all()


@every
def test_it_trains_in_a_transformer(structure):
    """Whether the first two tokens differ."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    encoder.self_attn = StructuredAttention(16, 2, batch_first=True, structure=structure)
    embedding, head = nn.Embedding(3, 16), nn.Linear(16, 2)
    x = torch.randint(2, (24, 6))
    padding = torch.arange(6) >= torch.randint(2, 7, (24, 1))
    labels = (x[:, 0] != x[:, 1]).long()
    x = x.masked_fill(padding, 2)
    parameters = [*encoder.parameters(), *embedding.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(parameters, 0.01)
    losses = []
    for _ in range(20):
        logits = head(encoder(embedding(x), src_key_padding_mask=padding)[:, 0])
        loss = nn.functional.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.grad.isfinite().all() for p in encoder.parameters())


def test_bad_input():
    with pytest.raises(ValueError, match=r"'trees'. Did you mean 'tree'"):
        StructuredAttention(8, 2, structure="trees")
    with pytest.raises(ValueError, match="longest must be at least 1"):
        StructuredAttention(8, 2, longest=0)
    with pytest.raises(ValueError, match="no place"):
        StructuredAttention(8, 2, add_zero_attn=True)
    attention, x = layer("tree"), data()
    with pytest.raises(ValueError, match=r"key must have shape \(2, 5, 8\).*got \(2, 4, 8\)"):
        attention(x, x[:, :4], x[:, :4])
    with pytest.raises(ValueError, match="is_causal only says"):
        attention(x, x, x, is_causal=True)
    padding = torch.tensor([[False] * 5, [True] * 5])
    for structure in STRUCTURES:
        with pytest.raises(ValueError, match="no key to some query of sample 1"):
            layer(structure)(x, x, x, padding)
    with pytest.raises(ValueError, match="attn_mask must have shape"):
        attention(x, x, x, attn_mask=torch.zeros(4, 5, dtype=torch.bool))


@every
def test_masks_that_are_neither_boolean_nor_floating_point(structure):
    """As torch's: a mask of ones and zeros would be added to the scores, which no mask is meant for."""
    attention, x = layer(structure), data()
    with pytest.raises(ValueError, match=r"attn_mask must be boolean.* got torch.int64"):
        attention._check(x, x, x, None, torch.eye(5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"key_padding_mask must be boolean.* got torch.uint8"):
        attention._check(x, x, x, torch.zeros(2, 5, dtype=torch.uint8), None)


@every
def test_numbers_that_are_none(structure):
    attention, x = layer(structure), data()
    wrong = x.clone()
    wrong[1, 2, 3] = torch.nan
    with pytest.raises(ValueError, match="the score of key 2 for query 0 of sample 1, head 0, is NaN or plus infinity"):
        attention(wrong, wrong, wrong)
    mask = torch.zeros(5, 5, dtype=D)
    mask[3, 1] = torch.inf
    with pytest.raises(ValueError, match="the score of key 1 for query 3 of sample 0, head 0"):
        attention(x, x, x, attn_mask=mask)
    # In the padding nobody looks.
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 2] = True
    keys = x.clone()
    keys[1, 2] = torch.nan
    output, _ = attention(x, keys, x, padding)
    torch.testing.assert_close(output[~padding], attention(x, x, x, padding)[0][~padding], rtol=0, atol=1e-12)


@every
def test_nothing_to_attend_with(structure):
    attention, x = layer(structure), data()
    for empty in (x[:, :0], x[:0]):
        with pytest.raises(ValueError, match="there must be a sample, a query and a key"):
            attention(empty, empty, empty)
    with pytest.raises(ValueError, match=r"key must have as many dimensions as query; got \(1, 2, 5, 8\)"):
        attention(x[0], x, x)


class TestLatent:
    BUILDS = pytest.mark.parametrize(
        "build, shapes",
        [
            (LinearChain, [(3, 4, 2, 2), (3, 5, 2)]),
            (SemiMarkov, [(3, 5, 2, 2), (3, 4, 2, 2)]),
            (functools.partial(DependencyTree, projective=False), [(3, 6, 6)]),
        ],
    )

    @BUILDS
    @pytest.mark.parametrize("relaxation", ["marginals", "sparsemap", "argmax", "sample"])
    def test_indicators(self, build, shapes, relaxation):
        potentials = [torch.randn(s, dtype=D, requires_grad=True) for s in shapes]
        lengths = torch.tensor([5, 2, 1])
        found = StructuredLatent(build, relaxation)(*potentials, lengths=lengths)
        marginals = build(*potentials, lengths=lengths).marginals
        for mine, soft, original in zip(
            *[(t,) if isinstance(t, torch.Tensor) else t for t in (found, marginals)], potentials, strict=True
        ):
            assert mine.shape == soft.shape == original.shape
            assert ((mine > -1e-12) & (mine < 1 + 1e-12)).all()
            if relaxation in ("argmax", "sample"):
                torch.testing.assert_close(mine, mine.round(), rtol=0, atol=1e-12)
            assert (mine.detach()[soft.detach() == 0].abs() < 1e-12).all()
        total = sum(t.square().sum() for t in ((found,) if isinstance(found, torch.Tensor) else found))
        slopes = torch.autograd.grad(total, potentials, materialize_grads=True)
        assert all(s.isfinite().all() for s in slopes)

    @pytest.mark.parametrize("relaxation", ["marginals", "sparsemap", "argmax"])
    def test_it_learns_the_structure_that_the_loss_wants(self, relaxation):
        wanted = torch.tensor([[0, 1, 1, 0]])
        target = nn.functional.one_hot(wanted, 2).float()
        # Not at zero, where all structures are worth the same and SparseMAP has a kink.
        unary = (0.3 * torch.randn(1, 4, 2)).requires_grad_()
        latent, optimizer = StructuredLatent(LinearChain, relaxation), torch.optim.Adam([unary], 0.1)
        for _ in range(30):
            loss = (latent(torch.zeros(2, 2), unary).states - target).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert LinearChain(unary=unary).argmax.equal(wanted)
        assert float(loss.detach()) < 0.5

    def test_bad_input(self):
        with pytest.raises(ValueError, match=r"'marginal'. Did you mean 'marginals'"):
            StructuredLatent(LinearChain, "marginal")
