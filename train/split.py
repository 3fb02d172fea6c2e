"""Which data a run trains on, and which it measures."""

from __future__ import annotations

from .config import Config
from .data import Batches, DataError, PointBatches, PointSource, SentenceBatches, Source, TaggedSource


def split_batches(
    config: Config, source: Source | PointSource | TaggedSource, device: str = "cpu"
) -> tuple[Batches, Batches] | tuple[PointBatches, PointBatches] | tuple[SentenceBatches, SentenceBatches]:
    """The training batches, and those of the validation set where one is carved, else of the test set.

    Raises:
        DataError: the validation set is larger than the training set.
    """
    data = config.data
    if isinstance(source, PointSource | TaggedSource):
        return source.batches(data.batch_size, data.eval_batch_size, data.validation, config.seed, device)
    train_set, held_out = source.train, source.test
    if data.validation:
        if not 0 < data.validation < len(source.train):
            raise DataError(f"data.validation must lie in [0, {len(source.train)}); got {data.validation}.")
        train_set = source.train.take(slice(None, -data.validation))
        held_out = source.train.take(slice(-data.validation, None))
    statistics = source.mean, source.std
    return (
        Batches(
            train_set, *statistics, data.batch_size, shuffle=True, augment=data.augment, seed=config.seed,
            device=device,
        ),
        Batches(held_out, *statistics, data.eval_batch_size, device=device),
    )  # fmt: skip
