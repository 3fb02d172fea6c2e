"""The accepted steps of a solve: enough to repeat it, forwards or backwards, without a rejection."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from .method import Time

FREE, FORCED, END = 0, 1, 2


class Taken(NamedTuple):
    """One accepted step of the batch, or, with steps per sample, one of every sample that still has one to take.

    Attributes:
        t: where it starts: a float, or (batch,) float64.
        h: its length, likewise; zero for samples that take no step.
        lands: FREE, or where it was made to end: at a constant time (FORCED) or the last output time (END): an int, or
            (batch,).
        moves: whether t moves with the start of the solve, which it does until a step lands: a bool, or (batch,).
        restart: whether the carry is made anew before it, as at the start and after a jump: a bool, or (batch,).
        dense: whether its dense output is asked for.
        replace: (batch,) the row that each row is replaced by before the step: samples that have ended go on as copies
            of one that has not, and their values are dropped. None where nothing is replaced.
        waits: (batch,) which samples take no step, so that their states and carries stay; None where all take one.
        rows: (batch,) the sample whose args each row is evaluated with; None for its own.
    """

    t: Time
    h: Time
    lands: int | Tensor
    moves: bool | Tensor
    restart: bool | Tensor
    dense: bool
    replace: Tensor | None = None
    waits: Tensor | None = None
    rows: Tensor | None = None


@dataclasses.dataclass
class Mesh:
    """All steps, and which of their dense outputs are asked for.

    Attributes:
        steps: in order.
        picks: the dense outputs that are asked for, as indices of steps: a list, each standing for the whole batch,
            or (picks, batch), a step for every sample.
        own: the leaves of args that have a row for each sample, which the steps' `rows` are of.
    """

    steps: list[Taken]
    picks: list[int] | Tensor
    own: frozenset[int] = frozenset()

    def times(self, index: int, start: Tensor | None, end: Tensor | None) -> tuple[Time, Time]:
        """Start and length of a step, as functions of the `start` and `end` of the solve where these are given.

        Steps have constant lengths and move with the start, up to the first one that was made to land; a step that
        lands is as long as what is left.
        """
        taken = self.steps[index]
        t, h = taken.t, taken.h
        if start is not None:
            shift = (start - start.detach()) * _factor(taken.moves)
            t, h = t + shift, h - shift * _factor(taken.lands != FREE)
        if end is not None:
            h = h + (end - end.detach()) * _factor(taken.lands == END)
        return t, h

    def all_times(self, index: Tensor, start: Tensor | None, end: Tensor | None) -> tuple[Tensor, Tensor]:
        """The same for many steps, `index` (k,), or (k, batch) with steps per sample; float64."""
        used = sorted(set(index.flatten().tolist()))
        times = [self.times(i, start, end) for i in used]
        place = torch.zeros(len(self.steps), dtype=torch.long)
        place[used] = torch.arange(len(used))
        index = place.to(index.device)[index]
        t, h = (_stack([pair[k] for pair in times], index.device) for k in (0, 1))
        return (t.gather(0, index), h.gather(0, index)) if index.ndim == 2 else (t[index], h[index])

    def gather(self, dense: dict[int, Tensor]) -> Tensor | None:
        """The picks (picks, p + 1, batch, n) from the dense outputs (p + 1, batch, n) of steps."""
        if not len(self.picks):
            return None
        if not isinstance(self.picks, Tensor):
            return torch.stack([dense[index] for index in self.picks])
        steps = sorted(dense)
        place = torch.zeros(len(self.steps), dtype=torch.long)
        place[steps] = torch.arange(len(steps))
        return take(torch.stack([dense[index] for index in steps]), place.to(self.picks.device)[self.picks])


class PickBars:
    """Cotangents of a mesh's picks, handed out step by step."""

    def __init__(self, mesh: Mesh, bars: Tensor | None) -> None:
        """`bars` (picks, p + 1, batch, n), or None where nothing arrived."""
        self._bars = bars
        self._places: dict[int, list[int]] = {}
        if bars is None:
            return
        if not isinstance(mesh.picks, Tensor):
            for place, index in enumerate(mesh.picks):
                self._places.setdefault(index, []).append(place)
            return
        batch = mesh.picks.shape[1]
        order = mesh.picks.flatten().argsort(stable=True)
        counts = torch.bincount(mesh.picks.flatten(), minlength=len(mesh.steps)).tolist()
        self._pairs = order.split(counts)
        self._batch, self._rows = batch, bars.transpose(1, 2).flatten(0, 1)

    def of(self, index: int) -> Tensor | None:
        """The cotangent (p + 1, batch, n) of the dense output of a step."""
        if self._bars is None:
            return None
        if self._places:
            places = self._places.get(index)
            return None if places is None else sum((self._bars[i] for i in places[1:]), self._bars[places[0]])
        pairs = self._pairs[index]
        if not len(pairs):
            return None
        rows = self._rows.index_select(0, pairs)
        total = rows.new_zeros((self._batch, *rows.shape[1:]))
        return total.index_add_(0, pairs % self._batch, rows).transpose(0, 1)

    def window(self, span: range) -> Tensor | None:
        """Those of all steps in `span`, (steps, p + 1, batch, n); None where nothing arrives."""
        if self._bars is None:
            return None
        if self._places:
            found = [(index - span[0], place) for index in span for place in self._places.get(index, ())]
            if not found:
                return None
            steps, places = torch.tensor(found, device=self._bars.device).T
            return self._bars.new_zeros((len(span), *self._bars.shape[1:])).index_add_(0, steps, self._bars[places])
        pairs = self._pairs[span[0] : span[-1] + 1]
        if not sum(map(len, pairs)):
            return None
        steps = torch.arange(len(span), device=self._rows.device)
        steps = steps.repeat_interleave(torch.tensor([len(part) for part in pairs], device=steps.device))
        which = torch.cat(pairs)
        total = self._rows.new_zeros((len(span) * self._batch, *self._rows.shape[1:]))
        total.index_add_(0, steps * self._batch + which % self._batch, self._rows[which])
        return total.view(len(span), self._batch, *self._rows.shape[1:]).transpose(1, 2)


def take(dense: Tensor, index: Tensor) -> Tensor:
    """Dense outputs (picks, p + 1, batch, n) of `dense` (slots, p + 1, batch, n) by slot `index` (picks, batch)."""
    samples = torch.arange(index.shape[1], device=index.device)
    return dense.transpose(1, 2)[index, samples].transpose(1, 2)


def _stack(times: list[Time], device: torch.device) -> Tensor:
    if any(isinstance(t, Tensor) for t in times):
        return torch.stack([torch.as_tensor(t, dtype=torch.float64, device=device) for t in times])
    return torch.tensor(times, dtype=torch.float64, device=device)


def _factor(mask: bool | Tensor) -> float | Tensor:
    return mask if isinstance(mask, Tensor) else float(mask)
