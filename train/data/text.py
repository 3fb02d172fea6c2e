"""Text as characters, to be continued."""

from __future__ import annotations

import dataclasses
import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int, Integer
from torch import Tensor

from .batches import generator_of, part_of
from .source import DataError, register_data

Texts = tuple[Int[Tensor, "batch length"], Int[Tensor, "batch length"]]

TRAINED = 0.9


class TextBatches:
    """Batches of pieces of a text, and of what comes one character later.

    Args:
        text: as indices of characters.
        length: characters a piece.
        batch_size: pieces a batch.
        shuffle: pieces from random places, as many an epoch as fill the text once, the last batch being dropped where
            it is smaller; without, all pieces one after another.
        seed: of the places.
        device: where the batches go.

    Raises:
        DataError: the text does not fill one batch.
    """

    def __init__(
        self,
        text: Integer[Tensor, " characters"],
        length: int,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.pieces = (len(text) - 1) // max(length, 1)
        if length < 1 or batch_size < 1 or self.pieces < (batch_size if shuffle else 1):
            raise DataError(
                f"{len(text)} characters do not fill one batch of {batch_size} pieces of {length} characters: lower "
                "data.batch_size or data.length."
            )
        self.text, self.length, self.batch_size, self.shuffle = text.long(), length, batch_size, shuffle
        self.seed, self.device = seed, device

    def __len__(self) -> int:
        full, rest = divmod(self.pieces, self.batch_size)
        return full if self.shuffle or rest == 0 else full + 1

    def rows(self, place: int) -> int:
        """Pieces in batch `place` of an epoch."""
        return min(self.batch_size, self.pieces - place * self.batch_size)

    def epoch(self, index: int = 0, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[Texts]:
        """The batches of epoch `index`, from batch `start` on; of each the part of process `rank` of `world`."""
        for place in range(start, len(self)):
            rows = self.rows(place)
            if self.shuffle:
                last = len(self.text) - self.length
                starts = torch.randint(last, (rows,), generator=generator_of(self.seed, index, place))
            else:
                starts = (place * self.batch_size + torch.arange(rows)) * self.length
            where = starts[part_of(rows, rank, world)].unsqueeze(1) + torch.arange(self.length)
            yield self.text[where].to(self.device), self.text[where + 1].to(self.device)

    def __iter__(self) -> Iterator[Texts]:
        return self.epoch(0)


@dataclasses.dataclass(frozen=True)
class TextSource:
    """A text that is split in two.

    Attributes:
        name: by which recipes and cards call it.
        train: what models are trained on, and validation texts are carved from, as indices.
        test: what metrics are reported on.
        characters: what the indices stand for.
        licence: of the data.
        citation: where the text comes from.
        length: characters a piece, in batches.
    """

    name: str
    train: Integer[Tensor, " train"]
    test: Integer[Tensor, " test"]
    characters: tuple[str, ...]
    licence: str
    citation: str
    length: int = 128

    @property
    def split(self) -> str:
        """The two parts in words."""
        return f"the first {len(self.train):,} characters train; the last {len(self.test):,} are measured"

    @property
    def model_arguments(self) -> dict[str, int]:
        """What the data say about a model: how many characters there are."""
        return {"num_tokens": len(self.characters)}

    @property
    def card_fields(self) -> dict[str, Any]:
        """What the data say on a card: the characters."""
        return {"labels": self.characters}

    def encode(self, text: str) -> Int[Tensor, " length"]:
        """The indices of a text's characters.

        Raises:
            DataError: a character that the data do not have.
        """
        index = {character: i for i, character in enumerate(self.characters)}
        strange = next((character for character in text if character not in index), None)
        if strange is not None:
            raise DataError(f"{self.name}: the character {strange!r} is not among the {len(index)} of the data.")
        return torch.tensor([index[character] for character in text])

    def decode(self, indices: Integer[Tensor, " length"]) -> str:
        """The text of indices."""
        return "".join(self.characters[i] for i in indices.tolist())

    def batches(
        self, batch_size: int, eval_batch_size: int, validation: int, seed: int, device: str
    ) -> tuple[TextBatches, TextBatches]:
        """Pieces to train on, and those to measure on: of the test text, or the last `validation` training characters.

        Raises:
            DataError: a text does not fill a batch.
        """
        text, held_out = self.train, self.test
        if validation:
            text, held_out = text[:-validation], text[-validation:]
        training = TextBatches(text, self.length, batch_size, shuffle=True, seed=seed, device=device)
        return training, TextBatches(held_out, self.length, eval_batch_size, device=device)

    def test_batches(self, batch_size: int, limit: int | None = None, device: str = "cpu") -> TextBatches:
        """The test text, or the first so many pieces of it."""
        text = self.test if limit is None else self.test[: limit * self.length + 1]
        return TextBatches(text, self.length, batch_size, device=device)


def read_characters(path: Path) -> tuple[Tensor, tuple[str, ...]]:
    """A text file, plain or gzipped, as indices into its sorted distinct characters, and these.

    Raises:
        DataError: the file cannot be read, is no UTF-8 text, or is empty.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = content.decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    if not text:
        raise DataError(f"{path} is empty.")
    characters = tuple(sorted(set(text)))
    index = {character: i for i, character in enumerate(characters)}
    kind = torch.uint8 if len(characters) <= 256 else torch.int64
    return torch.tensor([index[character] for character in text], dtype=kind), characters


def _load(name: str, data_dir: Path | None, pattern: str, licence: str, citation: str) -> TextSource:
    if data_dir is None:
        raise DataError(f"{name}: give the folder that holds {pattern}.txt, plain or with .gz (--data-dir).")
    folder = data_dir.expanduser()
    folder = folder / pattern if (folder / pattern).is_dir() else folder
    found = sorted(path for end in ("txt", "txt.gz") for path in folder.glob(f"{pattern}.{end}"))
    if len(found) != 1:
        held = f"holds {len(found)} of them" if found else "holds none" if data_dir.is_dir() else "is missing"
        raise DataError(f"{name}: expected one file {pattern}.txt, plain or with .gz, in {data_dir}, which {held}.")
    text, characters = read_characters(found[0])
    first = int(len(text) * TRAINED)
    return TextSource(name, text[:first], text[first:], characters, licence, citation)


@register_data
def tinyshakespeare(data_dir: Path | None = None) -> TextSource:
    """1,115,394 characters of Shakespeare's plays, of 65 kinds; the first nine tenths train, the last is measured.

    Args:
        data_dir: holds tinyshakespeare.txt, plain or with .gz, or a folder tinyshakespeare that does.

    Raises:
        DataError: no folder was given, or it does not hold the file.
    """
    return _load("tinyshakespeare", data_dir, "tinyshakespeare", "public domain", "Karpathy 2015, char-rnn")


@register_data
def text_file(data_dir: Path | None = None) -> TextSource:
    """Any text: the first nine tenths train, the last is measured.

    Args:
        data_dir: holds one file that ends in .txt or .txt.gz, in UTF-8.

    Raises:
        DataError: no folder was given, it holds no such file or several, or the file is no text.
    """
    return _load("text_file", data_dir, "*", "the owner's", "")
