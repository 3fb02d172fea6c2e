"""Pictures of what flows make, beside what they learned from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = 4


def tiled(images: Tensor, columns: int) -> Tensor:
    """Images (n, channels, height, width), n a multiple of `columns`, as one (channels, rows height, columns width)."""
    n, channels, height, width = images.shape
    grid = images.view(n // columns, columns, channels, height, width).permute(2, 0, 3, 1, 4)
    return grid.reshape(channels, n // columns * height, columns * width)


def image_figure(panels: dict[str, Float[Tensor, "n channels height width"]], columns: int = 8) -> Figure:
    """A grid of images in [0, 1] for each title; n is a multiple of `columns`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(panels), 4.8), layout="constrained", facecolor="white")
    axes = figure.subplots(1, len(panels), squeeze=False, gridspec_kw={"wspace": 0.08})[0]
    for axis, (title, images) in zip(axes, panels.items(), strict=True):
        # Digits fill their images, and would run into each other.
        pixels = tiled(functional.pad(images, (1, 1, 1, 1)), columns).permute(1, 2, 0)
        if pixels.shape[2] == 1:
            axis.imshow(pixels[:, :, 0].numpy(), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
        else:
            axis.imshow(pixels.numpy(), interpolation="nearest")
        axis.set_title(title, fontsize=10)
        axis.set_axis_off()
    return figure


def table_figure(rows: Float[Tensor, "n dim"], samples: Float[Tensor, "m dim"], title: str) -> Figure:
    """The last column against the first ones: of measured rows above, of samples below."""
    from matplotlib.figure import Figure

    count = min(COLUMNS, rows.shape[1] - 1)
    figure = Figure(figsize=(2.3 * count, 4.9), layout="constrained", facecolor="white")
    axes = figure.subplots(2, count, squeeze=False, sharex="col", sharey=True)
    for line, points, colour, what in zip(
        axes, (rows, samples), ("#555555", "#3b0f70"), ("measured rows", "samples of the flow"), strict=True
    ):
        for k, axis in enumerate(line):
            axis.scatter(points[:, k].numpy(), points[:, -1].numpy(), s=2, color=colour, alpha=0.5, linewidths=0)
        line[0].set_ylabel(f"{what}\nlast column", fontsize=9)
    for k, axis in enumerate(axes[1]):
        low, high = float(rows[:, k].min()), float(rows[:, k].max())
        axis.set(xlim=(low - 0.3, high + 0.3), ylim=(float(rows[:, -1].min()) - 0.3, float(rows[:, -1].max()) + 0.3))
        axis.set_xlabel(f"column {k + 1}", fontsize=9)
    figure.suptitle(title, fontsize=10)
    return figure
