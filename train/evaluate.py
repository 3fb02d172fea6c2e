"""Metrics of a model on its data."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from torch import nn

from ..solvers.options import suggest
from ..zoo import Card, ImageInput, create_model
from ..zoo.factory import Blueprint
from . import tasks
from .data import DataError, FolderSource, load_data
from .data.measured import measured_batches
from .tasks import Task


def _all_tasks() -> dict[str, Task]:
    kinds = [kind for kind in vars(tasks).values() if isinstance(kind, type) and issubclass(kind, Task)]
    return {kind.kind: kind() for kind in kinds if not inspect.isabstract(kind)}


# By the registry's word for what a model does: all that `restpoint.train.tasks` exports.
TASKS: dict[str, Task] = _all_tasks()


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
    measure, source = task_of(model, task), source_of(model, data_dir, data)
    return measure.evaluate(model, measured_batches(source, batch_size, limit, _device(model), how=_how(model)))


def task_of(model: nn.Module, task: str = "image-classification") -> Task:
    """What a model is for: its card's word comes before `task`.

    Raises:
        DataError: there is no such task.
    """
    card = card_of(model)
    kind = card.task if card is not None else task
    if kind not in TASKS:
        raise DataError(f"There is no task {kind!r}.{suggest(kind, list(TASKS))} Known: {', '.join(TASKS)}.")
    return TASKS[kind]


def source_of(model: nn.Module, data_dir: str | Path | None = None, data: str | None = None) -> Any:
    """The data set `data`, or where it is None the one that the model's card names, as the model takes it.

    Raises:
        DataError: the data set is unknown, missing or damaged, or the model has no card and none was named.
    """
    card = card_of(model)
    if data is None:
        if card is None or card.data is None:
            raise DataError("The model has no card that names its data: give data=, such as data='digits'.")
        data = card.data.name
    source = load_data(data, data_dir)
    return source.fitted(None, _how(model)) if isinstance(source, FolderSource) else source


def first_batch(model: nn.Module, data_dir: str | Path | None = None, count: int = 64) -> Any:
    """The first `count` examples that a pretrained model is measured on, as one batch.

    Raises:
        DataError: the data set is unknown, missing or damaged, or the model has no card.
    """
    return next(iter(measured_batches(source_of(model, data_dir), count, count, _device(model), how=_how(model))))


def card_of(model: nn.Module) -> Card | None:
    """The card of the weights that `create_model` put into the model."""
    blueprint = getattr(model, "blueprint", None)
    return blueprint.card if isinstance(blueprint, Blueprint) else None


def _how(model: nn.Module) -> ImageInput | None:
    card = card_of(model)
    return card.input if card is not None else None


def _device(model: nn.Module) -> str:
    parameter = next(model.parameters(), None)
    return "cpu" if parameter is None else str(parameter.device)
