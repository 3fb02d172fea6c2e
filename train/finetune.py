"""To start from another model's weights: what stays as it is, and what has to fit."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from torch import nn

from ..solvers.options import suggest
from ..zoo.cards import NAME, ImageInput
from ..zoo.factory import Blueprint
from ..zoo.registry import resolve
from .config import Config, ModelConfig
from .data import AnySource
from .errors import TrainingError

BACKBONE = "backbone"


def input_of(model: ModelConfig) -> ImageInput | None:
    """How the pretrained model that is started from takes images; None without one.

    Raises:
        UnknownModelError: there is no such model.
    """
    card = resolve(model.name).card if model.pretrained else None
    return None if card is None else card.input


def check_fit(config: Config, model: nn.Module, source: AnySource) -> None:
    """Say before the first step what would fail at the last.

    Raises:
        TrainingError: the run's name is none that its model can be exported by, or the model has another number of
            classes than the data.
    """
    blueprint: Blueprint = model.blueprint  # type: ignore[assignment]
    if not NAME.fullmatch(config.name) or config.name.partition(".")[0] != blueprint.architecture:
        raise TrainingError(
            f"The run is called {config.name!r}, and its model is exported as {blueprint.architecture}.TAG: give "
            f"--name {blueprint.architecture}.mine, or another tag of small letters, digits, _ and -."
        )
    wanted = source.model_arguments.get("num_classes")
    has = getattr(model, "num_classes", wanted)
    if wanted is not None and has is not None and has < wanted:
        raise TrainingError(
            f"The model has {has} classes, and the labels of {source.name} go up to {wanted - 1}: leave "
            "model.arguments.num_classes out."
        )


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Keep the parameters whose names match one of `patterns`, with the wildcards of a shell, as they are.

    "backbone" stands for all but those of the classifier.

    Raises:
        TrainingError: a pattern matches nothing, or nothing is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        found = _backbone(model) if pattern == BACKBONE else fnmatch.filter(names, pattern)
        if not found:
            known = [BACKBONE, *names]
            raise TrainingError(
                f"model.freeze: no parameter matches {pattern!r}.{suggest(pattern, known)} There are: "
                f"{', '.join(known)}."
            )
        for name in found:
            model.get_parameter(name).requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise TrainingError("model.freeze: everything is frozen, and nothing is left to train.")


def _backbone(model: nn.Module) -> list[str]:
    if not hasattr(model, "get_classifier"):
        raise TrainingError(f"model.freeze: {type(model).__name__} has no get_classifier, so {BACKBONE!r} is unclear.")
    head = {id(p) for p in model.get_classifier().parameters()}  # type: ignore[operator]
    return [name for name, p in model.named_parameters() if id(p) not in head]
