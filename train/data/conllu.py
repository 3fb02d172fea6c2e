"""Sentences with a tag for every word, from treebanks in the CoNLL-U format."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from jaxtyping import Int, UInt8
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ...models.tagging import encode_words
from .batches import generator_of, part_of
from .source import DataError, register_data

UPOS = (
    "ADJ", "ADP", "ADV", "AUX", "CCONJ", "DET", "INTJ", "NOUN", "NUM", "PART", "PRON", "PROPN", "PUNCT", "SCONJ", "SYM",
    "VERB", "X",
)  # fmt: skip
"""The parts of speech of Universal Dependencies."""

COLUMNS = 10
# Batches that sentences are sorted by length within, so that those of a batch are about equally long.
POOL = 40

Sentences = tuple[UInt8[Tensor, "batch length width"], Int[Tensor, "batch length *pair"]]


@dataclasses.dataclass(frozen=True)
class TaggedSet:
    """Tagged sentences in memory.

    Attributes:
        words: of each sentence (length, width), bytes as `encode_words` has them.
        tags: of each sentence (length,), integers; or (length, 2), the head and the relation of each word.
    """

    words: tuple[Tensor, ...]
    tags: tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.words)

    def take(self, rows: slice | Sequence[int]) -> TaggedSet:
        """The sentences at `rows`."""
        if isinstance(rows, slice):
            rows = range(*rows.indices(len(self)))
        return TaggedSet(tuple(self.words[i] for i in rows), tuple(self.tags[i] for i in rows))

    def padded(self) -> Sentences:
        """All of them as one batch: zeros behind the words, -1 behind the tags."""
        words = pad_sequence(list(self.words), batch_first=True)
        return words, pad_sequence(list(self.tags), batch_first=True, padding_value=-1)


class SentenceBatches:
    """Batches of sentences, a function of seed and epoch.

    Args:
        data: the sentences.
        batch_size: sentences a batch. A last, smaller batch is dropped where `shuffle` is set and kept elsewhere.
        shuffle: a new order each epoch, in which the sentences of a batch are about equally long.
        seed: of the order.
        device: where the batches go.

    Raises:
        ValueError: the batch size is below one, or shuffled data fill no batch.
    """

    def __init__(
        self,
        data: TaggedSet,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {batch_size}.")
        if shuffle and len(data) < batch_size:
            raise ValueError(f"{len(data)} training sentences do not fill one batch of {batch_size}.")
        self.data, self.batch_size, self.shuffle = data, batch_size, shuffle
        self.seed, self.device = seed, device

    def __len__(self) -> int:
        full, rest = divmod(len(self.data), self.batch_size)
        return full if self.shuffle or rest == 0 else full + 1

    def rows(self, place: int) -> int:
        """Sentences in batch `place` of an epoch."""
        return min(self.batch_size, len(self.data) - place * self.batch_size)

    def epoch(self, index: int = 0, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[Sentences]:
        """The batches of epoch `index`, from batch `start` on; of each the part of process `rank` of `world`."""
        order = self._order(index)
        for place in range(start, len(self)):
            rows = order[place * self.batch_size : (place + 1) * self.batch_size]
            words, tags = self.data.take(rows[part_of(len(rows), rank, world)]).padded()
            yield words.to(self.device), tags.to(self.device)

    def _order(self, index: int) -> list[int]:
        if not self.shuffle:
            return list(range(len(self.data)))
        generator = generator_of(self.seed, index, 0)
        order: list[int] = torch.randperm(len(self.data), generator=generator).tolist()
        pool = self.batch_size * POOL
        batches: list[list[int]] = []
        for first in range(0, len(self) * self.batch_size, pool):
            some = order[first : min(first + pool, len(self) * self.batch_size)]
            some.sort(key=lambda i: len(self.data.tags[i]))
            batches += [some[i : i + self.batch_size] for i in range(0, len(some), self.batch_size)]
        shuffled = torch.randperm(len(batches), generator=generator).tolist()
        return [i for place in shuffled for i in batches[place]]

    def __iter__(self) -> Iterator[Sentences]:
        return self.epoch(0)


@dataclasses.dataclass(frozen=True)
class TaggedSource:
    """A treebank with its fixed split and its papers.

    Attributes:
        name: by which recipes and cards call it.
        train: what models are trained on.
        dev: what they are chosen by.
        test: what metrics are reported on, and nothing is chosen by.
        classes: the name of each tag.
        split: the parts in words.
        licence: of the data.
        citation: where the data come from.
    """

    name: str
    train: TaggedSet
    dev: TaggedSet
    test: TaggedSet
    classes: tuple[str, ...]
    split: str
    licence: str
    citation: str

    @property
    def model_arguments(self) -> dict[str, int]:
        """What the data say about a model: how many tags there are."""
        return {"num_tags": len(self.classes)}

    @property
    def card_fields(self) -> dict[str, object]:
        """What the data say on a card: what the tags are called."""
        return {"labels": self.classes}

    def batches(
        self, batch_size: int, eval_batch_size: int, validation: int, seed: int, device: str
    ) -> tuple[SentenceBatches, SentenceBatches]:
        """Sentences to train on, and those to measure on: of the test set, or the first `validation` of the dev set."""
        training = SentenceBatches(self.train, batch_size, shuffle=True, seed=seed, device=device)
        if not validation:
            return training, self.test_batches(eval_batch_size, device=device)
        return training, SentenceBatches(self.dev.take(slice(validation)), eval_batch_size, device=device)

    def test_batches(self, batch_size: int, limit: int | None = None, device: str = "cpu") -> SentenceBatches:
        """The test set, or the first so many sentences of it."""
        return SentenceBatches(self.test.take(slice(limit)), batch_size, device=device)


def read_conllu(path: Path) -> list[list[list[str]]]:
    """The words of each sentence, each as the ten columns of its line.

    Lines that stand for several words written as one, and for words that are left out, are passed over: what they
    consist of has lines of its own.

    Raises:
        DataError: the file is missing, is no text, or has a line that is none of CoNLL-U; the message names it.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    sentences: list[list[list[str]]] = [[]]
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            if sentences[-1]:
                sentences.append([])
            continue
        if line.startswith("#"):
            continue
        columns = line.split("\t")
        if len(columns) != COLUMNS:
            raise DataError(f"{path}, line {number}: expected {COLUMNS} columns, got {len(columns)}.")
        if "-" in columns[0] or "." in columns[0]:
            continue
        if columns[3] not in UPOS or not columns[1]:
            raise DataError(f"{path}, line {number}: {columns[3]!r} is no universal part of speech of {columns[1]!r}.")
        sentences[-1].append(columns)
    found = [sentence for sentence in sentences if sentence]
    if not found:
        raise DataError(f"{path} holds no sentence.")
    return found


def read_ewt(name: str, data_dir: Path | None) -> dict[str, list[list[list[str]]]]:
    """The sentences of the English Web Treebank's parts "train", "dev" and "test", for the data set `name`.

    Raises:
        DataError: no folder was given; a file is missing or damaged.
    """
    files = {part: f"en_ewt-ud-{part}.conllu" for part in ("train", "dev", "test")}
    if data_dir is None:
        raise DataError(f"{name}: give the folder that holds {', '.join(files.values())} (--data-dir).")
    return {part: read_conllu(data_dir / file) for part, file in files.items()}


@register_data
def ud_english_ewt(data_dir: Path | None = None) -> TaggedSource:
    """The English Web Treebank of Universal Dependencies, with its parts of speech: blogs, mail, reviews, answers.

    Args:
        data_dir: holds en_ewt-ud-train.conllu, en_ewt-ud-dev.conllu and en_ewt-ud-test.conllu, as the treebank's
            repository does.

    Raises:
        DataError: no folder was given; a file is missing or damaged.
    """
    sets = {part: _tagged(sentences) for part, sentences in read_ewt("ud_english_ewt", data_dir).items()}
    counts = " / ".join(f"{len(part):,}" for part in sets.values())
    return TaggedSource(
        name="ud_english_ewt",
        **sets,
        classes=UPOS,
        split=f"the official {counts} sentences for training, choosing and measuring, by gold words",
        licence="CC BY-SA 4.0",
        citation="Silveira et al. 2014, A gold standard dependency corpus for English (UD English EWT)",
    )


def _tagged(sentences: list[list[list[str]]]) -> TaggedSet:
    code = {tag: i for i, tag in enumerate(UPOS)}
    return TaggedSet(
        tuple(encode_words([[columns[1] for columns in sentence]])[0] for sentence in sentences),
        tuple(torch.tensor([code[columns[3]] for columns in sentence]) for sentence in sentences),
    )
