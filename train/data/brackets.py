"""Balanced strings of coloured brackets, where every closing one is asked for the colour of its partner."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Generator, Tensor

from .batches import generator_of, part_of
from .source import register_data

COLOURS = 8
TRAINED, MEASURED = (5,), (5, 10)
"""Pairs of brackets of the strings that are trained and measured on."""

VALIDATION_SEED, TEST_SEED = 20_001, 20_002

Strings = tuple[Int[Tensor, "batch length"], Int[Tensor, "batch length"]]


def draw_brackets(count: int, pairs: int, generator: Generator) -> Strings:
    """Random balanced strings, in which another bracket opens with probability 1/2 wherever it may.

    Returns:
        0 for closing brackets, 1 and more for opening ones by their colour; and the partner of every closing bracket,
        -1 for opening ones.
    """
    colours = torch.randint(1, COLOURS + 1, (count, 2 * pairs), generator=generator)
    coins = torch.rand(count, 2 * pairs, generator=generator) < 0.5
    strings, partners = torch.zeros_like(colours), torch.full_like(colours, -1)
    for row, wants in enumerate(coins.tolist()):
        stack: list[int] = []
        opened = 0
        for place, wanted in enumerate(wants):
            if opened < pairs and (wanted or not stack):
                stack.append(place)
                opened += 1
                strings[row, place] = colours[row, place]
            else:
                partners[row, place] = stack.pop()
    return strings, partners


class BracketBatches:
    """Batches of strings with the colours that are asked for, -1 where none is; a function of seed and epoch.

    Args:
        pairs: brackets of each kind in a string; with several numbers equally many strings of each, one after another.
        count: strings an epoch of each length.
        batch_size: strings a batch; the last of each length may be smaller.
        seed: of the strings.
        device: where the batches go.
        fresh: other strings at every epoch, instead of always the same, whatever the batch size.

    Raises:
        ValueError: a size below one.
    """

    def __init__(
        self,
        pairs: tuple[int, ...],
        count: int,
        batch_size: int,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        fresh: bool = True,
    ) -> None:
        if batch_size < 1 or count < 1:
            raise ValueError(f"Batches need at least one string; got batch_size {batch_size} and {count} strings.")
        self.pairs, self.count, self.batch_size = pairs, count, batch_size
        self.seed, self.device = seed, device
        self.kept = None if fresh else [self._keep(each, generator_of(seed, each)) for each in pairs]

    def _keep(self, pairs: int, generator: Generator) -> Strings:
        """One after the other, so that fewer of them are the first ones."""
        rows = [draw_brackets(1, pairs, generator) for _ in range(self.count)]
        strings, partners = (torch.cat(part) for part in zip(*rows, strict=True))
        return strings, partners

    def _each(self) -> int:
        return -(-self.count // self.batch_size)

    def __len__(self) -> int:
        return self._each() * len(self.pairs)

    def rows(self, place: int) -> int:
        """Strings in batch `place` of an epoch."""
        return min(self.batch_size, self.count - place % self._each() * self.batch_size)

    def epoch(self, index: int = 0, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[Strings]:
        """The batches of epoch `index`, from batch `start` on; of each the part of process `rank` of `world`."""
        for place in range(start, len(self)):
            which, turn = divmod(place, self._each())
            rows = self.rows(place)
            if self.kept is None:
                generator = generator_of(self.seed, index, place)
                strings, partners = draw_brackets(rows, self.pairs[which], generator)
            else:
                begin = turn * self.batch_size
                strings, partners = (part[begin : begin + rows] for part in self.kept[which])
            wanted = (strings.gather(1, partners.clamp(min=0)) - 1).where(partners >= 0, -1)
            part = part_of(len(strings), rank, world)
            yield strings[part].to(self.device), wanted[part].to(self.device)

    def __iter__(self) -> Iterator[Strings]:
        return self.epoch(0)


@dataclasses.dataclass(frozen=True)
class BracketSource:
    """Strings of brackets to train and to measure on.

    Attributes:
        name: by which recipes and cards call it.
        train_count: fresh strings an epoch.
        test_count: strings of each length that metrics are reported on, always the same.
        licence: of the data.
        citation: where the task comes from.
    """

    name: str = "brackets"
    train_count: int = 6400
    test_count: int = 1000
    licence: str = "none needed: drawn at random"
    citation: str = "after Kim et al. 2017, Structured attention networks, section 4.1"

    @property
    def split(self) -> str:
        """The two parts in words."""
        return (
            f"fresh strings of {2 * TRAINED[0]} brackets at every step train; of another seed {self.test_count:,} of "
            f"{2 * MEASURED[0]} and {self.test_count:,} of {2 * MEASURED[1]} are measured"
        )

    @property
    def model_arguments(self) -> dict[str, int]:
        """What the data say about a model: how many colours there are."""
        return {"num_colours": COLOURS}

    @property
    def card_fields(self) -> dict[str, object]:
        """What the data say on a card."""
        return {}

    def batches(
        self, batch_size: int, eval_batch_size: int, validation: int, seed: int, device: str
    ) -> tuple[BracketBatches, BracketBatches]:
        """Strings to train on, and those to measure on: of the test set, or so many others for `validation`."""
        training = BracketBatches(TRAINED, self.train_count, batch_size, seed=seed, device=device)
        if not validation:
            return training, self.test_batches(eval_batch_size, device=device)
        size = eval_batch_size
        return training, BracketBatches(MEASURED, validation, size, seed=VALIDATION_SEED, device=device, fresh=False)

    def test_batches(self, batch_size: int, limit: int | None = None, device: str = "cpu") -> BracketBatches:
        """The strings that metrics are reported on, or the first so many of each length."""
        count = self.test_count if limit is None else min(limit, self.test_count)
        return BracketBatches(MEASURED, count, batch_size, seed=TEST_SEED, device=device, fresh=False)


@register_data
def brackets(data_dir: Path | None = None) -> BracketSource:
    """Balanced strings of coloured brackets, where every closing one is asked for the colour of its partner."""
    return BracketSource()
