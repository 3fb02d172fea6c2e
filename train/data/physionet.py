"""Intensive care: what was measured, when, in the first 48 hours of 12,000 stays, and who died in hospital."""

from __future__ import annotations

import dataclasses
import io
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .batches import generator_of, part_of
from .source import DataError, register_data

FILE = "physionet2012.npz"
SETS = {"a": 0, "b": 1, "c": 2}


@dataclasses.dataclass(frozen=True)
class Series:
    """A batch of irregularly sampled series with missing values.

    Attributes:
        times: in hours since the start, ascending; behind a series' end its last time again.
        values: standardised; zero where nothing was observed.
        observed: which values were measured. Behind a series' end nothing is.
        static: what does not change, standardised, and zero where it is unknown.
        outcome: 1 where the event came, else 0.
    """

    times: Float[Tensor, "batch length"]
    values: Float[Tensor, "batch length variables"]
    observed: Bool[Tensor, "batch length variables"]
    static: Float[Tensor, "batch statics"]
    outcome: Float[Tensor, " batch"]

    def __len__(self) -> int:
        return len(self.outcome)


@dataclasses.dataclass(frozen=True)
class Stays:
    """Stays in memory, sparse: stay i has the observations ptr[i]:ptr[i + 1]."""

    ptr: Tensor
    minute: Tensor
    variable: Tensor
    value: Tensor
    static: Tensor
    outcome: Tensor
    variables: int

    def __len__(self) -> int:
        return len(self.outcome)

    def take(self, rows: Sequence[int], resolution: int) -> Series:
        """Stays `rows` as one batch; observations in the same `resolution` minutes are one point of time.

        Where a variable was measured several times in one of these, the last counts.
        """
        times, values, observed = [], [], []
        for row in rows:
            part = slice(int(self.ptr[row]), int(self.ptr[row + 1]))
            slot = torch.div(self.minute[part], resolution, rounding_mode="floor")
            points, place = torch.unique(slot, sorted=True, return_inverse=True)
            length = max(len(points), 1)  # a stay without a single observation has one empty point
            seen = torch.zeros(length, self.variables, dtype=torch.bool)
            found = torch.zeros(length, self.variables)
            # In the order of the file: index_put_ with repeated indices does not promise that the last wins.
            last = torch.full((length * self.variables,), -1, dtype=torch.int64)
            flat = place * self.variables + self.variable[part]
            last.scatter_reduce_(0, flat, torch.arange(len(flat)), "amax")
            there = last >= 0
            found.view(-1)[there] = self.value[part][last[there]]
            seen.view(-1)[there] = True
            times.append(points.float() * (resolution / 60) if len(points) else torch.zeros(1))
            values.append(found)
            observed.append(seen)
        longest = max(len(t) for t in times)
        padded = torch.stack([torch.cat([t, t[-1:].expand(longest - len(t))]) for t in times])
        chosen = torch.as_tensor(rows)
        return Series(
            padded, pad_sequence(values, batch_first=True), pad_sequence(observed, batch_first=True),
            self.static[chosen], self.outcome[chosen],
        )  # fmt: skip


class SeriesBatches:
    """Batches of series, a function of seed and epoch.

    Args:
        stays: in memory.
        rows: which of them.
        batch_size: series a batch. A last, smaller batch is dropped where `shuffle` is set and kept elsewhere.
        resolution: minutes that are one point of time.
        shuffle: a new order each epoch.
        seed: of the order.
        device: where the batches go.

    Raises:
        DataError: shuffled data fill no batch.
    """

    def __init__(
        self,
        stays: Stays,
        rows: Sequence[int],
        batch_size: int,
        *,
        resolution: int = 6,
        shuffle: bool = False,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        if shuffle and len(rows) < batch_size:
            raise DataError(f"{len(rows)} training series do not fill one batch of {batch_size}.")
        self.stays, self.chosen, self.batch_size, self.shuffle = stays, list(rows), batch_size, shuffle
        self.resolution, self.seed, self.device = resolution, seed, device

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
            series = self.stays.take(rows[part_of(len(rows), rank, world)], self.resolution)
            yield tuple(getattr(series, field.name).to(self.device) for field in dataclasses.fields(series))

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return self.epoch(0)


@dataclasses.dataclass(frozen=True)
class SeriesSource:
    """Series with an outcome each, and their split.

    Attributes:
        name: by which recipes and cards call it.
        stays: all of them.
        train: rows that models are trained on, and validation sets are carved from.
        test: rows that metrics are reported on.
        split: the two parts in words.
        licence: of the data.
        citation: where they come from.
        resolution: minutes that are one point of time.
    """

    name: str
    stays: Stays
    train: tuple[int, ...]
    test: tuple[int, ...]
    split: str
    licence: str
    citation: str
    resolution: int = 6

    @property
    def model_arguments(self) -> dict[str, int]:
        """What the data say about a model: how many variables and statics there are."""
        return {"variables": self.stays.variables, "statics": self.stays.static.shape[1]}

    @property
    def card_fields(self) -> dict[str, Any]:
        """What the data say on a card."""
        return {}

    def batches(
        self, batch_size: int, eval_batch_size: int, validation: int, seed: int, device: str
    ) -> tuple[SeriesBatches, SeriesBatches]:
        """Series to train on, and those to measure on: of the test set, or the last `validation` training series."""
        rows, held_out = (self.train[:-validation], self.train[-validation:]) if validation else (self.train, self.test)
        more = {"resolution": self.resolution, "device": device}
        return (
            SeriesBatches(self.stays, rows, batch_size, shuffle=True, seed=seed, **more),  # type: ignore[arg-type]
            SeriesBatches(self.stays, held_out, eval_batch_size, **more),  # type: ignore[arg-type]
        )

    def test_batches(self, batch_size: int, limit: int | None = None, device: str = "cpu") -> SeriesBatches:
        """The test set, or the first so many series of it."""
        return SeriesBatches(self.stays, self.test[:limit], batch_size, resolution=self.resolution, device=device)


@register_data
def physionet2012(data_dir: Path | None = None) -> SeriesSource:
    """The PhysioNet challenge of 2012: 12,000 stays of 48 hours, 37 variables, and death in hospital.

    The challenge's sets a and b (8,000 stays) train, its set c (4,000) is measured. Variables and statics are
    standardised by the training stays.

    Args:
        data_dir: holds physionet2012.npz: `ptr`, `minute`, `variable`, `value` as `Stays` has them, `set` (0, 1, 2),
            `static` with -1 where unknown, `outcome` and `outcome_names`.

    Raises:
        DataError: no folder was given, or the file is missing, damaged, or of another layout.
    """
    if data_dir is None:
        raise DataError(f"physionet2012: give the folder that holds {FILE} (--data-dir).")
    path = data_dir.expanduser() / FILE
    try:
        # Of bytes: numpy leaves a damaged file open.
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            held = {key: file[key] for key in file.files}
        outcome = held["outcome"][:, list(held["outcome_names"]).index("In-hospital_death")]
        ptr, variables = torch.from_numpy(held["ptr"]), len(held["variable_names"])
        train = torch.from_numpy(held["set"] != SETS["c"])
        variable, value = torch.from_numpy(held["variable"]).long(), torch.from_numpy(held["value"]).float()
        minute, static = torch.from_numpy(held["minute"].astype(np.int64)), torch.from_numpy(held["static"]).float()
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"physionet2012: {path} is missing, damaged, or of another layout: {error}.") from error
    if int(ptr[-1]) != len(value) or len(ptr) != len(outcome) + 1 or int(variable.max()) >= variables:
        raise DataError(f"physionet2012: the parts of {path} do not fit each other.")
    if not set(np.unique(outcome)) <= {0, 1}:
        raise DataError(f"physionet2012: {path} has deaths {sorted(set(np.unique(outcome)))}; expected 0 and 1.")
    seen = train.repeat_interleave(ptr.diff())
    for index in range(variables):
        of = variable == index
        known = value[of & seen].double()
        if len(known):
            spread = float(known.std(correction=0)) or 1.0
            value[of] = (value[of] - float(known.mean())) / spread
    return SeriesSource(
        "physionet2012",
        Stays(ptr, minute, variable, value, _standardised(static, train), torch.from_numpy(outcome).float(), variables),
        tuple(train.nonzero().flatten().tolist()),
        tuple((~train).nonzero().flatten().tolist()),
        "the challenge's sets a and b (8,000 stays) train; set c (4,000) is measured",
        "ODC-By 1.0",
        "Silva et al. 2012, Predicting in-hospital mortality of ICU patients: the PhysioNet challenge",
    )


def _standardised(static: Tensor, train: Tensor) -> Tensor:
    """Columns with mean 0 and deviation 1 over the training rows where they are known; 0 where they are not."""
    known = (static >= 0) & static.isfinite()
    weight = (known & train.unsqueeze(1)).double()
    count = weight.sum(0).clamp_min(1)
    clean = torch.where(known, static, 0).double()
    mean = (clean * weight).sum(0) / count
    deviation = (((clean - mean).square() * weight).sum(0) / count).sqrt().clamp_min(1e-6)
    return torch.where(known, (clean - mean) / deviation, 0).float()
