"""Multi-head attention with weights that can be exactly zero, where torch's is used."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from ...solvers import entmax, entmax15, sparsemax
from ...solvers.options import suggest
from ...solvers.transforms import any_true, plain

Normalizer = Callable[[Tensor], Tensor]

NORMALIZERS: dict[str, Normalizer] = {
    "softmax": lambda scores: scores.softmax(-1),
    "sparsemax": sparsemax,
    "entmax15": entmax15,
}
LEARNT = "entmax"


class SparseAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` whose weights come from `sparsemax`, `entmax15` or an alpha-entmax that is learnt.

    Constructor and forward pass take what torch's take and mean the same, and the parameters have the same names and
    shapes, so that its weights can be loaded. With `normalizer="softmax"` it computes the same. It can stand in
    `torch.nn.TransformerEncoderLayer` and its like as `self_attn`.

    With `normalizer="entmax"`, every head has an alpha of its own between 1 (softmax) and 2 (sparsemax), the parameter
    `alpha_logits`; it starts at 1.5.

    Args:
        embed_dim: length of queries and of the output.
        num_heads: attention heads; divides `embed_dim`.
        dropout: probability that a weight is dropped in training.
        bias: whether the four projections have a bias.
        add_bias_kv: append a learnt key and value to the sequence.
        add_zero_attn: append a zero key and value to the sequence.
        kdim: length of keys; None for `embed_dim`.
        vdim: length of values; None for `embed_dim`.
        batch_first: sequences are (batch, length, features) instead of (length, batch, features).
        device: of the parameters.
        dtype: of the parameters.
        normalizer: "softmax", "sparsemax", "entmax15", "entmax", or a function of scores (batch, heads, queries, keys),
            -inf where masked, that returns weights of that shape.

    Raises:
        ValueError: an unknown normalizer.

    Source: Vaswani et al. 2017, section 3.2; Peters, Niculae and Martins 2019; Correia, Niculae and Martins 2019
    (one alpha a head).
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        normalizer: str | Normalizer = "entmax15",
    ) -> None:
        known = [*NORMALIZERS, LEARNT]
        if isinstance(normalizer, str) and normalizer not in known:
            raise ValueError(
                f"SparseAttention: normalizer must be one of {', '.join(map(repr, known))}, or a function; "
                f"got {normalizer!r}.{suggest(normalizer, known)}"
            )
        super().__init__(
            embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        # By this torch's encoder layers decide whether to compute attention by a kernel of their own, with softmax.
        self._qkv_same_embed_dim = False
        self.normalizer = normalizer
        if normalizer == LEARNT:
            self.alpha_logits = nn.Parameter(torch.zeros(num_heads, device=device, dtype=dtype))
        else:
            self.register_parameter("alpha_logits", None)

    @property
    def alpha(self) -> Tensor | None:
        """The alpha of every head (heads,), where it is learnt."""
        return None if self.alpha_logits is None else 1 + self.alpha_logits.sigmoid()

    def forward(
        self,
        query: Float[Tensor, "..."],
        key: Float[Tensor, "..."],
        value: Float[Tensor, "..."],
        key_padding_mask: Float[Tensor, "..."] | Bool[Tensor, "..."] | None = None,
        need_weights: bool = True,
        attn_mask: Float[Tensor, "..."] | Bool[Tensor, "..."] | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Float[Tensor, "..."], Float[Tensor, "..."] | None]:
        """Attend to `key` and `value` from `query`.

        Args:
            query: (batch, queries, embed_dim) with `batch_first`, (queries, batch, embed_dim) without, or one sequence
                (queries, embed_dim).
            key: the same with `keys` and `kdim`.
            value: the same with `keys` and `vdim`.
            key_padding_mask: (batch, keys), or (keys,) of one sequence: True excludes a key; numbers are added to its
                scores.
            need_weights: return the weights, too.
            attn_mask: (queries, keys) or (batch * heads, queries, keys): True excludes a pair; numbers are added to
                its score.
            average_attn_weights: return the weights' mean over the heads.
            is_causal: says that `attn_mask` is causal; changes nothing, since the mask is applied in any case.

        Returns:
            The output, in the layout of `query`, and None or the weights: (batch, queries, keys), or (batch, heads,
            queries, keys) without the average. Of one sequence both lack the batch.

        Raises:
            ValueError: shapes that do not fit, and the message says which, what was expected and what was got; a query
                whose keys are all excluded.
        """
        if is_causal and attn_mask is None:
            raise ValueError("SparseAttention: is_causal only says what attn_mask is; pass the mask as well.")
        single = query.ndim == 2
        if single:
            query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = _transposed(query, key, value)
        self._check(query, key, value, key_padding_mask, attn_mask)

        q, k, v = (self._heads(t) for t in self._appended(*self._projected(query, key, value)))
        scores = (q * math.sqrt(1 / self.head_dim)) @ k.mT
        scores = self._masked(scores, key_padding_mask, attn_mask)
        weights = functional.dropout(self._weights(scores), self.dropout, self.training)
        mixed = (weights @ v.to(weights.dtype)).transpose(1, 2).flatten(2)
        output = self.out_proj(mixed)

        if single:
            output = output.squeeze(0)
        elif not self.batch_first:
            output = output.transpose(0, 1)
        if not need_weights:
            return output, None
        shown = weights.mean(1) if average_attn_weights else weights
        return output, shown.squeeze(0) if single else shown

    def extra_repr(self) -> str:
        """What torch's representation leaves out."""
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, normalizer={self.normalizer!r}"

    def _check(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None
    ) -> None:
        """Tensors with the batch in front."""
        if query.ndim != 3:
            raise ValueError(f"SparseAttention: query must have two or three dimensions; got {query.ndim}.")
        batch, queries = query.shape[:2]
        keys = key.shape[1] if key.ndim == 3 else -1
        wanted: list[tuple[str, Tensor, tuple[int, ...]]] = [
            ("query", query, (batch, queries, self.embed_dim)),
            ("key", key, (batch, keys, self.kdim)),
            ("value", value, (batch, keys, self.vdim)),
        ]
        if key_padding_mask is not None:
            wanted.append(("key_padding_mask", key_padding_mask, (batch, keys)))
        if attn_mask is not None:
            lead = () if attn_mask.ndim == 2 else (batch * self.num_heads,)
            wanted.append(("attn_mask", attn_mask, (*lead, queries, keys)))
        for name, tensor, shape in wanted:
            if tensor.shape != shape:
                raise ValueError(
                    f"SparseAttention: {name} must have shape {shape} once the batch is in front; "
                    f"got {tuple(tensor.shape)}."
                )

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        if self.in_proj_weight is not None and query is key is value:
            return functional.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        inputs = (query, key, value)
        return tuple(functional.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True))

    def _appended(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        batch = k.shape[0]
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.to(k.dtype).expand(batch, 1, -1)], 1)
            v = torch.cat([v, self.bias_v.to(v.dtype).expand(batch, 1, -1)], 1)
        if self.add_zero_attn:
            k = torch.cat([k, torch.zeros_like(k[:, :1])], 1)
            v = torch.cat([v, torch.zeros_like(v[:, :1])], 1)
        return q, k, v

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _masked(self, scores: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None) -> Tensor:
        """Scores (batch, heads, queries, keys), -inf where masked."""
        if key_padding_mask is None and attn_mask is None:
            return scores
        batch, heads = scores.shape[:2]
        if key_padding_mask is not None:
            scores = _apply(scores, key_padding_mask[:, None, None])
        if attn_mask is not None:
            scores = _apply(scores, attn_mask if attn_mask.ndim == 2 else attn_mask.unflatten(0, (batch, heads)))
        excluded = plain(torch.isneginf(scores.detach()).all(-1))
        if any_true(excluded):
            sample, _, position = excluded.nonzero()[0].tolist()[-3:]
            raise ValueError(f"SparseAttention: all keys are masked for query {position} of sample {sample}.")
        return scores

    def _weights(self, scores: Tensor) -> Tensor:
        alpha = self.alpha
        if alpha is not None:
            return entmax(scores, alpha[:, None, None])
        return NORMALIZERS[self.normalizer](scores) if isinstance(self.normalizer, str) else self.normalizer(scores)


def _transposed(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Batch and sequence swapped; what was one tensor stays one."""
    q = query.transpose(0, 1)
    k = q if key is query else key.transpose(0, 1)
    v = q if value is query else k if value is key else value.transpose(0, 1)
    return q, k, v


def _apply(scores: Tensor, mask: Tensor) -> Tensor:
    """The mask applied; appended keys, which it does not know, are not masked."""
    more = scores.shape[-1] - mask.shape[-1]
    if mask.dtype == torch.bool:
        return scores.masked_fill(functional.pad(mask, (0, more), value=False), -torch.inf)
    return scores + functional.pad(mask, (0, more))
