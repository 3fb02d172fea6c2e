"""Tables of the UCI repository's regression sets, as densities of all columns together."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.distributions import MultivariateNormal

from .batches import generator_of, part_of
from .density import Points
from .series import found
from .source import DataError, register_data

FILE = "uci-regression.npz"
SPLIT_SEED = 0
# By the data set's own name: its keys in the file, its address at UCI, and who to cite.
SETS = {
    "power_plant": ("power-plant", 5, "Tüfekci and Kaya 2014, Combined Cycle Power Plant (UCI 294)"),
    "protein": ("protein-tertiary-structure", 10, "Rana 2013, Physicochemical Properties of Protein (UCI 265)"),
    "kin8nm": ("kin8nm", 9, "Ghahramani 1996, kin8nm (DELVE)"),
}


class TableBatches:
    """Batches of rows with their log density under a reference.

    Args:
        rows: the table, standardised.
        log_p: of each row.
        batch_size: rows a batch. A last, smaller batch is dropped where `shuffle` is set and kept elsewhere.
        shuffle: a new order each epoch.
        seed: of the order.
        device: where the batches go.

    Attributes:
        reference: "gaussian": what `log_p` is of.

    Raises:
        ValueError: the batch size is below one, or shuffled data fill no batch.
    """

    reference = "gaussian"

    def __init__(
        self,
        rows: Float[Tensor, "n dim"],
        log_p: Float[Tensor, " n"],
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {batch_size}.")
        if shuffle and len(rows) < batch_size:
            raise ValueError(f"{len(rows)} training rows do not fill one batch of {batch_size}.")
        self.table, self.log_p, self.batch_size = rows, log_p, batch_size
        self.shuffle, self.seed, self.device = shuffle, seed, device

    def __len__(self) -> int:
        full, rest = divmod(len(self.table), self.batch_size)
        return full if self.shuffle or rest == 0 else full + 1

    def rows(self, place: int) -> int:
        """Rows in batch `place` of an epoch."""
        return min(self.batch_size, len(self.table) - place * self.batch_size)

    def epoch(self, index: int = 0, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[Points]:
        """The batches of epoch `index`, from batch `start` on, as (rows, log density of the reference), in float32.

        Of each batch the part of process `rank` of `world`.
        """
        order = torch.arange(len(self.table))
        if self.shuffle:
            order = torch.randperm(len(self.table), generator=generator_of(self.seed, index, 0))
        for place in range(start, len(self)):
            batch = order[place * self.batch_size : (place + 1) * self.batch_size]
            mine = batch[part_of(len(batch), rank, world)]
            yield self.table[mine].float().to(self.device), self.log_p[mine].float().to(self.device)

    def __iter__(self) -> Iterator[Points]:
        return self.epoch(0)


@dataclasses.dataclass(frozen=True)
class TableSource:
    """A table with a fixed split, standardised by its training part; likelihoods are in these units.

    Attributes:
        name: by which recipes and cards call it.
        train: rows that models are trained on, and validation sets are carved from, in float64.
        test: rows that metrics are reported on.
        citation: where the table comes from.
        licence: of the data.
    """

    name: str
    train: Float[Tensor, "n dim"]
    test: Float[Tensor, "m dim"]
    citation: str
    licence: str = "CC BY 4.0"

    @property
    def split(self) -> str:
        """The two parts in words."""
        return (
            f"permutation of seed {SPLIT_SEED}: its first tenth ({len(self.test):,} rows) is measured, "
            f"{len(self.train):,} rows train; all {self.train.shape[1]} columns, the target among them, with mean and "
            "variance of the training rows taken out: log densities are of these units"
        )

    @property
    def model_arguments(self) -> dict[str, int]:
        """What the data say about a model: its number of dimensions."""
        return {"dim": self.train.shape[1]}

    @property
    def card_fields(self) -> dict[str, object]:
        """What the data say on a card."""
        return {}

    def gaussian(self, rows: Float[Tensor, "k dim"]) -> Float[Tensor, " k"]:
        """Log density of the normal distribution with mean and full covariance of the training rows."""
        return MultivariateNormal(self.train.mean(0), self.train.T.cov()).log_prob(rows)

    def batches(
        self, batch_size: int, eval_batch_size: int, validation: int, seed: int, device: str
    ) -> tuple[TableBatches, TableBatches]:
        """Rows to train on, and those to measure on: of the test set, or the last so many others for `validation`."""
        training, held_out = self.train, self.test
        if validation:
            if not 0 < validation < len(training):
                raise DataError(f"data.validation must lie in [0, {len(training)}); got {validation}.")
            training, held_out = training[:-validation], training[-validation:]
        return (
            TableBatches(training, self.gaussian(training), batch_size, shuffle=True, seed=seed, device=device),
            TableBatches(held_out, self.gaussian(held_out), eval_batch_size, device=device),
        )

    def test_batches(self, batch_size: int, limit: int | None = None, device: str = "cpu") -> TableBatches:
        """The rows that metrics are reported on, or the first so many of them."""
        rows = self.test[:limit]
        return TableBatches(rows, self.gaussian(rows), batch_size, device=device)


def read_table(data_dir: Path | None, name: str) -> Float[Tensor, "n dim"]:
    """All columns of a table of `SETS`, the target last, in float64.

    Args:
        data_dir: holds uci-regression.npz, or the folder uci-regression with it, whose arrays are called NAME/x
            (n, features) and NAME/y (n,).
        name: a key of `SETS`.

    Raises:
        DataError: the file is missing, holds no such table, or one of another width or with values that are not finite.
    """
    key, width, _ = SETS[name]
    path = found(data_dir, f"uci_{name}", f"uci-regression/{FILE}", FILE)
    if not path.is_file():
        raise DataError(f"uci_{name}: {path} is missing; it holds the arrays {key}/x and {key}/y.")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            table = np.column_stack([arrays[f"{key}/x"], arrays[f"{key}/y"]]).astype(np.float64)
    except (KeyError, ValueError, OSError) as error:
        raise DataError(f"uci_{name}: {path} does not hold the arrays {key}/x and {key}/y: {error}") from error
    if table.ndim != 2 or table.shape[1] != width or len(table) < 10 or not np.isfinite(table).all():
        raise DataError(
            f"uci_{name}: expected at least 10 rows of {width} finite numbers, target included; {path} holds an array "
            f"of {table.shape}."
        )
    return torch.from_numpy(table)


def _register(name: str, citation: str) -> None:
    def load(data_dir: Path | None = None) -> TableSource:
        table = read_table(data_dir, name)
        table = table[torch.randperm(len(table), generator=generator_of(SPLIT_SEED))]
        count = len(table) // 10
        test, train = table[:count], table[count:]
        mean, std = train.mean(0), train.std(0)
        return TableSource(f"uci_{name}", (train - mean) / std, (test - mean) / std, citation)

    load.__name__ = f"uci_{name}"
    load.__doc__ = f"{citation}: all columns, a tenth of the rows held out."
    register_data(load)


for _name in SETS:
    _register(_name, SETS[_name][2])
