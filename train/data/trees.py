"""Sentences with their dependency trees, from treebanks in the CoNLL-U format."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from ...models.tagging import encode_words
from .conllu import TaggedSet, TaggedSource, read_ewt
from .source import DataError, register_data


@dataclasses.dataclass(frozen=True)
class ParsedSource(TaggedSource):
    """A treebank with its fixed split, its papers, and trees in the place of tags.

    Attributes:
        classes: the name of each relation.
    """

    @property
    def model_arguments(self) -> dict[str, int]:
        """What the data say about a model: how many relations there are."""
        return {"num_relations": len(self.classes)}


@register_data
def ud_english_ewt_trees(data_dir: Path | None = None) -> ParsedSource:
    """The English Web Treebank of Universal Dependencies, with its trees: blogs, mail, reviews, answers.

    Relations are the universal ones: their subtypes, as in nsubj:pass, are cut off, as they are where parsers are
    compared (Zeman et al. 2018).

    Args:
        data_dir: holds en_ewt-ud-train.conllu, en_ewt-ud-dev.conllu and en_ewt-ud-test.conllu, as the treebank's
            repository does.

    Raises:
        DataError: no folder was given; a file is missing or damaged; a sentence has no tree, or a relation that the
            training set does not have.
    """
    parts = read_ewt("ud_english_ewt_trees", data_dir)
    relations = tuple(sorted({_universal(columns) for sentence in parts["train"] for columns in sentence}))
    sets = {part: _parsed(sentences, relations, part) for part, sentences in parts.items()}
    counts = " / ".join(f"{len(part):,}" for part in sets.values())
    return ParsedSource(
        name="ud_english_ewt_trees",
        **sets,
        classes=relations,
        split=f"the official {counts} sentences for training, choosing and measuring, by gold words",
        licence="CC BY-SA 4.0",
        citation="Silveira et al. 2014, A gold standard dependency corpus for English (UD English EWT)",
    )


def _parsed(sentences: list[list[list[str]]], relations: tuple[str, ...], part: str) -> TaggedSet:
    code = {relation: i for i, relation in enumerate(relations)}
    trees = []
    for place, sentence in enumerate(sentences):
        tree = [_arc(columns, code, f"sentence {place + 1} of the {part} set") for columns in sentence]
        if not _is_tree([head for head, _ in tree]):
            raise DataError(f"ud_english_ewt_trees: the heads of sentence {place + 1} of the {part} set are no tree.")
        trees.append(torch.tensor(tree))
    words = tuple(encode_words([[columns[1] for columns in sentence]])[0] for sentence in sentences)
    return TaggedSet(words, tuple(trees))


def _arc(columns: list[str], code: dict[str, int], where: str) -> tuple[int, int]:
    head, relation = columns[6], _universal(columns)
    if not head.isdecimal() or relation not in code:
        raise DataError(
            f"ud_english_ewt_trees, {where}: {columns[1]!r} has the head {head!r} and relation {relation!r}."
        )
    return int(head), code[relation]


def _universal(columns: list[str]) -> str:
    return columns[7].partition(":")[0]


def _is_tree(heads: list[int]) -> bool:
    """Whether one word hangs from the root, and every other leads there."""
    reached = {0}
    for start in range(1, len(heads) + 1):
        path = []
        node = start
        while node not in reached:
            if node > len(heads) or node in path:
                return False
            path.append(node)
            node = heads[node - 1]
        reached.update(path)
    return heads.count(0) == 1
