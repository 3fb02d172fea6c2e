"""Pictures of what a model does, for its card."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import nn

from ..zoo import create_model
from .evaluate import source_of, task_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .tasks import Task

LARGEST = 120_000
DPI, COARSEST = 110, 40


def picture(name: str, data_dir: str | Path | None = None) -> Figure | None:
    """The picture of a pretrained model, drawn anew from its weights and its test data.

    Args:
        name: of pretrained weights.
        data_dir: the folder that holds the data, where they need one.

    Returns:
        A figure of matplotlib; None where the task draws none.

    Raises:
        DataError: the data set is unknown, missing or damaged.
        ZooError: the name is unknown, or the weights are damaged.
    """
    model = create_model(name, pretrained=True)
    return draw_picture(task_of(model), model, source_of(model, data_dir))


def draw_picture(task: Task, model: nn.Module, source: Any) -> Figure | None:
    """`task.draw` with what it is promised: eval mode, no gradients, a seed; the global generator is left as it was."""
    was_training = model.training
    model.eval()
    devices = list({p.device for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)
            return task.draw(model, source)
    finally:
        model.train(was_training)


def to_png(figure: Figure, largest: int = LARGEST) -> bytes:
    """The figure as a PNG of at most so many bytes: in fewer colours, and then in fewer pixels, where it must be.

    Raises:
        ValueError: it is too intricate for that.
    """
    dpi = DPI
    while dpi >= COARSEST:
        drawn = io.BytesIO()
        figure.savefig(drawn, format="png", dpi=dpi, metadata={"Software": None})
        if len(drawn.getvalue()) <= largest:
            return drawn.getvalue()
        reduced = io.BytesIO()
        Image.open(drawn).convert("RGB").quantize(256).save(reduced, format="png", optimize=True)
        if len(reduced.getvalue()) <= largest:
            return reduced.getvalue()
        dpi = dpi * 4 // 5
    raise ValueError(f"The picture takes more than {largest:,} bytes at every resolution: draw less.")
