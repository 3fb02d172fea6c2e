"""A parser of sentences: every pair of words is scored as an arc, and a distribution over trees decides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from ...solvers.inference import DependencyTree
from ..registry import register_model
from ..tagging.encoder import SentenceEncoder
from ..tagging.words import encode_words, tokenize, word_lengths


class Parse(NamedTuple):
    """The most probable tree of a sentence.

    Attributes:
        words: of the sentence.
        heads: of each word, 0 for the root and h for the h-th word.
        relations: of each word to its head, an index.
        probabilities: of each word's arc, over all trees.
    """

    words: list[str]
    heads: list[int]
    relations: list[int]
    probabilities: list[float]


class BiaffineParser(SentenceEncoder):
    """A distribution over the dependency trees of a sentence, whose arcs are scored by a bidirectional LSTM.

    One word depends on the root, and arcs may cross. The relation of an arc is independent of the rest of the tree.

    Args:
        num_relations: how many relations there are.
        arc_dim: of the vectors that arcs are scored by.
        relation_dim: of those that relations are scored by.
        vocabulary: words that can have a vector of their own.
        word_dim: of these vectors.
        byte_dim: of the bytes' vectors.
        filters: convolutions over bytes of each width.
        widths: of these convolutions.
        hidden: units of each LSTM and direction.
        layers: LSTMs on top of one another.
        dropout: of words' vectors, and of what each layer returns; the same entries are dropped all over a sentence.
        word_dropout: share of the words that are taken for unknown ones in training.

    Source: Dozat and Manning 2017 (the scores); Koo et al. 2007 (the distribution, and its likelihood as the loss).
    """

    def __init__(
        self,
        *,
        num_relations: int = 36,
        arc_dim: int = 256,
        relation_dim: int = 64,
        vocabulary: int = 8192,
        word_dim: int = 64,
        byte_dim: int = 32,
        filters: int = 48,
        widths: tuple[int, ...] = (2, 3, 4),
        hidden: int = 160,
        layers: int = 2,
        dropout: float = 0.33,
        word_dropout: float = 0.2,
    ) -> None:
        super().__init__(
            vocabulary=vocabulary, word_dim=word_dim, byte_dim=byte_dim, filters=filters, widths=widths, hidden=hidden,
            layers=layers, dropout=dropout, word_dropout=word_dropout,
        )  # fmt: skip
        self.num_relations, self.arc_dim, self.relation_dim = num_relations, arc_dim, relation_dim
        self.root = nn.Parameter(torch.randn(self.features) * 0.1)
        self.heads = nn.Linear(self.features, arc_dim + relation_dim)
        self.dependents = nn.Linear(self.features, arc_dim + relation_dim)
        # The last row is of heads whatever the dependent, the last column of relations the other way around.
        self.arcs = nn.Parameter(torch.zeros(arc_dim, arc_dim + 1))
        self.relations = nn.Parameter(torch.zeros(num_relations, relation_dim + 1, relation_dim + 1))

    def forward(self, words: UInt8[Tensor, "..."]) -> Float[Tensor, "batch heads dependents"]:
        """Scores of every arc of what `encode_words` made, as `DependencyTree` takes them.

        Raises:
            ValueError: not what `encode_words` returns, or a sentence without words.
        """
        return self._arcs(*self._sides(words))

    def distribution(self, words: UInt8[Tensor, "batch length width"]) -> DependencyTree:
        """Of the trees of these sentences."""
        return self._trees(self(words), words)

    def log_likelihood(
        self, words: UInt8[Tensor, "batch length width"], trees: Int[Tensor, "batch length 2"]
    ) -> Float[Tensor, " batch"]:
        """Of these trees, each word's head and relation, whatever they are beyond a sentence.

        Raises:
            ValueError: heads that are no tree, or relations that there are not.
        """
        heads, relations = trees.unbind(2)
        inside = words[..., 0] != 0
        wrong = inside & ((relations < 0) | (relations >= self.num_relations))
        if bool(wrong.any()):
            place = tuple(wrong.nonzero()[0].tolist())
            raise ValueError(
                f"{type(self).__name__}: the relation at {place} is {int(relations[place])}; expected 0 to "
                f"{self.num_relations - 1}."
            )
        governing, depending = self._sides(words)
        tree = self._trees(self._arcs(governing, depending), words).log_prob(heads.where(inside, -1))
        scores = self._relations(governing, depending, heads.where(inside, 0)).log_softmax(2)
        named = scores.gather(2, relations.where(inside, 0).unsqueeze(2)).squeeze(2)
        return tree + torch.where(inside, named, 0.0).sum(1)

    def decode(self, words: UInt8[Tensor, "batch length width"]) -> Int[Tensor, "batch length 2"]:
        """Heads of the most probable tree, and the most probable relations of its arcs; -1 beyond the sentence."""
        governing, depending = self._sides(words)
        return self._decoded(governing, depending, self._trees(self._arcs(governing, depending), words).argmax)

    @torch.no_grad()
    def parse(self, sentences: Sequence[str | Sequence[str]]) -> list[Parse]:
        """Parse sentences.

        Args:
            sentences: each as text, which `tokenize` takes apart, or as its words.

        Raises:
            ValueError: a sentence without words.
        """
        split = [tokenize(s) if isinstance(s, str) else list(s) for s in sentences]
        words = encode_words(split).to(self.root.device)
        governing, depending = self._sides(words)
        trees = self._trees(self._arcs(governing, depending), words)
        heads, relations = self._decoded(governing, depending, trees.argmax).unbind(2)
        shares = trees.marginals[:, :, 1:].gather(1, heads.clamp(min=0).unsqueeze(1)).squeeze(1)
        return [
            Parse(w, heads[i, : len(w)].tolist(), relations[i, : len(w)].tolist(), shares[i, : len(w)].tolist())
            for i, w in enumerate(split)
        ]

    def _sides(self, words: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors of root and words as heads, and of words as dependents."""
        x = self.encode(words)
        nodes = torch.cat([self.root.expand(len(x), 1, -1), x], 1)
        activate = nn.functional.leaky_relu
        return self._dropped(activate(self.heads(nodes), 0.1)), self._dropped(activate(self.dependents(x), 0.1))

    def _arcs(self, governing: Tensor, depending: Tensor) -> Tensor:
        one = torch.nn.functional.pad(depending[..., : self.arc_dim], (0, 1), value=1.0)
        scores = (governing[..., : self.arc_dim] @ self.arcs) @ one.mT
        return torch.nn.functional.pad(scores, (1, 0))

    def _relations(self, governing: Tensor, depending: Tensor, heads: Tensor) -> Tensor:
        """Scores (batch, length, relations) of the relations of these arcs."""
        index = heads.unsqueeze(2).expand(-1, -1, self.relation_dim)
        above = governing[..., self.arc_dim :].gather(1, index)
        above, below = (torch.nn.functional.pad(x, (0, 1), value=1.0) for x in (above, depending[..., self.arc_dim :]))
        # The products of the two vectors' entries, and then one product of matrices.
        pairs = (above.unsqueeze(3) * below.unsqueeze(2)).flatten(2)
        return pairs @ self.relations.flatten(1).mT

    def _trees(self, arcs: Tensor, words: Tensor) -> DependencyTree:
        return DependencyTree(arcs, word_lengths(words), projective=False)

    def _decoded(self, governing: Tensor, depending: Tensor, heads: Tensor) -> Tensor:
        best = self._relations(governing, depending, heads.clamp(min=0)).argmax(2)
        return torch.stack([heads, best.where(heads >= 0, -1)], 2)


@register_model(family="biaffine", task="parsing", accepts=BiaffineParser)
def biaffine_small(**arguments: Any) -> BiaffineParser:
    """A dependency parser: words and bytes, two bidirectional LSTMs of 160 units, a distribution over trees."""
    return BiaffineParser(**arguments)
