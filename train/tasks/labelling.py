"""A class for some places of a sequence."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from ...solvers.options import options
from .task import Outcome, Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Labelled = tuple[Int[Tensor, "batch length"], Int[Tensor, "batch length"]]


@options
class SequenceLabelling(Task):
    """The cross-entropy at those places of a sequence that have a label, others having -1.

    A model returns logits (batch, length, classes) of sequences (batch, length).
    """

    kind = "sequence-labelling"
    metric = "accuracy"

    def losses(self, model: nn.Module, batch: Labelled, step: int) -> Outcome:
        """Cross-entropy in nats a label."""
        sequences, labels = batch
        loss = nn.functional.cross_entropy(model(sequences).transpose(1, 2), labels, ignore_index=-1)
        return Outcome(loss, {"cross_entropy": float(loss.detach())})

    def evaluate(self, model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
        """How often the likeliest class is right.

        Returns:
            accuracy, the share of all labels; for each length of sequences accuracy_LENGTH, that of its labels; and
            cross_entropy in nats a label.
        """
        was_training = model.training
        model.eval()
        counts: dict[int, list[int]] = {}
        total = 0.0
        with torch.no_grad():
            for sequences, labels in batches:
                logits = model(sequences)
                inside = labels >= 0
                right, seen = counts.setdefault(sequences.shape[1], [0, 0])
                right += int(((logits.argmax(2) == labels) & inside).sum())
                counts[sequences.shape[1]] = [right, seen + int(inside.sum())]
                total += float(nn.functional.cross_entropy(logits[inside], labels[inside], reduction="sum"))
        model.train(was_training)
        seen = sum(s for _, s in counts.values())
        return {
            "accuracy": sum(r for r, _ in counts.values()) / seen,
            **{f"accuracy_{length}": r / s for length, (r, s) in sorted(counts.items())},
            "cross_entropy": total / seen,
        }

    def draw(self, model: nn.Module, source: Any) -> Figure | None:
        """The weights of a model with `attend`, in one string of each length."""
        if not hasattr(model, "attend"):
            return None
        strings = {s.shape[1]: (s, w) for s, w in source.test_batches(1, 1, str(next(model.parameters()).device))}
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5.2 * len(strings), 4.6), layout="constrained", facecolor="white")
        axes = figure.subplots(1, len(strings), squeeze=False)[0]
        for axis, (length, (sequence, wanted)) in zip(axes, sorted(strings.items()), strict=True):
            logits, weights = model.attend(sequence)  # type: ignore[operator]
            picture = axis.imshow(weights[0].cpu(), cmap="Blues", vmin=0, vmax=1)
            right = (logits.argmax(2) == wanted)[0].tolist()
            text = ["(" if bracket else ")" for bracket in sequence[0].tolist()]
            stack = []
            for place, bracket in enumerate(text):
                if bracket == "(":
                    stack.append(place)
                else:
                    colour = "tab:orange" if right[place] else "tab:red"
                    axis.plot(stack.pop(), place, "o", mfc="none", mec=colour, mew=1.5, ms=110 / length)
            axis.set_xticks(range(length), text)
            axis.set_yticks(range(length), text)
            axis.set(xlabel="attended bracket", title=f"{length} brackets")
        axes[0].set_ylabel("asking bracket")
        figure.colorbar(picture, ax=axes, label="weight", shrink=0.8)
        figure.suptitle("weights of attention; circled: partners, red where the answer is wrong", size=11)
        return figure
