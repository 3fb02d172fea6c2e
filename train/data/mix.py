"""Mixup and cutmix of whole batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from timm.data import Mixup

from .batches import Batches, Mixed
from .folder import FolderBatches
from .seeded import seeded
from .source import DataError


class MixedBatches:
    """Batches whose images are mixed with each other, and whose labels are shares of classes.

    Args:
        batches: of images and labels; each process must get an even number of images a batch.
        options: of `timm.data.Mixup`, such as mixup_alpha, cutmix_alpha and prob.
        classes: how many there are.
        seed: of the mixing.

    Raises:
        DataError: an option that `timm.data.Mixup` does not have.

    Source: Zhang et al. 2018 (mixup); Yun et al. 2019 (cutmix).
    """

    def __init__(self, batches: Batches | FolderBatches, options: dict[str, Any], classes: int, seed: int = 0) -> None:
        try:
            # The task smooths labels by itself.
            self.mix = Mixup(**{"label_smoothing": 0.0, **options, "num_classes": classes})
        except TypeError as error:
            raise DataError(f"data.mixup: {error}; its keys are the options of timm.data.Mixup.") from error
        self.batches, self.seed = batches, seed

    def __len__(self) -> int:
        return len(self.batches)

    def rows(self, place: int) -> int:
        """Images in batch `place` of an epoch."""
        return self.batches.rows(place)

    def epoch(self, index: int = 0, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[Mixed]:
        """The batches of epoch `index`, from batch `start` on, a function of seed, epoch, place and process."""
        for place, (images, labels) in enumerate(self.batches.epoch(index, start, rank, world), start):
            if len(images) % 2:
                raise DataError(f"data.mixup mixes pairs of images, and a process got {len(images)} of them.")
            with seeded(self.seed, index, place, rank):
                yield self.mix(images, labels)
