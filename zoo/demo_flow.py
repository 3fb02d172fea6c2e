"""The demonstration's second part: pretrained flows beside the densities that they learned."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from ..models.flow import FFJORD
from .factory import create_model
from .registry import load_card

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
        nll: mean negative log density of fresh points, in nats, as the card says.
        true_nll: that of the true density on the same points.
    """

    name: str
    extent: float
    truth: Float[Tensor, "grid grid"]
    density: Float[Tensor, "grid grid"]
    samples: Float[Tensor, "n 2"]
    nll: float
    true_nll: float


def main(output: Path, names: Sequence[str] = NAMES) -> None:
    """Draw samples and densities of pretrained flows to `output`, and print how good and how hard they are.

    Raises:
        ZooError: no such model, or its weights are damaged.
    """
    print("a flow carries the normal density to that of the data along the trajectories of dy/dt = f(t, y)")
    portraits = [_portrait(name) for name in names]
    draw(output, portraits)
    print(f"picture      {output.resolve()}")


def _portrait(name: str) -> Portrait:
    card = load_card(name)
    assert card.data is not None
    flow = cast(FFJORD, create_model(name, pretrained=True).eval())
    truth = _density(card.data.name)
    began = time.perf_counter()
    with torch.no_grad():
        samples = flow.sample(SAMPLES)
        seconds = time.perf_counter() - began
        line = torch.linspace(-truth.extent, truth.extent, GRID, dtype=torch.float64)
        # Rows are y, columns are x.
        grid = torch.cartesian_prod(line, line).flip(1)
        carried = flow.transport(grid.float())
        density = (flow.base_log_prob(carried.value) + carried.log_det).exp()
    cell = float(line[1] - line[0]) ** 2
    print(f"\n{name}: {card.parameters:,} parameters")
    nll, true_nll = card.metrics["nll"], card.metrics["true_nll"]
    print(f"  -log p     {nll:.3f} nats a fresh point; the true density's own {true_nll:.3f}")
    print(f"  total      {float(density.sum()) * cell:.4f}, the density added up over the picture's {GRID}^2 cells")
    evaluations = int(carried.solution.stats.evaluations.max())
    print(f"  samples    {SAMPLES:,} in {seconds:.2f} s; a density takes {evaluations} evaluations of f")
    shape = (GRID, GRID)
    exact = truth.log_prob(grid).exp().view(shape)
    return Portrait(name, truth.extent, exact, density.view(shape), samples, nll, true_nll)


def _density(data: str) -> Any:
    """The `PlaneDensity` of that name."""
    # The data sets belong to training, which is right of the zoo: only this command, when it runs, may know of it.
    from ..train.data import load_data

    return load_data(data).density


def draw(path: Path, portraits: Sequence[Portrait]) -> None:
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
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
