"""Words in their sentence: what taggers and parsers read."""

from __future__ import annotations

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from .words import Vocabulary, WordCharacters, word_lengths


class SentenceEncoder(nn.Module):
    """A bidirectional LSTM over words, each of which is one of a vocabulary, which `fit` fills, and a string of bytes.

    Args:
        vocabulary: words that can have a vector of their own.
        word_dim: of these vectors.
        byte_dim: of the bytes' vectors.
        filters: convolutions over bytes of each width.
        widths: of these convolutions.
        hidden: units of each LSTM and direction.
        layers: LSTMs on top of one another.
        dropout: of words' vectors, and of what each LSTM returns; the same entries are dropped all over a sentence.
        word_dropout: share of the words that are taken for unknown ones in training.

    Source: Graves and Schmidhuber 2005; Ma and Hovy 2016; the dropout: Gal and Ghahramani 2016.
    """

    def __init__(
        self,
        *,
        vocabulary: int,
        word_dim: int,
        byte_dim: int,
        filters: int,
        widths: tuple[int, ...],
        hidden: int,
        layers: int,
        dropout: float,
        word_dropout: float,
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.vocabulary = Vocabulary(vocabulary, word_dim, word_dropout)
        self.characters = WordCharacters(byte_dim, filters, widths)
        sizes = [word_dim + self.characters.dim] + [2 * hidden] * layers
        self.features = sizes[-1]
        self.lstms = nn.ModuleList(
            nn.LSTM(size, hidden, batch_first=True, bidirectional=True) for size in sizes[:layers]
        )
        for lstm in self.lstms:
            for name, parameter in lstm.named_parameters():
                if name.startswith("weight_hh"):
                    for gate in parameter.data.chunk(4):
                        nn.init.orthogonal_(gate)

    def fit(self, words: UInt8[Tensor, "tokens width"]) -> None:
        """Fill the vocabulary with the words of a corpus; one that is filled is left as it is."""
        if not self.vocabulary.fitted:
            self.vocabulary.fit(words)

    @torch.no_grad()
    def start_from(self, other: SentenceEncoder) -> None:
        """Take over the words, their vectors, the spelling and the LSTMs of an encoder of the same sizes.

        What stands on top of them stays as it is.

        Raises:
            ValueError: the other one has another vocabulary, or other sizes; the message names the first.
        """
        for part in ("vocabulary", "characters", "lstms"):
            mine, theirs = getattr(self, part).state_dict(), getattr(other, part).state_dict()
            for name in sorted(mine.keys() | theirs.keys()):
                ours, given = (tuple(d[name].shape) if name in d else None for d in (mine, theirs))
                if ours != given:
                    raise ValueError(f"start_from: {part}.{name} is {given} in the other encoder, and {ours} in this.")
            getattr(self, part).load_state_dict(theirs)

    def encode(self, words: UInt8[Tensor, "..."]) -> Float[Tensor, "batch length features"]:
        """Every word of what `encode_words` made, in its sentence; beyond a sentence they mean nothing.

        Raises:
            ValueError: not what `encode_words` returns, or a sentence without words.
        """
        name = type(self).__name__
        if words.ndim != 3 or words.dtype != torch.uint8:
            raise ValueError(
                f"{name}: expected bytes of shape (batch, length, width), got {words.dtype} {tuple(words.shape)}."
            )
        lengths = word_lengths(words)
        if bool((lengths == 0).any()):
            raise ValueError(f"{name}: sentence {int((lengths == 0).nonzero()[0])} has no words.")
        inside = words[..., 0] != 0
        # Words are spelt the same wherever they stand.
        tokens, which = words[inside].unique(dim=0, return_inverse=True)
        spelt = words.new_zeros(*words.shape[:2], self.characters.dim, dtype=self.vocabulary.vectors.weight.dtype)
        spelt = spelt.masked_scatter(inside.unsqueeze(2), self.characters(tokens)[which])
        x = self._dropped(torch.cat([self.vocabulary(words), spelt], 2))
        ends = lengths.cpu()
        for lstm in self.lstms:
            packed = pack_padded_sequence(x, ends, batch_first=True, enforce_sorted=False)
            x, _ = pad_packed_sequence(lstm(packed)[0], batch_first=True, total_length=words.shape[1])
            x = self._dropped(x)
        return x

    def _dropped(self, x: Tensor) -> Tensor:
        if not self.training or self.dropout == 0:
            return x
        keep = 1 - self.dropout
        return x * x.new_empty(len(x), 1, x.shape[2]).bernoulli_(keep).div_(keep)
