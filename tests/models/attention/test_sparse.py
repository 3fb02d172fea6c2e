import copy
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from restpoint.models import SparseAttention
from restpoint.solvers import entmax, soft_topk, sparsemax

# Forward-mode differentiation makes torch load decompositions that it scripts.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")

D = torch.float64
NORMALIZERS = ["softmax", "sparsemax", "entmax15", "entmax"]
N, L, S, E, H = 3, 4, 5, 8, 2


def pair(normalizer="softmax", **options):
    """Torch's module and ours, with the same weights."""
    theirs = nn.MultiheadAttention(E, H, dtype=D, **options)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.5)
    ours = SparseAttention(E, H, dtype=D, normalizer=normalizer, **options)
    missing = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert missing.unexpected_keys == []
    assert missing.missing_keys == (["alpha_logits"] if normalizer == "entmax" else [])
    return theirs, ours


def inputs(batch_first, kdim=E, vdim=E, single=False):
    shapes = [(L, E), (S, kdim), (S, vdim)]
    if not single:
        shapes = [(N, *s) if batch_first else (s[0], N, s[1]) for s in shapes]
    return tuple(torch.randn(s, dtype=D, requires_grad=True) for s in shapes)


def padding():
    mask = torch.zeros(N, S, dtype=torch.bool)
    mask[0, 3:] = mask[2, 1] = True
    return mask


def causal():
    return torch.ones(L, S, dtype=torch.bool).triu(1)


class TestAsTorch:
    """With softmax it is torch's module, gradients included."""

    def compare(self, theirs, ours, x, **arguments):
        for need, average in itertools.product((True, False), (True, False)):
            arguments |= {"need_weights": need, "average_attn_weights": average}
            wanted, wanted_weights = theirs(*x, **arguments)
            found, found_weights = ours(*x, **arguments)
            torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-14)
            assert (found_weights is None) == (wanted_weights is None) == (not need)
            if need:
                torch.testing.assert_close(found_weights, wanted_weights, rtol=1e-13, atol=1e-14)
            leaves = list(dict.fromkeys(x))
            ours_too = torch.autograd.grad(found.square().sum(), [*leaves, *ours.parameters()])
            grads = torch.autograd.grad(wanted.square().sum(), [*leaves, *theirs.parameters()])
            for a, b in zip(ours_too, grads, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)

    @pytest.mark.parametrize("batch_first", [True, False])
    def test_plain(self, batch_first):
        self.compare(*pair(batch_first=batch_first), inputs(batch_first))
        self.compare(*pair(batch_first=batch_first), inputs(batch_first, single=True))

    def test_self_attention(self):
        for batch_first in (True, False):
            x, _, _ = inputs(batch_first)
            self.compare(*pair(batch_first=batch_first), (x, x, x))

    @pytest.mark.parametrize(
        "options",
        [
            {"kdim": 6, "vdim": 7},
            {"bias": False},
            {"add_bias_kv": True, "add_zero_attn": True},
            {"add_zero_attn": True},
        ],
        ids=str,
    )
    def test_options(self, options):
        theirs, ours = pair(batch_first=True, **options)
        sizes = {k: options[k] for k in ("kdim", "vdim") if k in options}
        self.compare(theirs, ours, inputs(True, **sizes))
        self.compare(theirs, ours, inputs(True, **sizes), key_padding_mask=padding(), attn_mask=causal())

    def test_masks(self):
        theirs, ours = pair(batch_first=True)
        x = inputs(True)
        each = torch.rand(N * H, L, S) < 0.3
        each[..., 0] = False
        numbers = torch.randn(L, S, dtype=D)
        for masks in (
            {"key_padding_mask": padding()},
            {"attn_mask": causal()},
            {"attn_mask": causal(), "is_causal": True, "key_padding_mask": padding()},
            {"attn_mask": each, "key_padding_mask": padding()},
            {"attn_mask": numbers},
            {"attn_mask": numbers.masked_fill(causal(), -torch.inf), "key_padding_mask": torch.randn(N, S, dtype=D)},
        ):
            self.compare(theirs, ours, x, **masks)
        alone = inputs(True, single=True)
        self.compare(theirs, ours, alone, key_padding_mask=padding()[0], attn_mask=causal())

    def test_dropout(self):
        theirs, ours = pair(dropout=0.4, batch_first=True)
        x = inputs(True)
        found = []
        for module in (theirs, ours):
            torch.manual_seed(3)
            found.append(module(*x))
        torch.testing.assert_close(found[0][1], found[1][1])
        torch.testing.assert_close(found[0][0], found[1][0])
        self.compare(theirs.eval(), ours.eval(), x)


class TestSparse:
    @pytest.mark.parametrize("normalizer", NORMALIZERS)
    def test_weights(self, normalizer):
        _, ours = pair(normalizer, batch_first=True)
        x = tuple(3 * t for t in inputs(True))
        output, weights = ours(*x, key_padding_mask=padding(), average_attn_weights=False)
        assert output.shape == (N, L, E) and weights.shape == (N, H, L, S)
        torch.testing.assert_close(weights.sum(-1), torch.ones(N, H, L, dtype=D))
        assert (weights[padding()[:, None, None].expand_as(weights)] == 0).all()
        zeros = (weights == 0).double().mean().item()
        assert (zeros > 0.4) == (normalizer != "softmax")

    def test_equals_its_formula(self):
        _, ours = pair("sparsemax", batch_first=True)
        query, key, value = inputs(True)
        q, k, v = (
            nn.functional.linear(x, w, b).unflatten(-1, (H, E // H)).transpose(1, 2)
            for x, w, b in zip(
                (query, key, value), ours.in_proj_weight.chunk(3), ours.in_proj_bias.chunk(3), strict=True
            )
        )
        weights = sparsemax(q @ k.mT / (E // H) ** 0.5)
        output, found = ours(query, key, value, average_attn_weights=False)
        torch.testing.assert_close(found, weights)
        torch.testing.assert_close(output, ours.out_proj((weights @ v).transpose(1, 2).flatten(2)))

    def test_an_alpha_a_head_is_learnt(self):
        _, ours = pair("entmax", batch_first=True)
        assert ours.alpha.tolist() == [1.5, 1.5]
        x = inputs(True)
        torch.testing.assert_close(ours(*x)[0], pair_output("entmax15", ours, x))
        with torch.no_grad():
            ours.alpha_logits.copy_(torch.tensor([-40.0, 40.0]))
        scores = {n: pair_output(n, ours, x, average_attn_weights=False, index=1) for n in ("softmax", "sparsemax")}
        weights = ours(*x, average_attn_weights=False)[1]
        torch.testing.assert_close(weights[:, 0], scores["softmax"][:, 0])
        torch.testing.assert_close(weights[:, 1], scores["sparsemax"][:, 1])
        with torch.no_grad():
            ours.alpha_logits.zero_()
        ours(*x)[0].square().sum().backward()
        assert (ours.alpha_logits.grad != 0).all()

    @pytest.mark.parametrize("normalizer", NORMALIZERS)
    def test_derivatives(self, normalizer):
        ours = SparseAttention(4, 2, dtype=D, batch_first=True, normalizer=normalizer)
        x = torch.randn(1, 3, 4, dtype=D, requires_grad=True)

        def output(x):
            return ours(x, x, x, need_weights=False)[0]

        assert gradcheck(output, (x,), check_forward_ad=True)
        assert gradgradcheck(output, (x,))
        names, values = zip(*ours.named_parameters(), strict=True)

        def of_parameters(*parameters):
            given = dict(zip(names, parameters, strict=True))
            return torch.func.functional_call(ours, given, (x.detach(),) * 3, {"need_weights": False})[0]

        assert gradcheck(of_parameters, values)

    def test_per_sample_gradients(self):
        _, ours = pair("entmax15", batch_first=True)
        x = torch.randn(N, L, E, dtype=D)
        parameters = {k: v.detach() for k, v in ours.named_parameters()}

        def loss(parameters, x):
            return torch.func.functional_call(ours, parameters, (x, x, x))[0].square().sum()

        found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
        for i in range(N):
            wanted = torch.func.grad(loss)(parameters, x[i])
            for name in parameters:
                torch.testing.assert_close(found[name][i], wanted[name])

    def test_any_function_of_scores(self):
        _, ours = pair(lambda scores: soft_topk(scores, 2) / 2, batch_first=True)
        _, weights = ours(*inputs(True))
        torch.testing.assert_close(weights.sum(-1), torch.ones(N, L, dtype=D))

    def test_in_an_encoder_layer(self):
        """In evaluation, torch's layer would like to compute softmax attention by itself."""
        layer = nn.TransformerEncoderLayer(E, H, 16, 0.0, batch_first=True, dtype=D)
        layer.self_attn = SparseAttention(E, H, batch_first=True, dtype=D, normalizer="sparsemax")
        x = 3 * torch.randn(N, L, E, dtype=D)
        trained = layer(x)
        with torch.inference_mode():
            torch.testing.assert_close(layer.eval()(x), trained)
        assert layer(x, src_key_padding_mask=padding()[:, :L]).shape == (N, L, E)
        with pytest.warns(UserWarning, match="enable_nested_tensor"):
            encoder = nn.TransformerEncoder(layer, 2)
        assert encoder.eval()(x, is_causal=True, mask=causal()[:, :L]).shape == (N, L, E)

    def test_autocast_and_bf16(self):
        ours = SparseAttention(E, H, batch_first=True)
        x = torch.randn(N, L, E)
        wanted, _ = ours(x, x, x)
        with torch.autocast("cpu", torch.bfloat16):
            found, _ = ours(x, x, x)
        torch.testing.assert_close(found.float(), wanted, rtol=0.05, atol=0.05)
        half = copy.deepcopy(ours).bfloat16()
        found, weights = half(x.bfloat16(), x.bfloat16(), x.bfloat16())
        assert found.dtype == weights.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), wanted, rtol=0.05, atol=0.05)

    @pytest.mark.parametrize("normalizer", NORMALIZERS)
    def test_copied_and_pickled(self, normalizer):
        _, ours = pair(normalizer, batch_first=True)
        x = inputs(True)
        for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):  # noqa: S301
            torch.testing.assert_close(again(*x)[0], ours(*x)[0])
        assert f"normalizer='{normalizer}'" in repr(ours)


def pair_output(normalizer, module, x, index=0, **arguments):
    _, other = pair(normalizer, batch_first=True)
    state = {k: v for k, v in module.state_dict().items() if k != "alpha_logits"}
    other.load_state_dict(state)
    return other(*x, **arguments)[index]


class TestErrors:
    def test_normalizer(self):
        with pytest.raises(ValueError, match=r"normalizer must be one of .*; got 'sparsmax'. Did you mean 'sparsemax'"):
            SparseAttention(E, H, normalizer="sparsmax")

    @pytest.mark.parametrize("normalizer", NORMALIZERS)
    def test_a_query_without_keys(self, normalizer):
        _, ours = pair(normalizer, batch_first=True)
        mask = causal()
        mask[2] = True
        with pytest.raises(ValueError, match="all keys are masked for query 2 of sample 0"):
            ours(*inputs(True), attn_mask=mask)
        everything = padding()
        everything[1] = True
        with pytest.raises(ValueError, match="all keys are masked for query 0 of sample 1"):
            ours(*inputs(True), key_padding_mask=everything)

    def test_shapes(self):
        _, ours = pair(batch_first=True)
        query, key, value = inputs(True)
        with pytest.raises(ValueError, match=r"value must have shape \(3, 5, 8\) .* got \(3, 4, 8\)"):
            ours(query, key, value[:, :4])
        with pytest.raises(ValueError, match=r"attn_mask must have shape \(6, 4, 5\) .* got \(3, 4, 5\)"):
            ours(query, key, value, attn_mask=causal().expand(3, L, S))
        with pytest.raises(ValueError, match=r"key_padding_mask must have shape \(3, 5\) .* got \(3, 4\)"):
            ours(query, key, value, key_padding_mask=padding()[:, :4])
        with pytest.raises(ValueError, match="two or three dimensions; got 1"):
            ours(query[0, 0], key, value)
        with pytest.raises(ValueError, match="pass the mask as well"):
            ours(query, key, value, is_causal=True)


def test_alphas_reach_the_map():
    _, ours = pair("entmax", batch_first=True)
    with torch.no_grad():
        ours.alpha_logits.copy_(torch.tensor([-1.0, 2.0]))
    x = inputs(True)
    scores = []
    _, probe = pair(lambda s: scores.append(s) or s.softmax(-1), batch_first=True)
    probe.load_state_dict({k: v for k, v in ours.state_dict().items() if k != "alpha_logits"})
    probe(*x)
    _, weights = ours(*x, average_attn_weights=False)
    torch.testing.assert_close(weights, entmax(scores[0], ours.alpha[:, None, None]))
