"""The continuous adjoint that takes the state from the forward solve's dense output."""

from __future__ import annotations

import bisect
import dataclasses

import torch
from torch import Tensor

from ..options import options
from .adjoint import Task
from .adjoint_continuous import AdjointRhs, ContinuousAdjoint, ContinuousSolve
from .interpolation import polynomial
from .method import Rhs, Time


@options
class InterpolatedAdjoint(ContinuousAdjoint):
    """Derivatives by solving for the cotangent backwards in time, along the dense output of the forward solve.

    As stable as the forward solve, for the memory of its dense output: a few states a step, and nothing of the field.

    Source: Serban and Hindmarsh 2005, "CVODES: the sensitivity-enabled ODE solver in SUNDIALS"; Daulbaev et al. 2020,
    "Interpolation technique to speed up gradients propagation in neural ODEs".
    """

    def prepare(self, task: Task) -> ContinuousSolve:
        """One solve in this way."""
        return _Interpolated(task, self)


class _Interpolated(ContinuousSolve):
    recomputes = True

    def forward(self) -> tuple[Tensor, ...]:
        """Find the steps and keep the dense output of each."""
        self.path = _Path()
        task = dataclasses.replace(self.task, problem=dataclasses.replace(self.problem, observe=self.path.note))
        self.run = run = task.run()
        return tuple(x.detach() for x in (run.y, run.dense) if x is not None)

    def adjoint_rhs(self) -> AdjointRhs:
        return _Along(self.inner, self.path)


class _Path:
    """The dense output of all steps."""

    def __init__(self) -> None:
        self._steps: list[tuple[Time, Time, Tensor]] = []
        self._keys: list[float] = []
        self._sign = 1.0
        self._stacked: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor] | None = None

    def note(self, t: Time, h: Time, dense: Tensor) -> None:
        """Keep a step."""
        if isinstance(t, float) and isinstance(h, float):
            self._sign = 1.0 if h > 0 else -1.0
            self._keys.append(t * self._sign)
        self._steps.append((t, h, dense))

    def at(self, t: Time) -> Tensor:
        """The state (batch, n) at a time, or at times of each sample's own."""
        if isinstance(t, Tensor):
            return self._at_each(t)
        start, length, dense = self._steps[max(bisect.bisect_right(self._keys, t * self._sign) - 1, 0)]
        theta = torch.full((1,), float((t - start) / length), dtype=torch.float64, device=dense.device)
        return polynomial(dense.unsqueeze(0), theta)[0]

    def _at_each(self, t: Tensor) -> Tensor:
        if self._stacked is None:
            starts, lengths, dense = (torch.stack([torch.as_tensor(step[i]) for step in self._steps]) for i in range(3))
            sign = lengths.sum(0).sign()
            # Where a sample took no step there is nothing to find.
            keys, order = torch.where(lengths == 0, torch.inf, starts * sign).T.sort(dim=1)
            self._stacked = keys.contiguous(), order, starts, lengths, dense.transpose(1, 2), sign
        keys, order, starts, lengths, dense, sign = self._stacked
        place = (torch.searchsorted(keys, (t * sign).unsqueeze(1), right=True) - 1).clamp(min=0)
        index = order.gather(1, place).T
        length = lengths.gather(0, index)[0]
        theta = (t - starts.gather(0, index)[0]) / torch.where(length == 0, 1.0, length)
        rows = dense[index[0], torch.arange(len(t), device=t.device)]
        return polynomial(rows.transpose(0, 1).unsqueeze(0), theta.unsqueeze(0))[0]


class _Along(AdjointRhs):
    """Of the cotangent alone."""

    __slots__ = ("path",)

    def __init__(self, inner: Rhs, path: _Path) -> None:
        super().__init__(inner)
        self.path = path

    def split(self, t: Time, matrix: Tensor) -> tuple[Tensor, Tensor]:
        return self.path.at(t), matrix

    def join(self, y: Tensor, rate: Tensor, bar: Tensor) -> Tensor:
        return bar
