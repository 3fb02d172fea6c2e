"""The batches that metrics are reported on, of a data set of any kind."""

from __future__ import annotations

from typing import Any

from ...zoo.cards import ImageInput
from .batches import Batches
from .source import AnySource, Source


def measured_batches(
    source: AnySource,
    batch_size: int,
    limit: int | None = None,
    device: str = "cpu",
    *,
    how: ImageInput | None = None,
) -> Any:
    """The test set in batches.

    Args:
        source: a data set.
        batch_size: examples a batch.
        limit: only the first so many examples.
        device: where the batches go.
        how: the normalisation that a pretrained model was trained with, for images in memory; None for the data's own.
    """
    if not isinstance(source, Source):
        other: Any = source
        return other.test_batches(batch_size, limit, device)
    mean, std = (source.mean, source.std) if how is None else (how.mean, how.std)
    images = source.test if limit is None else source.test.take(slice(limit))
    return Batches(images, mean, std, batch_size, device=device)
