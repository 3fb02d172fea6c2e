"""Drawings that several tasks share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RED, GREY = "#c1121f", "#5c5c5c"
# More classes than these leave no room for numbers, or names, beside a matrix of four inches.
NUMBERED, NAMED = 16, 32
SHOWN = 12


def confusion_figure(
    truth: Int[Tensor, " n"],
    predicted: Int[Tensor, " n"],
    classes: Sequence[str],
    mistakes: Sequence[tuple[Float[Tensor, "channels height width"], int, int]] = (),
    title: str = "",
) -> Figure:
    """Which classes are taken for which, and some of the images that are.

    Args:
        truth: classes.
        predicted: classes.
        classes: their names.
        mistakes: an image of any range of values, its class, and what it was taken for; the first twelve are shown.
        title: above all.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.4 if mistakes else 4.8, 4.4), layout="constrained", facecolor="white")
    parts: Any = figure.subfigures(1, 2) if mistakes else [figure]
    draw_confusion(parts[0].subplots(), confusion_counts(truth, predicted, len(classes)), classes)
    if mistakes:
        _draw_mistakes(parts[1].subplots(3, 4).flatten(), mistakes, classes)
    wrong = int((truth != predicted).sum())
    said = f"{wrong:,} of {len(truth):,} wrong"
    figure.suptitle(f"{title}: {said}" if title else said, fontsize=11)
    return figure


def confusion_counts(truth: Int[Tensor, " n"], predicted: Int[Tensor, " n"], count: int) -> Int[Tensor, "count count"]:
    """How often class i was taken for class j."""
    return torch.bincount(truth.cpu() * count + predicted.cpu(), minlength=count * count).view(count, count)


def draw_confusion(axis: Axes, counts: Int[Tensor, "n n"], classes: Sequence[str]) -> None:
    """A matrix of counts with the share of each row as its colour; rows are the truth."""
    shares = counts.double() / counts.sum(dim=1, keepdim=True).clamp_min(1)
    # Mistakes are few: the square root shows them beside the diagonal.
    axis.imshow(shares.sqrt().numpy(), cmap="Purples", vmin=0, vmax=1)
    if len(classes) <= NUMBERED:
        for row, column in counts.nonzero().tolist():
            colour = "white" if shares[row, column] > 0.3 else "black"
            size = 8 if len(classes) <= 10 else 6
            axis.text(column, row, str(int(counts[row, column])), ha="center", va="center", fontsize=size, color=colour)
    ticks = range(len(classes)) if len(classes) <= NAMED else []
    names = [classes[i] for i in ticks]
    long = max((len(name) for name in names), default=0) > 2
    axis.set_xticks(list(ticks), names, fontsize=8, rotation=90 if long else 0)
    axis.set_yticks(list(ticks), names, fontsize=8)
    axis.set(xlabel="predicted", ylabel="true")
    axis.tick_params(length=0)


def _draw_mistakes(
    axes: Sequence[Axes] | np.ndarray, mistakes: Sequence[tuple[Tensor, int, int]], classes: Sequence[str]
) -> None:
    for axis in axes:
        axis.axis("off")
    for axis, (image, true, taken) in zip(axes, mistakes, strict=False):
        pixels = image.detach().cpu().float()
        low, high = pixels.min(), pixels.max()
        pixels = ((pixels - low) / (high - low).clamp_min(1e-6)).permute(1, 2, 0)
        axis.imshow(pixels.squeeze(2).numpy(), cmap="gray_r")
        title = f"{classes[true]} read as {classes[taken]}"
        # Long names must not run into those of the next image.
        axis.set_title(title, fontsize=min(8, 140 / len(title)), color=RED)
