"""From a trained model to the files that the zoo loads."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import nn

from ..zoo.cards import Card, Data
from ..zoo.factory import Blueprint
from ..zoo.files import write_atomically
from ..zoo.weights import pack_weights
from .config import Config
from .data import AnySource
from .picture import draw_picture, to_png


def export(
    model: nn.Module,
    folder: Path,
    config: Config,
    source: AnySource,
    metrics: dict[str, float],
    command: str,
) -> Path:
    """Write `NAME.safetensors`, its card `NAME.json` and where the task draws one the picture `NAME.png` to `folder`.

    A run with a validation set leaves the test set alone, and has no picture.

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
        epochs=config.epochs,
        note=config.note,
        published=tuple(config.published),
        **source.card_fields,
    )
    # A card that cannot be written must not leave weights behind that belong to none.
    card.to_json()
    write_atomically(folder / weights.file, content)
    path = folder / f"{config.name}.json"
    card.save(path)
    # After the rest: should the picture fail, the model is there.
    figure = None if config.data.validation else draw_picture(config.task, model, source)
    if figure is not None:
        card = dataclasses.replace(card, picture=f"{config.name}.png")
        write_atomically(folder / card.picture, to_png(figure))
        card.save(path)
    return path
