"""Which data a run trains on, and which it measures."""

from __future__ import annotations

import dataclasses
from typing import Any

from .config import Config
from .data import (
    AnySource,
    Batches,
    DataError,
    FolderBatches,
    FolderSource,
    MixedBatches,
    Source,
    TextSource,
    TrajectorySource,
)


def split_batches(config: Config, source: AnySource, device: str = "cpu") -> tuple[Any, Any]:
    """The training batches, and those of the validation set where one is carved, else of the test set.

    Both have a length and `rows`, `epoch` and iteration as `Batches` has them.

    Raises:
        DataError: the validation set is larger than the training set, or an option does not fit the data.
    """
    data = config.data
    if not isinstance(source, Source | FolderSource):
        other = _cut(source, data.length)
        return other.batches(data.batch_size, data.eval_batch_size, data.validation, config.seed, device)
    train_set: Any = source.train
    held_out: Any = source.test
    if data.validation:
        if not 0 < data.validation < len(source.train):
            raise DataError(f"data.validation must lie in [0, {len(source.train)}); got {data.validation}.")
        train_set, held_out = _carve(source, data.validation)
    training: Batches | FolderBatches
    measured: Batches | FolderBatches
    if isinstance(source, Source):
        statistics = source.mean, source.std
        training = Batches(
            train_set, *statistics, data.batch_size, shuffle=True, augment=data.augment, seed=config.seed,
            device=device,
        )  # fmt: skip
        measured = Batches(held_out, *statistics, data.eval_batch_size, device=device)
    else:
        training = FolderBatches(
            train_set, source.how, data.batch_size, shuffle=True, transform=data.transform, augment=data.augment,
            seed=config.seed, device=device, workers=data.workers,
        )  # fmt: skip
        measured = FolderBatches(held_out, source.how, data.eval_batch_size, device=device, workers=data.workers)
    if data.mixup is None:
        return training, measured
    return MixedBatches(training, data.mixup, len(source.classes), config.seed), measured


def _cut(source: Any, length: int | None) -> Any:
    """Data whose training pieces are `length` long, where they are cut into pieces and a length is asked for."""
    if length is not None and isinstance(source, TextSource):
        return dataclasses.replace(source, length=length)
    if length is not None and isinstance(source, TrajectorySource):
        return dataclasses.replace(source, piece=length)
    return source


def _carve(source: Any, count: int) -> tuple[Any, Any]:
    """The training set without `count` examples, and those: the last, or of sorted files as many of every class."""
    if isinstance(source, Source):
        return source.train.take(slice(None, -count)), source.train.take(slice(-count, None))
    total = len(source.train)
    # Every so-many-th file: in a list that is sorted by class that is the same share of each.
    chosen = {(2 * i + 1) * total // (2 * count) for i in range(count)}
    kept = [i for i in range(total) if i not in chosen]
    return source.train.take(kept), source.train.take(sorted(chosen))
