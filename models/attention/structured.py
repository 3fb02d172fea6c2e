"""Multi-head attention whose weights are the marginals of a structure, where torch's is used."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from ...solvers.options import suggest
from ...solvers.transforms import any_true, plain
from .structures import Chain, Segments, Structure, Tree

STRUCTURES = ("chain", "semi-markov", "tree", "projective-tree")


class StructuredAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` that attends to parts of a structure instead of to single keys.

    Constructor and forward pass take what torch's take and mean the same, and the projections have the same names and
    shapes. A key's score no longer competes with all others by a softmax. It is a potential of a distribution over

    - "chain": subsets of the keys, in which neighbours like to agree;
    - "semi-markov": segments of neighbouring keys that are chosen as a whole;
    - "tree", "projective-tree": trees over the sequence; a query attends to its head. For self-attention only.

    and its weight is the probability of being chosen. What the structures learn themselves is in `structure`.

    Args:
        embed_dim: length of queries and of the output.
        num_heads: attention heads; divides `embed_dim`.
        dropout: probability that a weight is dropped in training.
        bias: whether the four projections have a bias.
        add_bias_kv, add_zero_attn: must be False; an appended key would have no place in the structure.
        kdim: length of keys; None for `embed_dim`.
        vdim: length of values; None for `embed_dim`.
        batch_first: sequences are (batch, length, features) instead of (length, batch, features).
        device: of the parameters.
        dtype: of the parameters.
        structure: one of the above.
        longest: keys that a segment of "semi-markov" can have.
        normalize: divide the probabilities of "chain" and "semi-markov" by their sum over the keys, so that the output
            does not grow with their number; without, it is the expected sum of the chosen values. Those of a tree sum
            to one with the root.

    Raises:
        ValueError: an unknown structure, `longest` below 1, or an appended key.

    Source: Kim, Denton, Hoang and Rush 2017; Vaswani et al. 2017, section 3.2 (heads and projections).
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
        structure: str = "chain",
        longest: int = 4,
        normalize: bool = True,
    ) -> None:
        if structure not in STRUCTURES:
            raise ValueError(
                f"StructuredAttention: structure must be one of {', '.join(map(repr, STRUCTURES))}; "
                f"got {structure!r}.{suggest(str(structure), list(STRUCTURES))}"
            )
        if longest < 1:
            raise ValueError(f"StructuredAttention: longest must be at least 1; got {longest}.")
        if add_bias_kv or add_zero_attn:
            raise ValueError("StructuredAttention: an appended key (add_bias_kv, add_zero_attn) has no place in it.")
        super().__init__(
            embed_dim, num_heads, dropout, bias, False, False, kdim, vdim, batch_first, device, dtype
        )  # fmt: skip
        # By this torch's encoder layers decide whether to compute attention by a kernel of their own, with softmax.
        self._qkv_same_embed_dim = False
        self.normalize = normalize and not structure.endswith("tree")
        self.structure: Structure
        if structure == "chain":
            self.structure = Chain(num_heads, device, dtype)
        elif structure == "semi-markov":
            self.structure = Segments(num_heads, longest, device, dtype)
        else:
            self.structure = Tree(num_heads, self.head_dim, structure == "projective-tree", device, dtype)

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
            key_padding_mask: (batch, keys), or (keys,) of one sequence: True, or minus infinity, takes a key out of the
                sequence, so that its neighbours are neighbours; other numbers are added to its scores.
            need_weights: return the weights, too.
            attn_mask: (queries, keys) or (batch * heads, queries, keys): True keeps a query from choosing a key, which
                stays where it is in the sequence; numbers are added to the score.
            average_attn_weights: return the weights' mean over the heads.
            is_causal: says that `attn_mask` is causal; changes nothing, since the mask is applied in any case.

        Returns:
            The output, in the layout of `query`, and None or the weights: (batch, queries, keys), or (batch, heads,
            queries, keys) without the average. Of one sequence both lack the batch. In a tree the weights of queries
            that are padding themselves are zero.

        Raises:
            ValueError: shapes and dtypes that do not fit, and the message says which, what was expected and what was
                got; a query whose keys are all excluded; masks that leave no tree; scores of NaN or plus infinity.
        """
        if is_causal and attn_mask is None:
            raise ValueError("StructuredAttention: is_causal only says what attn_mask is; pass the mask as well.")
        single = query.ndim == 2
        if single:
            query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first and query.ndim == 3:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        self._check(query, key, value, key_padding_mask, attn_mask)

        q, k, v = (self._heads(x) for x in self._projected(query, key, value))
        scores = (q * math.sqrt(1 / self.head_dim)) @ k.mT
        weights = self._weights(scores, q, key_padding_mask, attn_mask)
        weights = functional.dropout(weights, self.dropout, self.training)
        output = self.out_proj((weights.to(v.dtype) @ v).transpose(1, 2).flatten(2))

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
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}"

    def _weights(self, scores: Tensor, q: Tensor, padding: Tensor | None, attn_mask: Tensor | None) -> Tensor:
        if attn_mask is not None:
            scores = _apply(scores, attn_mask if attn_mask.ndim == 2 else attn_mask.unflatten(0, scores.shape[:2]))
        if padding is not None and padding.dtype != torch.bool:
            gone = torch.isneginf(padding)
            scores, padding = scores + padding.masked_fill(gone, 0.0)[:, None, None], gone
        self._some_key(scores, padding)
        self._real(scores, padding)
        if padding is None:
            return self._normalized(self.structure(scores, q, None))
        # The keys that there are come first, and their number is what the structure knows.
        order = padding.long().argsort(dim=1, stable=True)
        back = order.argsort(dim=1)
        scores = scores.gather(3, order[:, None, None].expand(scores.shape))
        if self.structure.square:
            rows = order[:, None, :, None]
            scores, q = scores.gather(2, rows.expand(scores.shape)), q.gather(2, rows.expand(q.shape))
        weights = self.structure(scores, q, (~padding).sum(1))
        if self.structure.square:
            weights = weights.gather(2, back[:, None, :, None].expand(weights.shape))
        return self._normalized(weights.gather(3, back[:, None, None].expand(weights.shape)))

    def _normalized(self, weights: Tensor) -> Tensor:
        if not self.normalize:
            return weights
        # A query that chooses next to nothing gets next to nothing, rather than a quotient of numbers that underflow.
        least = torch.finfo(weights.dtype).tiny ** 0.5
        return weights / weights.sum(-1, keepdim=True).clamp(min=least)

    def _some_key(self, scores: Tensor, padding: Tensor | None) -> None:
        excluded = torch.isneginf(scores.detach())
        if padding is not None:
            excluded = excluded | padding[:, None, None]
        empty = excluded.all(-1)
        if self.structure.square:
            # A position may be left with the root alone.
            empty = empty.all(-1) if padding is not None else torch.zeros_like(empty[..., 0])
        if any_true(empty):
            sample = int(plain(empty).nonzero()[0][-3 if empty.ndim == 3 else -2])
            raise ValueError(f"StructuredAttention: the masks leave no key to some query of sample {sample}.")

    def _real(self, scores: Tensor, padding: Tensor | None) -> None:
        """Refuse NaN and plus infinity where they count, in the terms of who passed them."""
        if bool(plain(scores.detach()).amax() < torch.inf):
            return
        wrong = ~(scores.detach() < torch.inf)
        if padding is not None:
            wrong = wrong & ~padding[:, None, None]
            if self.structure.square:
                wrong = wrong & ~padding[:, None, :, None]
        if any_true(wrong):
            sample, head, query, key = plain(wrong).nonzero()[0].tolist()[-4:]
            raise ValueError(
                f"StructuredAttention: the score of key {key} for query {query} of sample {sample}, head {head}, is "
                "NaN or plus infinity; look at query, key and the masks."
            )

    def _check(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None, attn_mask: Tensor | None
    ) -> None:
        """Tensors with the batch in front."""
        if query.ndim != 3:
            raise ValueError(f"StructuredAttention: query must have two or three dimensions; got {query.ndim}.")
        for name, tensor in (("key", key), ("value", value)):
            if tensor.ndim != 3:
                raise ValueError(
                    f"StructuredAttention: {name} must have as many dimensions as query; got {tuple(tensor.shape)} and "
                    f"{tuple(query.shape)} once the batch is in front."
                )
        batch, queries = query.shape[:2]
        keys = key.shape[1]
        if 0 in (batch, queries, keys):
            raise ValueError(
                f"StructuredAttention: there must be a sample, a query and a key; got query {tuple(query.shape)} and "
                f"key {tuple(key.shape)}."
            )
        for name, mask in (("key_padding_mask", key_padding_mask), ("attn_mask", attn_mask)):
            if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
                raise ValueError(
                    f"StructuredAttention: {name} must be boolean, True for what is excluded, or of floating-point "
                    f"numbers to add; got {mask.dtype}."
                )
        wanted: list[tuple[str, Tensor, tuple[int, ...]]] = [
            ("query", query, (batch, queries, self.embed_dim)),
            ("key", key, (batch, queries if self.structure.square else keys, self.kdim)),
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
                    f"StructuredAttention: {name} must have shape {shape} once the batch is in front; "
                    f"got {tuple(tensor.shape)}."
                )

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return [functional.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True)]

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)


def _apply(scores: Tensor, mask: Tensor) -> Tensor:
    return scores.masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
