"""A tagger of sentences: words and their spelling, a bidirectional LSTM, a conditional random field."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from ...solvers.inference import LinearChain
from ..attention.crf import CRF
from ..registry import register_model
from .encoder import SentenceEncoder
from .entities import bio_moves
from .words import encode_words, tokenize, word_lengths


class BiLSTMCRF(SentenceEncoder):
    """A bidirectional LSTM over words, whose tags are those of a `CRF`.

    Args:
        num_tags: how many tags there are.
        bio: tags say where names begin: 0 is outside of any, 2 k + 1 begins one of kind k, and 2 k + 2 goes on with it
            and can follow these two alone.
        outside_cost: what decoding takes off the score of tag 0 at every word: where most words are outside, the most
            probable tags miss names that a little less certainty would find. To be chosen on a development set, and
            with `bio` alone; likelihoods and probabilities know nothing of it.
        vocabulary: words that can have a vector of their own.
        word_dim: of these vectors.
        byte_dim: of the bytes' vectors.
        filters: convolutions over bytes of each width.
        widths: of these convolutions.
        hidden: units of each LSTM and direction.
        layers: LSTMs on top of one another.
        dropout: of words' vectors, and of what each LSTM returns; the same entries are dropped all over a sentence.
        word_dropout: share of the words that are taken for unknown ones in training.

    Raises:
        ValueError: with `bio`, a number of tags that is not odd; without, an `outside_cost`.

    Source: Huang, Xu and Yu 2015; Ma and Hovy 2016; on decoding for recall: Minkov, Wang, Tomasic and Cohen 2006.
    """

    def __init__(
        self,
        *,
        num_tags: int = 17,
        bio: bool = False,
        outside_cost: float = 0.0,
        vocabulary: int = 8192,
        word_dim: int = 64,
        byte_dim: int = 32,
        filters: int = 48,
        widths: tuple[int, ...] = (2, 3, 4),
        hidden: int = 160,
        layers: int = 2,
        dropout: float = 0.4,
        word_dropout: float = 0.15,
    ) -> None:
        super().__init__(
            vocabulary=vocabulary, word_dim=word_dim, byte_dim=byte_dim, filters=filters, widths=widths, hidden=hidden,
            layers=layers, dropout=dropout, word_dropout=word_dropout,
        )  # fmt: skip
        if outside_cost and not bio:
            raise ValueError(f"BiLSTMCRF: outside_cost {outside_cost} needs bio=True, where tag 0 is outside of names.")
        self.num_tags, self.bio, self.outside_cost = num_tags, bio, outside_cost
        self.emissions = nn.Linear(self.features, num_tags)
        self.crf = CRF(num_tags, allowed=bio_moves(num_tags) if bio else None)

    def forward(self, words: UInt8[Tensor, "..."]) -> Float[Tensor, "batch length tags"]:
        """Scores of every tag at every position of what `encode_words` made; beyond a sentence they mean nothing.

        Raises:
            ValueError: not what `encode_words` returns, or a sentence without words.
        """
        return self.emissions(self.encode(words))

    def distribution(self, words: UInt8[Tensor, "batch length width"]) -> LinearChain:
        """Of the tags of these sentences."""
        return self.crf.distribution(self(words), word_lengths(words))

    def log_likelihood(
        self, words: UInt8[Tensor, "batch length width"], tags: Int[Tensor, "batch length"]
    ) -> Float[Tensor, " batch"]:
        """Of these tags, whatever they are beyond a sentence."""
        return self.crf(self(words), tags, word_lengths(words))

    def decode(self, words: UInt8[Tensor, "batch length width"]) -> Int[Tensor, "batch length"]:
        """The most probable tags after what `outside_cost` takes off, -1 beyond a sentence."""
        return self._decoded(self(words), words)

    @torch.no_grad()
    def tag(self, sentences: Sequence[str | Sequence[str]]) -> list[tuple[list[str], list[int], list[float]]]:
        """Tag sentences.

        Args:
            sentences: each as text, which `tokenize` takes apart, or as its words.

        Returns:
            For each sentence its words, their tags as `decode` finds them, and the marginal probability of each tag.

        Raises:
            ValueError: a sentence without words.
        """
        split = [tokenize(s) if isinstance(s, str) else list(s) for s in sentences]
        words = encode_words(split).to(self.emissions.weight.device)
        scores = self(words)
        tags, shares = self._decoded(scores, words), self.crf.marginals(scores, word_lengths(words))
        sure = shares.gather(2, tags.clamp(min=0).unsqueeze(2)).squeeze(2)
        return [
            (found, tags[i, : len(found)].tolist(), sure[i, : len(found)].tolist()) for i, found in enumerate(split)
        ]

    def _decoded(self, scores: Tensor, words: Tensor) -> Tensor:
        if self.outside_cost:
            scores = torch.cat([scores[..., :1] - self.outside_cost, scores[..., 1:]], -1)
        return self.crf.decode(scores, word_lengths(words))


@register_model(family="bilstm_crf", task="tagging", accepts=BiLSTMCRF)
def bilstm_crf_small(**arguments: Any) -> BiLSTMCRF:
    """A part-of-speech tagger: words and bytes, two bidirectional LSTMs of 160 units, a CRF."""
    return BiLSTMCRF(**arguments)


@register_model(family="bilstm_crf", task="entity-recognition", accepts=BiLSTMCRF)
def bilstm_crf_entities(**arguments: Any) -> BiLSTMCRF:
    """A finder of names and their kinds: words and bytes, a bidirectional LSTM, a CRF of well-formed tags alone."""
    return BiLSTMCRF(**{"num_tags": 13, "bio": True, "layers": 1, "dropout": 0.5, "word_dropout": 0.25, **arguments})
