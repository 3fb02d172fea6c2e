"""The demonstration's second part: pretrained flows beside the densities that they learned."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from ..models.flow import ContinuousFlow
from .factory import create_model
from .registry import load_card

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMES = ("ffjord_small.checkerboard", "ffjord_small.pinwheel")
GRID = 80
SAMPLES = 4000


@dataclasses.dataclass(frozen=True)
class Portrait:
    """What is drawn of one flow.

    Attributes:
        name: of the model.
        extent: the picture shows the square [-extent, extent]^2.
        truth: the true density on a grid, rows from below.
        density: the flow's.
        samples: of the flow.
        nll: mean negative log density of fresh points, in nats.
        true_nll: that of the true density on the same points.
        evaluations: the most that a density on the grid took.
        seconds: that the samples took.
    """

    name: str
    extent: float
    truth: Float[Tensor, "grid grid"]
    density: Float[Tensor, "grid grid"]
    samples: Float[Tensor, "n 2"]
    nll: float
    true_nll: float
    evaluations: int
    seconds: float


def main(output: Path, names: Sequence[str] = NAMES) -> None:
    """Draw samples and densities of pretrained flows to `output`, and print how good and how hard they are.

    Raises:
        ZooError: no such model, or its weights are damaged.
    """
    print("a flow carries the normal density to that of the data along the trajectories of dy/dt = f(t, y)")
    portraits = []
    for name in names:
        card = load_card(name)
        assert card.data is not None
        flow = cast(ContinuousFlow, create_model(name, pretrained=True).eval())
        one = portray(name, flow, _density(card.data.name), card.metrics["nll"], card.metrics["true_nll"])
        print(f"\n{name}: {card.parameters:,} parameters")
        print(f"  -log p     {one.nll:.3f} nats a fresh point; the true density's own {one.true_nll:.3f}")
        total = float(one.density.sum()) * (2 * one.extent / (GRID - 1)) ** 2
        print(f"  total      {total:.4f}, the density added up over the picture's {GRID}^2 cells")
        print(f"  samples    {SAMPLES:,} in {one.seconds:.2f} s; a density takes {one.evaluations} evaluations of f")
        portraits.append(one)
    output.parent.mkdir(parents=True, exist_ok=True)
    draw(portraits).savefig(output, dpi=110)
    print(f"picture      {output.resolve()}")


def portray(name: str, flow: ContinuousFlow, truth: Any, nll: float, true_nll: float) -> Portrait:
    """Samples of a flow, and its density on a grid beside the true one.

    Args:
        name: what to call it.
        flow: of points in the plane.
        truth: the `PlaneDensity` that it learned.
        nll: the flow's on fresh points, to be told.
        true_nll: the density's own on the same.
    """
    with torch.no_grad():
        began = time.perf_counter()
        samples = flow.sample(SAMPLES)
        seconds = time.perf_counter() - began
        line = torch.linspace(-truth.extent, truth.extent, GRID, dtype=torch.float64)
        # Rows are y, columns are x.
        grid = torch.cartesian_prod(line, line).flip(1)
        carried = flow.transport(grid.float())
        density = (flow.base_log_prob(carried.value) + carried.log_det).exp()
    shape = (GRID, GRID)
    return Portrait(
        name, truth.extent, truth.log_prob(grid).exp().view(shape), density.view(shape), samples, nll, true_nll,
        int(carried.solution.stats.evaluations.max()), seconds,
    )  # fmt: skip


def _density(data: str) -> Any:
    """The `PlaneDensity` of that name."""
    # The data sets belong to training, which is right of the zoo: only this command, when it runs, may know of it.
    from ..train.data import load_data

    return load_data(data).density


def draw(portraits: Sequence[Portrait]) -> Figure:
    """One row a flow: the true density, the flow's, and samples of it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.2, 3.5 * len(portraits)), layout="constrained", facecolor="white")
    axes = figure.subplots(len(portraits), 3, squeeze=False)
    for row, portrait in zip(axes, portraits, strict=True):
        e = portrait.extent
        # Both densities in the same colours; the flow may overshoot.
        top = 1.15 * float(portrait.truth.max())
        for axis, values in zip(row, (portrait.truth, portrait.density), strict=False):
            axis.imshow(values.numpy(), origin="lower", extent=(-e, e, -e, e), cmap="magma", vmin=0, vmax=top)
        row[2].scatter(*portrait.samples.T.numpy(), s=1.2, color="#3b0f70", alpha=0.5, linewidths=0)
        row[0].set_title(f"true density: {portrait.true_nll:.3f} nats a point", fontsize=10)
        row[1].set_title(f"{portrait.name}: {portrait.nll:.3f} nats", fontsize=10)
        row[2].set_title(f"{len(portrait.samples):,} samples of the flow", fontsize=10)
        for axis in row:
            axis.set(xlim=(-e, e), ylim=(-e, e), aspect="equal", xticks=[], yticks=[])
    return figure
