"""Image files through a pretrained classifier."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from .cards import Card, ImageInput
from .errors import ZooError

MODES = {1: "L", 3: "RGB"}


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a classifier says about one file.

    Attributes:
        file: as it was given.
        labels: of the most probable classes, the best first.
        probabilities: of these classes.
        error: why the file could not be read; the other fields are then empty.
    """

    file: str
    labels: tuple[str, ...] = ()
    probabilities: tuple[float, ...] = ()
    error: str | None = None


def read_image(path: str | Path, how: ImageInput) -> Tensor:
    """The image file as an input of shape `how.shape`, in float32.

    Raises:
        OSError: the file is missing, or is no whole image.
        ValueError: its pixels have more than 8 bits, or the model wants neither 1 nor 3 channels.
    """
    channels, height, width = how.shape
    if channels not in MODES:
        raise ValueError(f"The model takes {channels} channels; an image file gives 1 or 3.")
    with Image.open(path) as image:
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"its pixels have more than 8 bits (mode {image.mode}); convert it first")
        resized = image.convert(MODES[channels]).resize((width, height), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(resized, dtype=np.float32) / 255).reshape(height, width, channels)
    mean, std = torch.tensor(how.mean), torch.tensor(how.std)
    return ((pixels - mean) / std).permute(2, 0, 1)


def predict_files(
    model: nn.Module, card: Card, files: Sequence[str | Path], top: int = 1, batch_size: int = 64
) -> Iterator[Prediction]:
    """Classify image files, in their order; one that cannot be read is reported and stops nothing.

    Args:
        model: the card's model, in evaluation mode.
        card: says how an image becomes an input, and what the classes are called.
        files: paths of images.
        top: how many classes to give for each.
        batch_size: how many images go through the model at a time.

    Raises:
        ZooError: the card does not describe an image classifier.
        ValueError: `top` or `batch_size` is not positive.
    """
    if card.task != "image-classification":
        raise ZooError(f"{card.name} does not classify images: its task is {card.task}.")
    if card.input is None:
        raise ZooError(f"The card of {card.name} does not say how an image becomes an input: its `input` is missing.")
    if top < 1 or batch_size < 1:
        raise ValueError(f"top and batch_size must be positive; got {top} and {batch_size}.")
    for start in range(0, len(files), batch_size):
        yield from _predict_batch(model, card, card.input, files[start : start + batch_size], top)


def _predict_batch(
    model: nn.Module, card: Card, how: ImageInput, files: Sequence[str | Path], top: int
) -> Iterator[Prediction]:
    inputs: list[Tensor] = []
    failed: dict[int, str] = {}
    for position, file in enumerate(files):
        try:
            inputs.append(read_image(file, how))
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            # Some name the file, which is said anyway.
            failed[position] = (error.strerror if isinstance(error, OSError) else None) or str(error)
    rows: Iterator[tuple[list[float], list[int]]] = iter(())
    if inputs:
        with torch.no_grad():
            probabilities = model(torch.stack(inputs)).softmax(dim=1)
        best = probabilities.topk(min(top, probabilities.shape[1]), dim=1)
        rows = iter(zip(best.values.tolist(), best.indices.tolist(), strict=True))
    for position, file in enumerate(files):
        if position in failed:
            yield Prediction(str(file), error=failed[position])
        else:
            values, indices = next(rows)
            labels = tuple(card.labels[i] if card.labels else str(i) for i in indices)
            yield Prediction(str(file), labels, tuple(values))
