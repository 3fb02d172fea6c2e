"""What a data set is, and the data sets by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from jaxtyping import Int, UInt8
from torch import Tensor

from ...solvers.options import suggest
from ...zoo.cards import ImageInput

Load = TypeVar("Load", bound=Callable[[Path | None], Any])


class DataError(ValueError):
    """Data that are missing, of another layout, or damaged; the message names the place and what to do."""


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Labelled images in memory.

    Attributes:
        images: grey or colour values from 0 to `white`.
        labels: class indices.
        white: the value that becomes 1.
    """

    images: UInt8[Tensor, "n channels height width"]
    labels: Int[Tensor, " n"]
    white: int = 255

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor | slice) -> ImageSet:
        """The images at `indices`."""
        return dataclasses.replace(self, images=self.images[indices], labels=self.labels[indices])


@runtime_checkable
class AnySource(Protocol):
    """What a run asks of a data set of any kind: batches to train on and to measure, and what a card says of them.

    What is not a `Source` or `FolderSource` also has `batches(batch_size, eval_batch_size, validation, seed, device)`,
    the training batches and those to measure, and `test_batches(batch_size, limit, device)`. Batches have a length,
    `rows(place)`, how many examples batch `place` of an epoch has, and `epoch(index, start, rank, world)`, the batches
    of an epoch from `start` on, of each the part of process `rank` of `world`, all a function of the seed.

    Attributes:
        name: by which recipes and cards call it.
        split: its parts in words.
        licence: of the data.
        citation: where they come from.
    """

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def split(self) -> str: ...  # noqa: D102

    @property
    def licence(self) -> str: ...  # noqa: D102

    @property
    def citation(self) -> str: ...  # noqa: D102

    @property
    def model_arguments(self) -> dict[str, int]:
        """What the data say about a model."""

    @property
    def card_fields(self) -> dict[str, Any]:
        """What the data say on a card."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A data set with its fixed split and its papers.

    Attributes:
        name: by which recipes and cards call it.
        train: what models are trained on, and validation sets are carved from.
        test: what metrics are reported on, and nothing is chosen by.
        classes: the name of each label.
        mean, std: per channel, of the training images in [0, 1]; inputs are (image - mean) / std.
        split: the two parts in words.
        licence: of the data.
        citation: where the data come from.
    """

    name: str
    train: ImageSet
    test: ImageSet
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    split: str
    licence: str
    citation: str

    def __post_init__(self) -> None:
        for part, data in (("training", self.train), ("test", self.test)):
            outside = ((data.labels < 0) | (data.labels >= len(self.classes))).nonzero().flatten()
            if len(outside):
                first = int(outside[0])
                raise DataError(
                    f"{self.name}: {part} image {first} has the label {int(data.labels[first])}, and there are "
                    f"{len(self.classes)} classes, 0 to {len(self.classes) - 1}."
                )

    @property
    def model_arguments(self) -> dict[str, int]:
        """What the data say about a model: its classes and the image's channels."""
        return {"num_classes": len(self.classes), "in_chans": self.train.images.shape[1]}

    @property
    def card_fields(self) -> dict[str, Any]:
        """What the data say on a card: how an image becomes an input, and what the classes are called."""
        shape = tuple(self.train.images.shape[1:])
        return {"input": ImageInput(shape, self.mean, self.std), "labels": self.classes}  # type: ignore[arg-type]


# What they return is a `Source`, or another kind of data with the same properties, such as a `PointSource`.
DATASETS: dict[str, Callable[[Path | None], Any]] = {}


def register_data(load: Load) -> Load:
    """Register a function from a data folder, or None, to a data set, under its own name."""
    DATASETS[load.__name__] = load
    return load


def load_data(name: str, data_dir: str | Path | None = None) -> Any:
    """A data set by name.

    Args:
        name: a key of `DATASETS`.
        data_dir: the folder that holds it, in the layout of its usual loader; None where none is needed.

    Raises:
        DataError: the name is unknown, or the folder does not hold the data.
    """
    if name not in DATASETS:
        raise DataError(f"There is no data set {name!r}.{suggest(name, list(DATASETS))} Known: {', '.join(DATASETS)}.")
    return DATASETS[name](None if data_dir is None else Path(data_dir))
