"""From words to vectors: by what they are, and by how they are spelt."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

WIDTH = 24
"""Bytes that a word is known by; of a longer one its first and its last half."""

# A multiplier of a multiplicative congruential generator with modulus 2^64 (L'Ecuyer 1999, table 4).
_MULTIPLIER = 3935559000370003845
_NONE = torch.iinfo(torch.int64).max

_TOKEN = re.compile(
    r"https?://\S+|www\.\S+|[\w.+-]+@[\w-]+(?:\.[\w-]+)+"  # addresses
    r"|\d+(?:[.,:]\d+)*"  # numbers and times
    r"|(?:[A-Za-z]\.){2,}|(?:Mr|Mrs|Ms|Dr|St|vs|etc|Inc|Jr|Sr)\."  # abbreviations
    r"|[^\W\d_]+(?=n['\u2019]t\b)|n['\u2019]t\b|['\u2019](?:s|m|d|re|ve|ll)\b"  # do + n't, we + 'll
    r"|[^\W_]+|\.{2,}|-{2,}|(.)\1+|\S",
    re.IGNORECASE,
)


def tokenize(text: str) -> list[str]:
    """The words and punctuation marks of an English sentence, roughly as treebanks separate them.

    Clitics (n't, 'll, 's) are words of their own, as are the two sides of a hyphen and the hyphen.
    """
    return [match.group() for match in _TOKEN.finditer(text)]


def encode_words(sentences: Sequence[Sequence[str]]) -> UInt8[Tensor, "batch length width"]:
    """Words as bytes of UTF-8, which is all that the models here need: there is no table to keep.

    Args:
        sentences: the words of each.

    Returns:
        (batch, length of the longest, `WIDTH`), with zeros behind every word and sentence.

    Raises:
        ValueError: no sentences, a sentence without words, or a word without characters.
    """
    if not sentences:
        raise ValueError("encode_words: expected a sentence, got none.")
    rows = []
    for i, words in enumerate(sentences):
        if not words:
            raise ValueError(f"encode_words: sentence {i} has no words.")
        contents = [word.replace("\0", "").encode() for word in words]
        if b"" in contents:
            raise ValueError(f"encode_words: word {contents.index(b'')} of sentence {i} has no characters.")
        short = (c if len(c) <= WIDTH else c[: WIDTH // 2] + c[-WIDTH // 2 :] for c in contents)
        row = bytearray().join(c.ljust(WIDTH, b"\0") for c in short)
        rows.append(torch.frombuffer(row, dtype=torch.uint8).reshape(-1, WIDTH))
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def word_lengths(words: UInt8[Tensor, "batch length width"]) -> Int[Tensor, " batch"]:
    """Words of each sentence."""
    return (words[..., 0] != 0).sum(1)


def fingerprints(words: UInt8[Tensor, "*shape width"]) -> Int[Tensor, "*shape"]:
    """64 bits that stand for a word whatever its case, with a 0 for every digit.

    That two of 10^5 words share them has a probability of about 10^-9.
    """
    code = words.long()
    code = torch.where((code >= 65) & (code <= 90), code + 32, code)
    code = torch.where((code >= 48) & (code <= 57), 48, code)
    result = torch.zeros_like(code[..., 0])
    for byte in code.unbind(-1):
        result = torch.where(byte == 0, result, (result + byte) * _MULTIPLIER)
        # Products carry upwards only: without this the low bits would know of the last bytes alone.
        result = result ^ (result >> 29)
    return result


class Vocabulary(nn.Module):
    """Vectors of known words, and one for all others.

    The words are known by their `fingerprints`, which are stored with the weights; no text is.

    Args:
        size: how many words can be known.
        dim: of their vectors.
        dropout: share of the words that are taken for unknown ones in training.
    """

    known: Tensor

    def __init__(self, size: int, dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.vectors = nn.Embedding(size + 1, dim)
        nn.init.normal_(self.vectors.weight, std=dim**-0.5)
        self.register_buffer("known", torch.full((size,), _NONE, dtype=torch.int64))

    @property
    def fitted(self) -> bool:
        """Whether any word is known."""
        return bool((self.known != _NONE).any())

    @torch.no_grad()
    def fit(self, words: UInt8[Tensor, "tokens width"], at_least: int = 2) -> None:
        """Know the most frequent of these words, of those that occur a few times.

        Args:
            words: of a corpus.
            at_least: occurrences. Words that occur once are what unknown words are learnt from.
        """
        words = words[words[:, 0] != 0]
        found, counts = fingerprints(words).unique(return_counts=True)
        found, counts = found[counts >= at_least], counts[counts >= at_least]
        # Of equally frequent words those with the least fingerprint, on every machine.
        kept = found[counts.argsort(descending=True, stable=True)[: len(self.known)]].sort().values
        self.known.fill_(_NONE)
        self.known[: len(kept)] = kept.to(self.known.device)

    def indices(self, words: UInt8[Tensor, "*shape width"]) -> Int[Tensor, "*shape"]:
        """The row of each word's vector; 0 for those that are not known."""
        wanted = fingerprints(words)
        place = torch.searchsorted(self.known, wanted).clamp(max=len(self.known) - 1)
        return torch.where(self.known[place] == wanted, place + 1, 0)

    def forward(self, words: UInt8[Tensor, "*shape width"]) -> Float[Tensor, "*shape dim"]:
        """A vector a word."""
        indices = self.indices(words)
        if self.training and self.dropout:
            indices = indices.masked_fill(torch.rand(indices.shape, device=indices.device) < self.dropout, 0)
        return self.vectors(indices)

    def extra_repr(self) -> str:
        """The options, for repr()."""
        return f"dropout={self.dropout}"


class WordCharacters(nn.Module):
    """Vectors of words by how they are spelt: convolutions over their bytes, and the largest of each filter.

    Args:
        dim: of the bytes' vectors.
        filters: of each width.
        widths: of the convolutions.
        dropout: of the bytes' vectors.

    Source: Kim, Jernite, Sontag and Rush 2016, section 2.2.
    """

    def __init__(self, dim: int, filters: int, widths: tuple[int, ...], dropout: float = 0.0) -> None:
        super().__init__()
        self.widths = widths
        self.vectors = nn.Embedding(258, dim, padding_idx=0)
        self.dropout = nn.Dropout(dropout)
        self.convolutions = nn.ModuleList(nn.Conv1d(dim, filters, width) for width in widths)

    @property
    def dim(self) -> int:
        """Of the words' vectors."""
        return sum(convolution.out_channels for convolution in self.convolutions)  # type: ignore[misc]

    def forward(self, words: UInt8[Tensor, "words width"]) -> Float[Tensor, "words dim"]:
        """A vector a word."""
        longest = int((words != 0).sum(1).amax())
        code = words[:, :longest].long()
        # Marks before and behind, so that filters can tell a suffix from the middle.
        lengths = (code != 0).sum(1, keepdim=True)
        code = nn.functional.pad(code, (1, 1 + max(self.widths)))
        code[:, 0] = 256
        code.scatter_(1, lengths + 1, 257)
        vectors = self.dropout(self.vectors(code)).transpose(1, 2)
        position = torch.arange(code.shape[1], device=code.device)
        found = []
        for convolution in self.convolutions:
            values = convolution(vectors)
            # Windows that begin behind the end mark see padding alone; how much there is depends on other words.
            outside = position[: values.shape[2]] > lengths + 1
            found.append(values.masked_fill(outside.unsqueeze(1), -torch.inf).amax(2))
        return torch.cat(found, 1).relu()
