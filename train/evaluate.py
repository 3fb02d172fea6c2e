"""Metrics of a model on its data."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from ..solvers.options import suggest
from ..zoo import create_model
from ..zoo.factory import Blueprint
from .data import Batches, DataError, FolderSource, Source, load_data
from .tasks import (
    DensityEstimation,
    DependencyParsing,
    EntityRecognition,
    ImageClassification,
    ImageDensity,
    LanguageModelling,
    SequenceTagging,
    SeriesClassification,
    Task,
)

# By the registry's word for what a model does; a new task is one line here.
TASKS: dict[str, Task] = {
    task.kind: task
    for task in (
        ImageClassification(), DensityEstimation(), SequenceTagging(), LanguageModelling(), SeriesClassification(),
        ImageDensity(),
        DependencyParsing(), EntityRecognition(),
    )
}  # fmt: skip


def evaluate_model(
    model: nn.Module | str,
    data_dir: str | Path | None = None,
    *,
    data: str | None = None,
    task: str = "image-classification",
    batch_size: int = 500,
    limit: int | None = None,
) -> dict[str, float]:
    """Metrics on the test set, as the model's card reports them.

    Args:
        model: a module, or the name of pretrained weights.
        data_dir: the folder that holds the data, where they need one.
        data: the data set; None takes it from the card.
        task: what the model does; a card's own word comes first.
        batch_size: images at a time.
        limit: only the first so many images.

    Returns:
        Metrics by name: for classifiers accuracy and cross_entropy, for equilibrium models also evaluations,
        evaluations_max, residual_max and converged.

    Raises:
        DataError: the data set is unknown, missing or damaged, or the model has no card and none was named.
        ZooError: the name is unknown, or the weights are damaged.
    """
    if isinstance(model, str):
        model = create_model(model, pretrained=True)
    blueprint = getattr(model, "blueprint", None)
    card = blueprint.card if isinstance(blueprint, Blueprint) else None
    if data is None:
        if card is None or card.data is None:
            raise DataError("The model has no card that names its data: give data=, such as data='digits'.")
        data = card.data.name
    kind = card.task if card is not None else task
    if kind not in TASKS:
        raise DataError(f"There is no task {kind!r}.{suggest(kind, list(TASKS))} Known: {', '.join(TASKS)}.")
    source = load_data(data, data_dir)
    if isinstance(source, FolderSource):
        source = source.fitted(None, card.input if card is not None else None)
    if not isinstance(source, Source):
        return TASKS[kind].evaluate(model, source.test_batches(batch_size, limit, _device(model)))
    mean, std = (card.input.mean, card.input.std) if card is not None and card.input else (source.mean, source.std)
    images = source.test if limit is None else source.test.take(slice(limit))
    return TASKS[kind].evaluate(model, Batches(images, mean, std, batch_size, device=_device(model)))


def _device(model: nn.Module) -> str:
    parameter = next(model.parameters(), None)
    return "cpu" if parameter is None else str(parameter.device)
