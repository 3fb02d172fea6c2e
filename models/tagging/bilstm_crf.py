"""A tagger of sentences: words and their spelling, a bidirectional LSTM, a conditional random field."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from ...solvers.inference import LinearChain
from ..attention.crf import CRF
from ..registry import register_model
from .words import Vocabulary, WordCharacters, encode_words, tokenize, word_lengths


class BiLSTMCRF(nn.Module):
    """A bidirectional LSTM over words, whose tags are those of a `CRF`.

    A word is what `encode_words` makes of it, and is seen in two ways: as one of a vocabulary, which `fit` fills, and
    as a string of bytes.

    Args:
        num_tags: how many tags there are.
        vocabulary: words that can have a vector of their own.
        word_dim: of these vectors.
        byte_dim: of the bytes' vectors.
        filters: convolutions over bytes of each width.
        widths: of these convolutions.
        hidden: units of each LSTM and direction.
        layers: LSTMs on top of one another.
        dropout: of words' vectors, and of what each LSTM returns; the same entries are dropped all over a sentence.
        word_dropout: share of the words that are taken for unknown ones in training.

    Source: Huang, Xu and Yu 2015; Ma and Hovy 2016; the dropout: Gal and Ghahramani 2016.
    """

    def __init__(
        self,
        *,
        num_tags: int = 17,
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
        super().__init__()
        self.num_tags, self.dropout = num_tags, dropout
        self.vocabulary = Vocabulary(vocabulary, word_dim, word_dropout)
        self.characters = WordCharacters(byte_dim, filters, widths)
        sizes = [word_dim + self.characters.dim] + [2 * hidden] * layers
        self.lstms = nn.ModuleList(
            nn.LSTM(size, hidden, batch_first=True, bidirectional=True) for size in sizes[:layers]
        )
        for lstm in self.lstms:
            for name, parameter in lstm.named_parameters():
                if name.startswith("weight_hh"):
                    for gate in parameter.data.chunk(4):
                        nn.init.orthogonal_(gate)
        self.emissions = nn.Linear(sizes[-1], num_tags)
        self.crf = CRF(num_tags)

    def fit(self, words: UInt8[Tensor, "tokens width"]) -> None:
        """Fill the vocabulary with the words of a corpus; one that is filled is left as it is."""
        if not self.vocabulary.fitted:
            self.vocabulary.fit(words)

    def forward(self, words: UInt8[Tensor, "..."]) -> Float[Tensor, "batch length tags"]:
        """Scores of every tag at every position of what `encode_words` made; beyond a sentence they mean nothing.

        Raises:
            ValueError: not what `encode_words` returns, or a sentence without words.
        """
        if words.ndim != 3 or words.dtype != torch.uint8:
            raise ValueError(
                f"BiLSTMCRF: expected bytes of shape (batch, length, width), got {words.dtype} {tuple(words.shape)}."
            )
        lengths = word_lengths(words)
        if bool((lengths == 0).any()):
            raise ValueError(f"BiLSTMCRF: sentence {int((lengths == 0).nonzero()[0])} has no words.")
        inside = words[..., 0] != 0
        # Words are spelt the same wherever they stand.
        tokens, which = words[inside].unique(dim=0, return_inverse=True)
        spelt = words.new_zeros(*words.shape[:2], self.characters.dim, dtype=self.emissions.weight.dtype)
        spelt = spelt.masked_scatter(inside.unsqueeze(2), self.characters(tokens)[which])
        x = self._dropped(torch.cat([self.vocabulary(words), spelt], 2))
        ends = lengths.cpu()
        for lstm in self.lstms:
            packed = pack_padded_sequence(x, ends, batch_first=True, enforce_sorted=False)
            x, _ = pad_packed_sequence(lstm(packed)[0], batch_first=True, total_length=words.shape[1])
            x = self._dropped(x)
        return self.emissions(x)

    def distribution(self, words: UInt8[Tensor, "batch length width"]) -> LinearChain:
        """Of the tags of these sentences."""
        return self.crf.distribution(self(words), word_lengths(words))

    def log_likelihood(
        self, words: UInt8[Tensor, "batch length width"], tags: Int[Tensor, "batch length"]
    ) -> Float[Tensor, " batch"]:
        """Of these tags, whatever they are beyond a sentence."""
        return self.crf(self(words), tags, word_lengths(words))

    def decode(self, words: UInt8[Tensor, "batch length width"]) -> Int[Tensor, "batch length"]:
        """The most probable tags, -1 beyond a sentence."""
        return self.crf.decode(self(words), word_lengths(words))

    @torch.no_grad()
    def tag(self, sentences: Sequence[str | Sequence[str]]) -> list[tuple[list[str], list[int], list[float]]]:
        """Tag sentences.

        Args:
            sentences: each as text, which `tokenize` takes apart, or as its words.

        Returns:
            For each sentence its words, the most probable tags, and the marginal probability of each of them.

        Raises:
            ValueError: a sentence without words.
        """
        split = [tokenize(s) if isinstance(s, str) else list(s) for s in sentences]
        chain = self.distribution(encode_words(split).to(self.emissions.weight.device))
        tags, shares = chain.argmax, chain.marginals.states
        sure = shares.gather(2, tags.clamp(min=0).unsqueeze(2)).squeeze(2)
        return [
            (words, tags[i, : len(words)].tolist(), sure[i, : len(words)].tolist()) for i, words in enumerate(split)
        ]

    def _dropped(self, x: Tensor) -> Tensor:
        if not self.training or self.dropout == 0:
            return x
        keep = 1 - self.dropout
        return x * x.new_empty(len(x), 1, x.shape[2]).bernoulli_(keep).div_(keep)


@register_model(family="bilstm_crf", task="tagging", accepts=BiLSTMCRF)
def bilstm_crf_small(**arguments: Any) -> BiLSTMCRF:
    """A part-of-speech tagger: words and bytes, two bidirectional LSTMs of 160 units, a CRF."""
    return BiLSTMCRF(**arguments)
