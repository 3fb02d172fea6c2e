"""What each set of pretrained weights reaches and costs, from its card and from running it here."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..solvers.diagnose import peak_memory
from .cards import Card
from .factory import create_model

# What stands for a model of a task, and what one use of it is.
METRICS = {"image-classification": "accuracy", "density": "nll"}
USES: dict[str, Callable[[Any, Tensor], Tensor]] = {"density": lambda model, inputs: model.log_prob(inputs)}
REPEATS = 5


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
    checkpoint: float


def result(card: Card, inputs: Tensor | None) -> Result:
    """The row of one card.

    Args:
        card: of pretrained weights.
        inputs: a batch of the model's test data, on which time and memory are measured; None leaves them out.

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
        checkpoint=card.weights.size / 2**10,
    )
    if inputs is None:
        return row
    model = create_model(card.name, pretrained=True).eval()
    use = USES.get(card.task, lambda model, inputs: model(inputs))
    return dataclasses.replace(
        row,
        evaluations=_evaluations(model, inputs) if row.evaluations is None else row.evaluations,
        milliseconds=1000 * _seconds(lambda: use(model, inputs)) / len(inputs),
        memory=_peak(lambda: use(model, inputs)),
        memory_backward=peak_memory(lambda: use(model, inputs).sum().backward()) / 2**20,
    )


def main_metric(card: Card) -> str | None:
    """The metric by which models of the card's task are compared; the card's first where there is no such."""
    wanted = METRICS.get(card.task)
    return wanted if wanted in card.metrics else next(iter(card.metrics), None)


def _evaluations(model: nn.Module, inputs: Tensor) -> float | None:
    if not hasattr(model, "solve"):
        return None
    with torch.no_grad():
        solved = model.solve(inputs)  # type: ignore[operator]
    solutions = solved if isinstance(solved, Sequence) else [solved]
    return float(sum(solution.stats.evaluations.double().mean() for solution in solutions))


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
