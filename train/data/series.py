"""Irregular series with missing values, in batches that are a function of seed and epoch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .batches import generator_of, part_of
from .source import DataError


@dataclasses.dataclass(frozen=True)
class Series:
    """A batch of irregularly sampled series with missing values.

    Attributes:
        times: since the start, ascending; behind a series' end its last time again.
        values: standardised; zero where nothing was observed.
        observed: which values were measured. Behind a series' end nothing is.
        static: what does not change, standardised, and zero where it is unknown.
        outcome: 1.0 where the event came, else 0.0; or the index of the class, an integer.
    """

    times: Float[Tensor, "batch length"]
    values: Float[Tensor, "batch length variables"]
    observed: Bool[Tensor, "batch length variables"]
    static: Float[Tensor, "batch statics"]
    outcome: Shaped[Tensor, " batch"]

    def __len__(self) -> int:
        return len(self.outcome)


def padded(
    times: Sequence[Tensor], values: Sequence[Tensor], observed: Sequence[Tensor], static: Tensor, outcome: Tensor
) -> Series:
    """One batch of series of different lengths, each of at least one point of time."""
    longest = max(len(t) for t in times)
    return Series(
        torch.stack([torch.cat([t, t[-1:].expand(longest - len(t))]) for t in times]),
        pad_sequence(list(values), batch_first=True),
        pad_sequence(list(observed), batch_first=True),
        static,
        outcome,
    )


@runtime_checkable
class SeriesSet(Protocol):
    """Series in memory."""

    def __len__(self) -> int: ...

    def take(self, rows: Sequence[int]) -> Series:
        """Series `rows` as one batch."""


class SeriesBatches:
    """Batches of series, a function of seed and epoch.

    Args:
        series: in memory.
        rows: which of them.
        batch_size: series a batch. A last, smaller batch is dropped where `shuffle` is set and kept elsewhere.
        shuffle: a new order each epoch.
        seed: of the order.
        device: where the batches go.

    Raises:
        DataError: shuffled data fill no batch.
    """

    def __init__(
        self,
        series: SeriesSet,
        rows: Sequence[int],
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        if shuffle and len(rows) < batch_size:
            raise DataError(f"{len(rows)} training series do not fill one batch of {batch_size}.")
        self.series, self.chosen, self.batch_size, self.shuffle = series, list(rows), batch_size, shuffle
        self.seed, self.device = seed, device

    def __len__(self) -> int:
        full, rest = divmod(len(self.chosen), self.batch_size)
        return full if self.shuffle or rest == 0 else full + 1

    def rows(self, place: int) -> int:
        """Series in batch `place` of an epoch."""
        return min(self.batch_size, len(self.chosen) - place * self.batch_size)

    def epoch(self, index: int = 0, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[tuple[Tensor, ...]]:
        """The batches of epoch `index`, from batch `start` on; of each the part of process `rank` of `world`.

        A batch is the tensors of a `Series` in its order.
        """
        order = self.chosen
        if self.shuffle:
            places = torch.randperm(len(order), generator=generator_of(self.seed, index, 0))
            order = [order[i] for i in places.tolist()]
        for place in range(start, len(self)):
            rows = order[place * self.batch_size : (place + 1) * self.batch_size]
            series = self.series.take(rows[part_of(len(rows), rank, world)])
            yield tuple(getattr(series, field.name).to(self.device) for field in dataclasses.fields(series))

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return self.epoch(0)


@dataclasses.dataclass(frozen=True)
class SeriesSource:
    """Series with an outcome each, and their split.

    Attributes:
        name: by which recipes and cards call it.
        series: all of them.
        train: rows that models are trained on, and validation sets are carved from.
        test: rows that metrics are reported on.
        names: of the variables.
        statics: how many values are known from the start.
        span: of time, in the unit of `Series.times`: the longest there is among the training series.
        classes: the name of each; empty where the outcome is an event.
        split: the two parts in words.
        licence: of the data.
        citation: where they come from.
    """

    name: str
    series: SeriesSet
    train: tuple[int, ...]
    test: tuple[int, ...]
    names: tuple[str, ...]
    statics: int
    span: float
    classes: tuple[str, ...]
    split: str
    licence: str
    citation: str

    @property
    def model_arguments(self) -> dict[str, Any]:
        """What the data say about a model: its variables, statics and classes, and how long the series are."""
        classes = {"num_classes": len(self.classes)} if self.classes else {}
        return {"variables": len(self.names), "statics": self.statics, "span": self.span, **classes}

    @property
    def card_fields(self) -> dict[str, Any]:
        """What the data say on a card: what the classes are called."""
        return {"labels": self.classes} if self.classes else {}

    def batches(
        self, batch_size: int, eval_batch_size: int, validation: int, seed: int, device: str
    ) -> tuple[SeriesBatches, SeriesBatches]:
        """Series to train on, and those to measure on: the test set, or `validation` of the training series.

        These are spread evenly over the training set, whose files are often sorted by class.

        Raises:
            DataError: the training set is not larger than `validation`.
        """
        rows, held_out = self.train, self.test
        if validation:
            total = len(self.train)
            if validation >= total:
                raise DataError(f"data.validation must lie in [0, {total}); got {validation}.")
            chosen = {(2 * i + 1) * total // (2 * validation) for i in range(validation)}
            rows = tuple(row for i, row in enumerate(self.train) if i not in chosen)
            held_out = tuple(row for i, row in enumerate(self.train) if i in chosen)
        return (
            SeriesBatches(self.series, rows, batch_size, shuffle=True, seed=seed, device=device),
            SeriesBatches(self.series, held_out, eval_batch_size, device=device),
        )

    def test_batches(self, batch_size: int, limit: int | None = None, device: str = "cpu") -> SeriesBatches:
        """The test set, or the first so many series of it."""
        return SeriesBatches(self.series, self.test[:limit], batch_size, device=device)


def found(data_dir: Path | None, name: str, *places: str) -> Path:
    """The first of the paths `places` under a data folder that exists; the first of all where none does.

    Raises:
        DataError: no folder was given.
    """
    if data_dir is None:
        raise DataError(f"{name}: give the folder that holds {places[0]} (--data-dir).")
    paths = [data_dir.expanduser() / place for place in places]
    return next((path for path in paths if path.is_file()), paths[0])
