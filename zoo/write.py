"""Texts through a pretrained language model."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .cards import Card
from .errors import ZooError


@dataclasses.dataclass(frozen=True)
class Written:
    """How a language model continues one text.

    Attributes:
        text: as it was given.
        continuation: what the model added.
    """

    text: str
    continuation: str


def continue_texts(
    model: nn.Module, card: Card, texts: Sequence[str], *, length: int = 300, temperature: float = 0.8, seed: int = 0
) -> list[Written]:
    """Continue texts character by character, in their order.

    Args:
        model: the card's model, in evaluation mode; it offers `generate(prompt, length, temperature, generator=)`.
        card: its labels are the characters that the model's indices stand for.
        texts: of these characters.
        length: characters to add.
        temperature: the lower, the safer; 0 takes the most probable character each time.
        seed: of the draws, for each text anew.

    Raises:
        ZooError: the card does not describe a language model; an empty text, or a character that the model was not
            trained with.
        ValueError: length or temperature is negative.
    """
    if card.task != "language-modelling" or card.labels is None:
        raise ZooError(f"{card.name} does not continue texts: its task is {card.task}.")
    writer: Any = model
    index = {character: i for i, character in enumerate(card.labels)}
    found = []
    for text in texts:
        strange = next((character for character in text if character not in index), None)
        if strange is not None or not text:
            what = "a text without characters" if strange is None else f"the character {strange!r}"
            raise ZooError(f"{card.name} cannot continue {what}; it knows {''.join(card.labels)!r}.")
        prompt = torch.tensor([[index[character] for character in text]])
        generator = torch.Generator().manual_seed(seed)
        tokens = writer.generate(prompt, length, temperature, generator=generator)[0, len(text) :]
        found.append(Written(text, "".join(card.labels[i] for i in tokens.tolist())))
    return found
