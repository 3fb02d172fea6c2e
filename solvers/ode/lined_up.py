"""Accepted steps of samples that each take their own, lined up so that a replay rejects nothing."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .mesh import Taken


class Tried(NamedTuple):
    """One iteration: the steps tried, and which of them were accepted; all (batch,)."""

    t: Tensor
    h: Tensor
    accepted: Tensor
    lands: Tensor
    moves: Tensor
    fresh: Tensor


class LinedUp:
    """The accepted steps of all samples, each sample's n-th in the n-th row, between any two kept states.

    Attributes:
        count: rows.
        firsts: the row with which each segment between kept states begins.
        iterations: (rows, batch) in which iteration the step was taken; where there is none, some iteration.
        taken: (rows, batch) whether there is one.
    """

    def __init__(self, tried: list[Tried], kept: list[int], last: Tensor) -> None:
        """`kept` are the iterations at which states were kept, `last` the times reached."""
        self._batch, self._device = len(last), last.device
        starts = kept or [0]
        self.firsts, self.count = [0] * len(starts), 0
        self.iterations = torch.zeros((0, self._batch), dtype=torch.long, device=self._device)
        self.taken = self.iterations.bool()
        self._tried, self._last = tried, last
        if not tried:
            return
        accepted = torch.stack([x.accepted for x in tried])
        before = accepted.cumsum(0) - accepted.long()
        bounds = torch.tensor(starts, device=self._device)
        segment = torch.searchsorted(bounds, torch.arange(len(tried), device=self._device), right=True) - 1
        rank = before - before[bounds][segment]
        sizes = [stop - start for start, stop in zip(starts, [*starts[1:], len(tried)])]
        longest = torch.stack([part.amax() for part in (rank + accepted).split(sizes)])
        firsts = longest.cumsum(0) - longest
        self.firsts, self.count = firsts.tolist(), int(longest.sum())
        self._rows = rank + firsts[segment].unsqueeze(1)
        self._accepted = accepted.nonzero(as_tuple=True)
        # A sample without a step waits where the next segment finds it.
        after = torch.stack([*(tried[i].t for i in starts[1:]), last])
        self._waiting = after.repeat_interleave(longest, dim=0)
        self.iterations = self._place(torch.zeros_like(self._waiting, dtype=torch.long), self._accepted[0])
        none = torch.zeros_like(self._waiting, dtype=torch.bool)
        self.taken = self._place(none, torch.ones_like(none[0, 0]))

    def index_of(self, iterations: Tensor) -> Tensor:
        """The rows of steps given by iteration (k, batch)."""
        return self._rows.gather(0, iterations) if self._tried else iterations

    def steps(self, picks: Tensor, replace: Tensor | None) -> list[Taken]:
        """The rows."""
        if not self.count:
            return []

        def lined(name: str, fill: Tensor) -> Tensor:
            values = torch.stack([getattr(x, name) for x in self._tried])
            return self._place(fill, values[self._accepted])

        zeros, no = torch.zeros_like(self._waiting), torch.zeros_like(self._waiting, dtype=torch.bool)
        t, h = lined("t", self._waiting), lined("h", zeros)
        lands, moves, fresh = lined("lands", zeros.long()), lined("moves", no), lined("fresh", no)
        asked = torch.zeros(self.count, dtype=torch.bool, device=self._device)
        asked[picks.flatten()] = True
        waits = h == 0
        flags = torch.stack([asked, fresh.any(1), waits.any(1)]).tolist()
        return [
            Taken(
                t[i],
                h[i],
                lands[i],
                moves[i],
                i == 0 or (fresh[i] if flags[1][i] else False),
                flags[0][i],
                replace if i == 0 else None,
                waits[i] if flags[2][i] else None,
                replace,
            )
            for i in range(self.count)
        ]

    def _place(self, fill: Tensor, values: Tensor) -> Tensor:
        return fill.index_put((self._rows[self._accepted], self._accepted[1]), values)
