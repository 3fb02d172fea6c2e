"""Raw sentences through a pretrained tagger."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import nn

from .cards import Card
from .errors import ZooError

TASKS = ("tagging", "entity-recognition")
"""What models with a tag for every word are for."""


@dataclasses.dataclass(frozen=True)
class Tagged:
    """What a tagger says about one sentence.

    Attributes:
        sentence: as it was given.
        words: that it was taken apart into.
        tags: of each word, the most probable of all sequences of tags.
        probabilities: of each of these tags at its place, whatever the others are.
    """

    sentence: str
    words: tuple[str, ...]
    tags: tuple[str, ...]
    probabilities: tuple[float, ...]


def predict_sentences(model: nn.Module, card: Card, sentences: Sequence[str]) -> list[Tagged]:
    """Tag sentences, in their order.

    Args:
        model: the card's model, in evaluation mode.
        card: says what the tags are called.
        sentences: as people write them.

    Raises:
        ZooError: the card does not describe a tagger; a sentence without words.
    """
    if card.task not in TASKS or card.labels is None:
        raise ZooError(f"{card.name} does not tag sentences: its task is {card.task}.")
    tagger: Any = model
    try:
        found = tagger.tag(sentences)
    except ValueError as error:
        raise ZooError(str(error)) from error
    return [
        Tagged(sentence, tuple(words), tuple(card.labels[t] for t in tags), tuple(shares))
        for sentence, (words, tags, shares) in zip(sentences, found, strict=True)
    ]
