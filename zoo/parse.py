"""Raw sentences through a pretrained parser."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import nn

from .cards import Card
from .errors import ZooError


@dataclasses.dataclass(frozen=True)
class Parsed:
    """What a parser says about one sentence.

    Attributes:
        sentence: as it was given.
        words: that it was taken apart into.
        heads: of each word in the most probable tree: 0 for the root, h for the h-th word.
        relations: of each word to its head.
        probabilities: of each of these arcs, whatever the rest of the tree is.
    """

    sentence: str
    words: tuple[str, ...]
    heads: tuple[int, ...]
    relations: tuple[str, ...]
    probabilities: tuple[float, ...]

    def drawn(self) -> str:
        """The tree as text, a word a line, below and to the right of its head."""
        lines: list[str] = []

        def add(node: int, before: str, own: str, below: str) -> None:
            word, relation, share = self.words[node - 1], self.relations[node - 1], self.probabilities[node - 1]
            lines.append(f"{before}{own}{word}  {relation} {share:.1%}")
            children = [child for child, head in enumerate(self.heads, 1) if head == node]
            for child in children:
                last = child == children[-1]
                add(child, before + below, "└─ " if last else "├─ ", "   " if last else "│  ")

        for node, head in enumerate(self.heads, 1):
            if head == 0:
                add(node, "", "", "")
        return "\n".join(lines)


def parse_sentences(model: nn.Module, card: Card, sentences: Sequence[str]) -> list[Parsed]:
    """Parse sentences, in their order.

    Args:
        model: the card's model, in evaluation mode.
        card: says what the relations are called.
        sentences: as people write them.

    Raises:
        ZooError: the card does not describe a parser; a sentence without words.
    """
    if card.task != "parsing" or card.labels is None:
        raise ZooError(f"{card.name} does not parse sentences: its task is {card.task}.")
    parser: Any = model
    try:
        found = parser.parse(sentences)
    except ValueError as error:
        raise ZooError(str(error)) from error
    return [
        Parsed(
            sentence, tuple(p.words), tuple(p.heads), tuple(card.labels[r] for r in p.relations), tuple(p.probabilities)
        )
        for sentence, p in zip(sentences, found, strict=True)
    ]
