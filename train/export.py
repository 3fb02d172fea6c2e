"""From a trained model to the two files that the zoo loads."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ..zoo.cards import Card, Data
from ..zoo.factory import Blueprint
from ..zoo.files import write_atomically
from ..zoo.weights import pack_weights
from .config import Config
from .data import AnySource


def export(
    model: nn.Module,
    folder: Path,
    config: Config,
    source: AnySource,
    metrics: dict[str, float],
    command: str,
) -> Path:
    """Write `NAME.safetensors` and its card `NAME.json` to `folder`.

    Args:
        model: with the weights to ship, built by `create_model`.
        folder: made where it does not exist.
        config: of the run.
        source: the data it was trained on.
        metrics: measured on these weights.
        command: that trained them.

    Returns:
        The path of the card.

    Raises:
        CardError: an argument that a card cannot hold, or a name that is no architecture.tag.
        OSError: the folder cannot be written.
    """
    blueprint: Blueprint = model.blueprint  # type: ignore[assignment]
    content, weights = pack_weights(model, f"{config.name}.safetensors")
    measured = source.split
    if config.data.validation:
        measured += f"; {config.data.validation} training images were set aside, and these metrics measured on them"
    card = Card(
        name=config.name,
        architecture=blueprint.architecture,
        arguments=blueprint.arguments,
        task=config.task.kind,
        weights=weights,
        parameters=sum(p.numel() for p in model.parameters()),
        torch=torch.__version__,
        data=Data(source.name, measured, source.licence, source.citation),
        metrics=metrics,
        seed=config.seed,
        command=command,
        **source.card_fields,
    )
    # A card that cannot be written must not leave weights behind that belong to none.
    card.to_json()
    write_atomically(folder / weights.file, content)
    path = folder / f"{config.name}.json"
    card.save(path)
    return path
