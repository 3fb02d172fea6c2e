"""Batches of images whose order and augmentation are functions of seed and epoch, so that a run can be resumed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from .augment import Affine
from .source import ImageSet

Batch = tuple[Float[Tensor, "batch channels height width"], Int[Tensor, " batch"]]
# Labels are shares of classes.
Mixed = tuple[Float[Tensor, "batch channels height width"], Float[Tensor, "batch classes"]]


class Batches:
    """Batches of normalised images with their labels.

    Args:
        data: the images.
        mean, std: per channel.
        batch_size: images a batch. A last, smaller batch is dropped where `shuffle` is set and kept elsewhere.
        shuffle: a new order each epoch.
        augment: applied to every image, or None.
        seed: of the order and the augmentation.
        device: where the batches go.

    Raises:
        ValueError: the batch size is below one, or shuffled data fill no batch.
    """

    def __init__(
        self,
        data: ImageSet,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        batch_size: int,
        *,
        shuffle: bool = False,
        augment: Affine | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {batch_size}.")
        if shuffle and len(data) < batch_size:
            raise ValueError(f"{len(data)} training images do not fill one batch of {batch_size}.")
        self.data, self.batch_size, self.shuffle = data, batch_size, shuffle
        self.augment, self.seed, self.device = augment, seed, device
        self.mean, self.std = torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)

    def __len__(self) -> int:
        full, rest = divmod(len(self.data), self.batch_size)
        return full if self.shuffle or rest == 0 else full + 1

    def rows(self, place: int) -> int:
        """Images in batch `place` of an epoch."""
        return min(self.batch_size, len(self.data) - place * self.batch_size)

    def epoch(self, index: int = 0, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """The batches of epoch `index`, from batch `start` on; of each the part of process `rank` of `world`.

        Every batch has a generator of its own, seeded by seed, epoch and place, so that starting in the middle gives
        what an uninterrupted epoch would have given, and the parts of all processes what one would have had.
        """
        order = torch.arange(len(self.data))
        if self.shuffle:
            order = torch.randperm(len(self.data), generator=generator_of(self.seed, index, 0))
        for place in range(start, len(self)):
            rows = order[place * self.batch_size : (place + 1) * self.batch_size]
            mine = part_of(len(rows), rank, world)
            part = self.data.take(rows[mine])
            images = part.images.float() / part.white
            if self.augment is not None:
                images = self.augment(images, generator_of(self.seed, index, place + 1), mine, len(rows))
            yield ((images - self.mean) / self.std).to(self.device), part.labels.to(self.device)

    def __iter__(self) -> Iterator[Batch]:
        return self.epoch(0)


def part_of(rows: int, index: int, count: int) -> slice:
    """The `index`-th of `count` runs of `rows` rows, as equal as can be."""
    return slice(rows * index // count, rows * (index + 1) // count)


def generator_of(*numbers: int) -> Generator:
    """A generator whose stream is a function of all `numbers`, such as seed, epoch and place."""
    # A splitmix-like fold: neighbouring seeds, epochs and places must not share streams.
    state = 0
    for number in numbers:
        state = (state ^ (number + 0x9E3779B9)) * 0xBF58476D1CE4E5B9 % 2**63
    return Generator().manual_seed(state)
