"""Images as whole numbers, for models of their probability."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from .batches import generator_of, part_of
from .digits import digits
from .mnist import mnist
from .source import DataError, ImageSet, Source, register_data

Pixels = tuple[UInt8[Tensor, "batch channels height width"], Int[Tensor, " batch"]]


class PixelBatches:
    """Batches of images of whole numbers with their labels.

    Args:
        data: the images.
        batch_size: images a batch. A last, smaller batch is dropped where `shuffle` is set and kept elsewhere.
        shuffle: a new order each epoch.
        seed: of the order.
        device: where the batches go.

    Raises:
        ValueError: the batch size is below one, or shuffled data fill no batch.
    """

    def __init__(
        self,
        data: ImageSet,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {batch_size}.")
        if shuffle and len(data) < batch_size:
            raise ValueError(f"{len(data)} training images do not fill one batch of {batch_size}.")
        self.data, self.batch_size, self.shuffle, self.seed, self.device = data, batch_size, shuffle, seed, device

    def __len__(self) -> int:
        full, rest = divmod(len(self.data), self.batch_size)
        return full if self.shuffle or rest == 0 else full + 1

    def rows(self, place: int) -> int:
        """Images in batch `place` of an epoch."""
        return min(self.batch_size, len(self.data) - place * self.batch_size)

    def epoch(self, index: int = 0, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[Pixels]:
        """The batches of epoch `index`, from batch `start` on; of each the part of process `rank` of `world`."""
        order = torch.arange(len(self.data))
        if self.shuffle:
            order = torch.randperm(len(self.data), generator=generator_of(self.seed, index, 0))
        for place in range(start, len(self)):
            rows = order[place * self.batch_size : (place + 1) * self.batch_size]
            part = self.data.take(rows[part_of(len(rows), rank, world)])
            yield part.images.to(self.device), part.labels.to(self.device)

    def __iter__(self) -> Iterator[Pixels]:
        return self.epoch(0)


@dataclasses.dataclass(frozen=True)
class PixelSource:
    """A set of images whose pixels stay whole numbers.

    Attributes:
        name: by which recipes and cards call it.
        images: where they come from.
        every: each so-many-th image of its test set is measured: a likelihood takes a solve of hundreds of
            evaluations an image.
    """

    name: str
    images: Source
    every: int = 1

    @property
    def split(self) -> str:
        """The two parts in words."""
        if self.every == 1:
            return self.images.split
        return f"{self.images.split}, of which every {self.every}th: {len(self.test):,} images"

    @property
    def licence(self) -> str:
        """Of the data."""
        return self.images.licence

    @property
    def citation(self) -> str:
        """Where they come from."""
        return self.images.citation

    @property
    def test(self) -> ImageSet:
        """The images that are measured."""
        return self.images.test.take(slice(None, None, self.every))

    @property
    def model_arguments(self) -> dict[str, object]:
        """What the data say about a model: an image's size, and how many values a pixel has."""
        return {"shape": tuple(self.images.train.images.shape[1:]), "levels": self.images.train.white + 1}

    @property
    def card_fields(self) -> dict[str, object]:
        """What the data say on a card."""
        return {}

    def batches(
        self, batch_size: int, eval_batch_size: int, validation: int, seed: int, device: str
    ) -> tuple[PixelBatches, PixelBatches]:
        """Images to train on, and those to measure on: of the test set, or the last so many others for `validation`."""
        training, held_out = self.images.train, self.test
        if validation:
            if not 0 < validation < len(training):
                raise DataError(f"data.validation must lie in [0, {len(training)}); got {validation}.")
            training, held_out = training.take(slice(None, -validation)), training.take(slice(-validation, None))
        return (
            PixelBatches(training, batch_size, shuffle=True, seed=seed, device=device),
            PixelBatches(held_out, eval_batch_size, device=device),
        )

    def test_batches(self, batch_size: int, limit: int | None = None, device: str = "cpu") -> PixelBatches:
        """The images that metrics are reported on, or the first so many of them."""
        images = self.test if limit is None else self.test.take(slice(limit))
        return PixelBatches(images, batch_size, device=device)


def _register(load_images: Callable[[Path | None], Source], every: int) -> None:
    name = f"{load_images.__name__}_pixels"

    def load(data_dir: Path | None = None) -> PixelSource:
        return PixelSource(name, load_images(data_dir), every)

    load.__name__ = name
    load.__doc__ = f"{(load_images.__doc__ or '').splitlines()[0]} As whole numbers."
    register_data(load)


_register(digits, 1)
_register(mnist, 20)
