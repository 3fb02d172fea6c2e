"""Pictures of what a model thinks of a sentence: probabilities of tags and arcs, and trees."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RIGHT, WRONG = "tab:blue", "tab:red"
CIRCLE = {True: "tab:orange", False: "tab:red"}


class Tree(NamedTuple):
    """A sentence with its tree.

    Attributes:
        words: of the sentence.
        heads: of each word, 0 for the root.
        relations: of each word to its head.
        truth: the right heads, or None where nobody knows.
    """

    words: Sequence[str]
    heads: Sequence[int]
    relations: Sequence[str]
    truth: Sequence[int] | None = None


def spelled(words: UInt8[Tensor, "length width"]) -> list[str]:
    """Words that `encode_words` made, as text."""
    return [bytes(word[word != 0].tolist()).decode(errors="replace") for word in words]


def least_sure(entropies: Iterable[tuple[int, float]], shortest: int, longest: int, count: int) -> list[int]:
    """Which sentences have the most entropy among those of some lengths, of their lengths and entropies."""
    found = [(entropy, i) for i, (words, entropy) in enumerate(entropies) if shortest <= words <= longest]
    return [i for _, i in sorted(found, reverse=True)[:count]]


def draw_tags(
    axis: Axes, words: Sequence[str], shares: Float[Tensor, "length tags"], labels: Sequence[str], truth: Sequence[int]
) -> Any:
    """The probability of every tag of every word, with the right ones in circles; returns what has the colours."""
    kept = sorted({*truth, *(shares > 0.02).any(0).nonzero().flatten().tolist()})
    picture = axis.imshow(shares[:, kept].T, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for place, tag in enumerate(truth):
        right = int(shares[place].argmax()) == tag
        axis.plot(place, kept.index(tag), "o", mfc="none", mec=CIRCLE[right], mew=1.5, ms=9)
    axis.set_xticks(range(len(words)), words, rotation=45, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(len(kept)), [labels[tag] for tag in kept])
    return picture


def draw_arcs(axis: Axes, words: Sequence[str], shares: Float[Tensor, "heads words"], truth: Sequence[int]) -> Any:
    """The probability of every arc, with the right ones in circles; returns what has the colours."""
    picture = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    best = shares.argmax(0).tolist()
    for word, head in enumerate(truth):
        axis.plot(word, head, "o", mfc="none", mec=CIRCLE[best[word] == head], mew=1.5, ms=8)
    axis.set_xticks(range(len(words)), words, rotation=45, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(len(words) + 1), ["root", *words])
    return picture


def draw_tree(axis: Axes, tree: Tree) -> None:
    """Arcs from heads to words with their relations; those to a wrong head in red."""
    # The longer an arc the higher it leads, above all that it spans.
    spans = [abs(head - place) if head else 0 for place, head in enumerate(tree.heads, 1)]
    top = max(spans) / 2 + 1.2
    for place, (head, relation) in enumerate(zip(tree.heads, tree.relations, strict=True), 1):
        right = tree.truth is None or tree.truth[place - 1] == head
        colour = RIGHT if right else WRONG
        style = {"arrowstyle": "-|>", "color": colour, "shrinkA": 0, "shrinkB": 0, "lw": 1.1}
        if head == 0:
            axis.annotate("", (place, 0), (place, top), arrowprops=style)
            axis.text(place + 0.08, top, "root", color=colour, fontsize=8, va="top")
            continue
        x, height = torch.linspace(-1, 1, 41), spans[place - 1] / 2
        middle, half = (head + place) / 2, (place - head) / 2
        # Dependents of one head must not leave it at the same point.
        away = 0.12 if place > head else -0.12
        axis.plot(middle + half * x + away * (1 - x) / 2, height * (1 - x**4), color=colour, lw=1.1)
        axis.annotate("", (place, 0), (place - 0.02 * half, 0.16), arrowprops=style)
        axis.text(middle, height + 0.03, relation, color=colour, fontsize=8, ha="center", va="bottom")
    for place, word in enumerate(tree.words, 1):
        axis.text(place, -0.12, word, ha="center", va="top")
    axis.set(xlim=(0.3, len(tree.words) + 0.7), ylim=(-0.5, top + 0.15))
    axis.axis("off")
