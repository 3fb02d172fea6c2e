"""Series with a class each, from the .ts files of the UEA and UCR archive."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .series import Series, SeriesSource, found, padded
from .source import DataError, register_data


@dataclasses.dataclass(frozen=True)
class LabelledSeries:
    """Series in memory.

    Attributes:
        values: of each series (length, variables); NaN where nothing was observed.
        labels: class indices.
    """

    values: tuple[Tensor, ...]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.values)

    def take(self, rows: Sequence[int]) -> Series:
        """Series `rows` as one batch; the unit of time is the step from one value to the next."""
        chosen = [self.values[row] for row in rows]
        return padded(
            [torch.arange(len(values), dtype=torch.float32) for values in chosen],
            [values.nan_to_num(nan=0.0) for values in chosen],
            [~values.isnan() for values in chosen],
            torch.zeros(len(rows), 0),
            self.labels[torch.as_tensor(rows)],
        )


@dataclasses.dataclass(frozen=True)
class TsFile:
    """What a .ts file holds.

    Attributes:
        name: of the problem, as the file calls it.
        classes: names of the classes, in the order of its header.
        values: of each series (length, variables), NaN where one is missing or its variable has ended before others.
        labels: indices of classes.
    """

    name: str
    classes: tuple[str, ...]
    values: tuple[Tensor, ...]
    labels: tuple[int, ...]


def read_ts(path: Path) -> TsFile:
    """Read a .ts file: `@` lines of a header, then one series a line, `variable:variable:class`.

    The values of a variable are separated by commas; `?` and NaN are missing ones. The variables of a series, and the
    series, may be of different lengths.

    Raises:
        DataError: the file is missing, is no .ts file, has time stamps or no classes, or a line of it is broken; the
            message names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    header: dict[str, list[str]] = {}
    start = None
    for number, line in enumerate(lines):
        words = line.split()
        if not words or not words[0].startswith("@"):
            continue
        if words[0].lower() == "@data":
            start = number + 1
            break
        header[words[0].lower()] = words[1:]
    if start is None:
        raise DataError(f"{path} has no line @data; it is no .ts file.")
    if header.get("@timestamps", ["false"])[:1] != ["false"]:
        raise DataError(f"{path} has time stamps, which are not read; write one value a step of time.")
    told, *classes = header.get("@classlabel", ["false"])
    if told != "true" or len(classes) < 2:
        raise DataError(f"{path} has no line '@classLabel true' with at least two classes.")
    values: list[Tensor] = []
    labels: list[int] = []
    for number, line in enumerate(lines[start:], start + 1):
        if not line.strip() or line.startswith("#"):
            continue
        *variables, label = line.strip().split(":")
        if label not in classes:
            raise DataError(f"{path}, line {number}: {label!r} is none of the classes {', '.join(classes)}.")
        try:
            series = [torch.tensor([_number(x) for x in variable.split(",")]) for variable in variables]
        except ValueError as error:
            raise DataError(f"{path}, line {number}: {error}.") from error
        expected = values[0].shape[1] if values else max(len(series), 1)
        if len(series) != expected:
            raise DataError(f"{path}, line {number}: {len(series)} variables; expected {expected}.")
        values.append(torch.nn.utils.rnn.pad_sequence(series, batch_first=True, padding_value=math.nan).T)
        labels.append(classes.index(label))
    if not values:
        raise DataError(f"{path} holds no series.")
    name = " ".join(header.get("@problemname", [path.stem]))
    return TsFile(name, tuple(classes), tuple(values), tuple(labels))


def _number(word: str) -> float:
    word = word.strip()
    if word == "?":
        return math.nan
    value = float(word)
    if math.isinf(value):
        raise ValueError("a value is infinite")
    return value


def ts_source(name: str, title: str, data_dir: Path | None, citation: str) -> SeriesSource:
    """The two files `title`_TRAIN.ts and `title`_TEST.ts as a data set.

    Variables are standardised by the training series, each over all its values.

    Args:
        name: by which recipes and cards call it.
        title: the archive's name.
        data_dir: holds both files, or a folder called `title` or uea that does.
        citation: where the data come from.

    Raises:
        DataError: no folder was given, a file is missing or broken, or the two do not fit each other.
    """
    parts = []
    for part in ("TRAIN", "TEST"):
        file = f"{title}_{part}.ts"
        parts.append(read_ts(found(data_dir, name, file, f"{title}/{file}", f"uea/{file}")))
    train, test = parts
    if train.classes != test.classes or train.values[0].shape[1] != test.values[0].shape[1]:
        raise DataError(f"{name}: {title}_TRAIN.ts and {title}_TEST.ts differ in their classes or variables.")
    every = torch.cat(train.values).double()
    mean = every.nanmean(0).nan_to_num()
    deviation = (every - mean).square().nanmean(0).sqrt().nan_to_num().clamp_min(1e-6)
    values = tuple(((series - mean) / deviation).float() for series in (*train.values, *test.values))
    count = len(train.values)
    return SeriesSource(
        name,
        LabelledSeries(values, torch.tensor([*train.labels, *test.labels])),
        tuple(range(count)),
        tuple(range(count, len(values))),
        tuple(str(i + 1) for i in range(values[0].shape[1])),
        0,
        float(max(max(len(series) for series in train.values) - 1, 1)),
        train.classes,
        f"the archive's: {count} series train, {len(test.values)} are measured",
        "free to use with citation",
        citation,
    )


UEA = "Bagnall et al. 2018, The UEA multivariate time series classification archive"
UCR = "Dau et al. 2019, The UCR time series archive"
ARCHIVE = {
    "japanese_vowels": ("JapaneseVowels", f"Kudo, Toyama and Shimbo 1999; {UEA}"),
    "basic_motions": ("BasicMotions", UEA),
    "gun_point": ("GunPoint", f"Ratanamahatana and Keogh 2005; {UCR}"),
    "italy_power_demand": ("ItalyPowerDemand", f"Keogh et al. 2006; {UCR}"),
    "arrow_head": ("ArrowHead", f"Ye and Keogh 2009; {UCR}"),
    "osu_leaf": ("OSULeaf", f"Grandhi; {UCR}"),
    "plaid": ("PLAID", f"Gao et al. 2014; {UCR}"),
}


def _loader(name: str, title: str, citation: str) -> Callable[[Path | None], SeriesSource]:
    def load(data_dir: Path | None = None) -> SeriesSource:
        return ts_source(name, title, data_dir, citation)

    load.__name__ = load.__qualname__ = name
    load.__doc__ = f"{title} of the UEA and UCR archive; see `ts_source`."
    return load


for _name, (_title, _citation) in ARCHIVE.items():
    register_data(_loader(_name, _title, _citation))
