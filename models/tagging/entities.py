"""Names in sentences, as tags that say where they begin and go on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

OUTSIDE = 0


def bio_moves(num_tags: int) -> Bool[Tensor, "tags_and_start tags"]:
    """Which tag may follow which, with the start of a sentence as the last row.

    Tags are 0 outside of names, 2 k + 1 where one of kind k begins, and 2 k + 2 where it goes on.

    Raises:
        ValueError: the number of tags is not odd.
    """
    if num_tags < 1 or num_tags % 2 == 0:
        raise ValueError(f"bio: expected an odd number of tags, one outside and two a kind; got {num_tags}.")
    allowed = torch.ones(num_tags + 1, num_tags, dtype=torch.bool)
    for inside in range(2, num_tags, 2):
        allowed[:, inside] = False
        allowed[inside - 1 : inside + 1, inside] = True
    return allowed


def spans(tags: Sequence[int]) -> list[tuple[int, int, int]]:
    """The names that tags stand for, each as first word, word behind its last, and kind.

    Tags of any kind are read: one that goes on with what did not begin, begins it.

    Source: Sang and De Meulder 2003 (the CoNLL evaluation's reading of tags).
    """
    found: list[tuple[int, int, int]] = []
    start = kind = -1
    for place, tag in enumerate([*tags, OUTSIDE]):
        own = -1 if tag == OUTSIDE else (tag - 1) // 2
        goes_on = own == kind and tag % 2 == 0 and tag != OUTSIDE
        if goes_on:
            continue
        if kind >= 0:
            found.append((start, place, kind))
        start, kind = place, own
    return found
