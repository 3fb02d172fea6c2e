"""What each set of pretrained weights reaches and costs, from its card and from running it here."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..solvers.diagnose import peak_memory
from .cards import Card
from .factory import create_model
from .steps import forced_steps, seen_spans
from .watch import watched

# What a user does with a model, on one batch.
Use = Callable[[nn.Module, Any], Any]
REPEATS = 5
STEPS = 16


@dataclasses.dataclass(frozen=True)
class Result:
    """One set of weights.

    Attributes:
        model: its name.
        data: what it was trained on.
        parameters: how many.
        metric: the card's main metric, and `value` what it is on the test data.
        value: as the card says.
        published: what the literature reports of it, or None.
        evaluations: of the cell or field, the mean per sample: the card's, or where it has none those of the
            measurement; None for models without a solve.
        milliseconds: of processor time per sample of a batch without gradients, on one thread.
        memory: peak of the same in MiB, beyond model and inputs; for the whole batch.
        memory_backward: peak of forward and backward pass in MiB, for the whole batch.
        memory_growth: what that peak is multiplied by when every solve takes 64 steps instead of 16: about 1 where
            training keeps nothing of a solve's steps, 2 for their square root, up to 4 where it keeps them all; None
            for models without a solve that can be told how long to be.
        checkpoint: size of the file of weights in KiB.
    """

    model: str
    data: str | None
    parameters: int
    metric: str | None
    value: float | None
    published: float | None
    evaluations: float | None
    milliseconds: float | None
    memory: float | None
    memory_backward: float | None
    memory_growth: float | None
    checkpoint: float


def result(card: Card, batch: Any = None, use: Use | None = None) -> Result:
    """The row of one card.

    Args:
        card: of pretrained weights.
        batch: of the model's test data, on which time and memory are measured; None leaves them out.
        use: what is measured: it returns tensors, or a structure of them, that gradients can be computed of.

    Raises:
        ZooError: the weights are missing or damaged.
    """
    metric = main_metric(card)
    row = Result(
        model=card.name,
        data=card.data.name if card.data else None,
        parameters=card.parameters,
        metric=metric,
        value=card.metrics[metric] if metric else None,
        published=next((figure.value for figure in card.published if figure.metric == metric), None),
        evaluations=card.metrics.get("evaluations"),
        milliseconds=None,
        memory=None,
        memory_backward=None,
        memory_growth=None,
        checkpoint=card.weights.size / 2**10,
    )
    if batch is None or use is None:
        return row
    model = create_model(card.name, pretrained=True).eval()
    return dataclasses.replace(
        row,
        evaluations=_evaluations(model, batch, use) if row.evaluations is None else row.evaluations,
        milliseconds=1000 * _seconds(lambda: use(model, batch)) / _rows(batch),
        memory=_peak(lambda: use(model, batch)),
        memory_backward=_peak_backward(model, batch, use) / 2**20,
        memory_growth=_growth(model, batch, use),
    )


def main_metric(card: Card) -> str | None:
    """The metric by which models of the card's task are compared: the card's first."""
    return next(iter(card.metrics), None)


def _rows(batch: Any) -> int:
    return len(_tensors(batch)[0])


def _tensors(structure: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(structure) if isinstance(leaf, Tensor)]


def _peak_backward(model: nn.Module, batch: Any, use: Use) -> int:
    """The most bytes alive in a forward and backward pass; the parameters' gradients are part of them."""

    def run() -> None:
        made = [leaf for leaf in _tensors(use(model, batch)) if leaf.requires_grad]
        sum((leaf.sum() for leaf in made), torch.zeros(())).backward()

    try:
        return peak_memory(run)
    finally:
        model.zero_grad()


def _growth(model: nn.Module, batch: Any, use: Use) -> float | None:
    """The peak of forward and backward with solves of four times as many steps, over that with so many."""
    with torch.no_grad():
        spans = seen_spans(model, lambda: use(model, batch))
    peaks = []
    for steps in (STEPS, 4 * STEPS):
        with forced_steps(model, steps, spans) as solves:
            if not solves:
                return None
            peaks.append(_peak_backward(model, batch, use))
    return peaks[1] / peaks[0]


def _evaluations(model: nn.Module, batch: Any, use: Use) -> float | None:
    with torch.no_grad(), watched(model) as solves:
        use(model, batch)
    return float(sum(solution.stats.evaluations.double().mean() for solution in solves)) if solves else None


def _peak(run: Callable[[], Any]) -> float:
    with torch.no_grad():
        return peak_memory(run) / 2**20


def _seconds(run: Callable[[], Any]) -> float:
    """The least processor time of several runs on one thread, after one that pays for what torch sets up."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            run()
            times = []
            for _ in range(REPEATS):
                began = time.process_time()
                run()
                times.append(time.process_time() - began)
    finally:
        torch.set_num_threads(threads)
    return min(times)
