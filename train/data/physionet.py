"""Intensive care: what was measured, when, in the first 48 hours of 12,000 stays, and who died in hospital."""

from __future__ import annotations

import dataclasses
import io
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .series import Series, SeriesSource, found, padded
from .source import DataError, register_data

FILE = "physionet2012.npz"
SETS = {"a": 0, "b": 1, "c": 2}
HOURS = 48.0
# Of the standardised values: beyond it lie mostly slips of the pen.
LIMIT = 5.0


@dataclasses.dataclass(frozen=True)
class Stays:
    """Stays in memory, sparse: stay i has the observations ptr[i]:ptr[i + 1].

    Attributes:
        ptr, minute, variable, value: the observations.
        static, outcome: of each stay.
        variables: how many there are.
        resolution: so many minutes are one point of time, called by its beginning, in hours.
    """

    ptr: Tensor
    minute: Tensor
    variable: Tensor
    value: Tensor
    static: Tensor
    outcome: Tensor
    variables: int
    resolution: int = 6

    def __len__(self) -> int:
        return len(self.outcome)

    def take(self, rows: Sequence[int]) -> Series:
        """Stays `rows` as one batch.

        Where a variable was measured several times in one point of time, the last counts.
        """
        times, values, observed = [], [], []
        for row in rows:
            part = slice(int(self.ptr[row]), int(self.ptr[row + 1]))
            slot = torch.div(self.minute[part], self.resolution, rounding_mode="floor")
            points, place = torch.unique(slot, sorted=True, return_inverse=True)
            length = max(len(points), 1)  # a stay without a single observation has one empty point
            seen = torch.zeros(length, self.variables, dtype=torch.bool)
            held = torch.zeros(length, self.variables)
            # In the order of the file: index_put_ with repeated indices does not promise that the last wins.
            last = torch.full((length * self.variables,), -1, dtype=torch.int64)
            flat = place * self.variables + self.variable[part]
            last.scatter_reduce_(0, flat, torch.arange(len(flat)), "amax")
            there = last >= 0
            held.view(-1)[there] = self.value[part][last[there]]
            seen.view(-1)[there] = True
            times.append(points.float() * (self.resolution / 60) if len(points) else torch.zeros(1))
            values.append(held)
            observed.append(seen)
        chosen = torch.as_tensor(rows)
        return padded(times, values, observed, self.static[chosen], self.outcome[chosen])


@register_data
def physionet2012(data_dir: Path | None = None) -> SeriesSource:
    """The PhysioNet challenge of 2012: 12,000 stays of 48 hours, 37 variables, and death in hospital.

    The challenge's sets a and b (8,000 stays) train, its set c (4,000) is measured. Variables and statics are
    standardised by the training stays and cut off at `LIMIT` deviations, since some are slips of the pen; six minutes
    are one point of time.

    Args:
        data_dir: holds physionet2012.npz, or a folder physionet2012 that does: `ptr`, `minute`, `variable`, `value` as
            `Stays` has them, with -1 for a value that is unknown, `set` (0, 1, 2), `static` with -1 where unknown,
            `outcome` and `outcome_names`.

    Raises:
        DataError: no folder was given, or the file is missing, damaged, or of another layout.
    """
    return _physionet("physionet2012", data_dir, 6)


@register_data
def physionet2012_hourly(data_dir: Path | None = None) -> SeriesSource:
    """`physionet2012` with one point of time an hour, at most 49 of them, instead of one every six minutes."""
    return _physionet("physionet2012_hourly", data_dir, 60)


def _physionet(name: str, data_dir: Path | None, resolution: int) -> SeriesSource:
    path = found(data_dir, name, FILE, f"physionet2012/{FILE}")
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
        raise DataError(f"{name}: {path} is missing, damaged, or of another layout: {error}.") from error
    if int(ptr[-1]) != len(value) or len(ptr) != len(outcome) + 1 or int(variable.max()) >= variables:
        raise DataError(f"{name}: the parts of {path} do not fit each other.")
    if not set(np.unique(outcome)) <= {0, 1}:
        raise DataError(f"{name}: {path} has deaths {sorted(set(np.unique(outcome)))}; expected 0 and 1.")
    known = (value >= 0) & value.isfinite()
    before = torch.cat([torch.zeros(1, dtype=torch.int64), known.long().cumsum(0)])
    ptr, minute, variable, value = before[ptr.long()], minute[known], variable[known], value[known]
    seen = train.repeat_interleave(ptr.diff())
    for index in range(variables):
        of = variable == index
        measured = value[of & seen].double()
        if len(measured):
            spread = float(measured.std(correction=0)) or 1.0
            value[of] = ((value[of] - float(measured.mean())) / spread).clamp(-LIMIT, LIMIT)
    deaths = torch.from_numpy(outcome).float()
    static = _standardised(static, train).clamp(-LIMIT, LIMIT)
    return SeriesSource(
        name,
        Stays(ptr, minute, variable, value, static, deaths, variables, resolution),
        tuple(train.nonzero().flatten().tolist()),
        tuple((~train).nonzero().flatten().tolist()),
        tuple(str(name) for name in held["variable_names"]),
        static.shape[1],
        HOURS,
        (),
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
