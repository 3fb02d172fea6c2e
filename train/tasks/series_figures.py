"""Pictures of models of series."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

VARIABLES, POINTS, BINS = 4, 200, 30


def event_figure(
    logits: Float[Tensor, " n"], events: Float[Tensor, " n"], title: str, paint: Any = None
) -> Figure:  # fmt: skip
    """The receiver's operating characteristic, and beside it how probable the event was said to be.

    Args:
        logits: of the event.
        events: 1 where it came.
        title: above all.
        paint: draws on the second axis instead.
    """
    from matplotlib.figure import Figure
    from sklearn.metrics import roc_auc_score, roc_curve

    figure = Figure(figsize=(9.4, 4.2), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2)
    false, true, _ = roc_curve(events, logits)
    left.plot(false, true, color="#5b3a8c")
    left.plot([0, 1], [0, 1], ":", color="grey", linewidth=1)
    left.set(xlabel="false alarms", ylabel="events foretold", aspect="equal")
    left.set_title(f"area {roc_auc_score(events, logits):.3f}", fontsize=10)
    if paint is None:
        for came, colour, name in ((0, "#9aa0a6", "did not come"), (1, "#c0392b", "came")):
            chances = logits[events == came].sigmoid().numpy()
            right.hist(chances, BINS, (0, 1), density=True, alpha=0.6, color=colour, label=f"the event {name}")
        right.set(xlabel="probability that was given to it", ylabel="density")
        right.legend(fontsize=8)
    else:
        paint(right)
    figure.suptitle(title, fontsize=11)
    return figure


def draw_reconstruction(axis: Axes, model: nn.Module, batch: Sequence[Tensor], names: Sequence[str]) -> None:
    """The most observed variables of the longest series of a batch, and what the model explains them by.

    Args:
        axis: to draw on.
        model: offers `posterior` and `decode`, as `LatentODE` does.
        batch: as of `Series`.
        names: of the variables.
    """
    row = int(batch[2].sum((1, 2)).argmax())
    times, values, observed, static = (part[row : row + 1] for part in batch[:4])
    mean, _ = model.posterior(times, values, observed, static)  # type: ignore[operator]
    start, end = float(times[0, 0]), float(times[0, -1])
    grid = torch.linspace(0, end - start, POINTS, device=times.device).unsqueeze(0)
    curves = model.decode(mean, grid)[0].cpu()  # type: ignore[operator]
    # Of those that move: a constant says nothing.
    moving = values[0].std(0) > 0
    chosen = (observed[0].sum(0) * moving).topk(min(VARIABLES, values.shape[-1])).indices.tolist()
    for place, variable in enumerate(chosen):
        colour = f"C{place}"
        seen = observed[0, :, variable]
        axis.plot(times[0][seen].cpu(), values[0, :, variable][seen].cpu(), ".", color=colour, markersize=4)
        axis.plot(start + grid[0].cpu(), curves[:, variable], color=colour, label=names[variable])
    axis.set(xlabel="time", ylabel="standardised value")
    axis.set_title("one series and the trajectory that explains it", fontsize=10)
    axis.legend(fontsize=8)
