"""Sentences with the names in them, from columns as the shared tasks of CoNLL have them."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from ...models.tagging import encode_words
from .conllu import TaggedSet, TaggedSource
from .source import DataError, register_data

KINDS = ("corporation", "creative-work", "group", "location", "person", "product")

_TAG = re.compile(r"O|[BI]-\S+")


def read_columns(path: Path) -> list[list[tuple[str, str]]]:
    """The words of each sentence, each with its tag: O, B-KIND where a name begins, I-KIND where it goes on.

    Of more than two columns the first and the last are read.

    Raises:
        DataError: the file is missing, is no text, or has a line without a word or a tag; the message names it.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    sentences: list[list[tuple[str, str]]] = [[]]
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            if sentences[-1]:
                sentences.append([])
            continue
        columns = line.rstrip("\r").split("\t")
        word, tag = columns[0], columns[-1].strip()
        if len(columns) < 2 or not word or not _TAG.fullmatch(tag):
            raise DataError(f"{path}, line {number}: expected a word, a tab and O, B-KIND or I-KIND; got {line!r}.")
        sentences[-1].append((word, tag))
    found = [sentence for sentence in sentences if sentence]
    if not found:
        raise DataError(f"{path} holds no sentence.")
    return found


@register_data
def wnut17(data_dir: Path | None = None) -> TaggedSource:
    """Emerging and rare names in social media: the shared task of the third Workshop on Noisy User-generated Text.

    Tags are numbered O, B-corporation, I-corporation, B-creative-work and so on.

    Args:
        data_dir: holds wnut17-train.conll, wnut17-dev.conll and wnut17-test.conll: a word, a tab and a tag a line.

    Raises:
        DataError: no folder was given; a file is missing or damaged; there is a name of another kind.
    """
    files = {part: f"wnut17-{part}.conll" for part in ("train", "dev", "test")}
    if data_dir is None:
        raise DataError(f"wnut17: give the folder that holds {', '.join(files.values())} (--data-dir).")
    classes = ("O", *(f"{side}-{kind}" for kind in KINDS for side in "BI"))
    sets = {part: _tagged(data_dir / file, classes) for part, file in files.items()}
    counts = " / ".join(f"{len(part):,}" for part in sets.values())
    return TaggedSource(
        name="wnut17",
        **sets,
        classes=classes,
        split=f"the official {counts} sentences for training, choosing and measuring, by gold words",
        licence="CC BY 4.0",
        citation="Derczynski et al. 2017, Results of the WNUT2017 shared task on novel and emerging entity recognition",
    )


def _tagged(path: Path, classes: tuple[str, ...]) -> TaggedSet:
    code = {tag: i for i, tag in enumerate(classes)}
    words, tags = [], []
    for sentence in read_columns(path):
        before = 0
        row = []
        for word, tag in sentence:
            if tag not in code:
                raise DataError(f"{path}: {word!r} is tagged {tag!r}; the kinds of names are {', '.join(KINDS)}.")
            own = code[tag]
            # One that goes on with what did not begin, begins it.
            if tag[0] == "I" and before not in (own, own - 1):
                own -= 1
            row.append(own)
            before = own
        words.append(encode_words([[word for word, _ in sentence]])[0])
        tags.append(torch.tensor(row))
    return TaggedSet(tuple(words), tuple(tags))
