"""Directions of descent: gradient, limited-memory BFGS, Newton with conjugate gradients."""

from __future__ import annotations

import abc
import math
from typing import Any

import torch
from torch import Tensor

from ..options import options
from ..transforms import any_true
from ..tree import norms
from .energy import Energy


class Minimizer(abc.ABC):
    """The base of methods for `minimize`. They are written without in-place operations, row by row."""

    @property
    def length(self) -> float | None:
        """The length of every step in units of the direction, without a line search; None searches."""
        return None

    @abc.abstractmethod
    def init(self, y: Tensor, slope: Tensor) -> Any:
        """The memory at the start."""

    @abc.abstractmethod
    def direction(self, energy: Energy, y: Tensor, slope: Tensor, memory: Any) -> Tensor:
        """Where to go from y (batch, n)."""

    def learn(self, memory: Any, step: Tensor, change: Tensor) -> Any:
        """The memory after a step in y and the change of the slope that it made; zero in rows that stay."""
        return memory


@options
class GradientDescent(Minimizer):
    """Down the slope.

    Attributes:
        step: the length of every step, in units of the slope, as for a fixed learning rate. None takes that of Barzilai
            and Borwein, shortened until the energy falls.

    Raises:
        ValueError: step is not positive.

    Source: Barzilai and Borwein 1988.
    """

    step: float | None = None

    def __post_init__(self) -> None:
        if self.step is not None and not 0 < self.step < math.inf:
            raise ValueError(f"GradientDescent: step must be positive and finite; got {self.step!r}.")

    @property
    def length(self) -> float | None:
        """Of a fixed step, one: the direction has it."""
        return None if self.step is None else 1.0

    def init(self, y: Tensor, slope: Tensor) -> Tensor:
        """The length of the first step (batch, 1)."""
        return _first_length(slope) if self.step is None else torch.full_like(slope[:, :1], self.step)

    def direction(self, energy: Energy, y: Tensor, slope: Tensor, memory: Tensor) -> Tensor:
        """-length * slope."""
        return -memory * slope

    def learn(self, memory: Tensor, step: Tensor, change: Tensor) -> Tensor:
        """|s|^2 / s'y where the energy curves upward."""
        if self.step is not None:
            return memory
        curved = (step * change).sum(1, keepdim=True)
        length = step.square().sum(1, keepdim=True) / torch.where(curved > 0, curved, 1.0)
        return torch.where(curved > 0, length, memory)


@options
class LBFGS(Minimizer):
    """Quasi-Newton steps from the last few changes of the slope. The default: superlinear, and a gradient a step.

    Attributes:
        memory: how many changes.

    Raises:
        ValueError: memory is below one.

    Source: Nocedal 1980; Nocedal and Wright 2006, algorithm 7.4.
    """

    memory: int = 10

    def __post_init__(self) -> None:
        if self.memory < 1:
            raise ValueError(f"LBFGS: memory must be at least 1; got {self.memory!r}.")

    def init(self, y: Tensor, slope: Tensor) -> tuple[tuple[Any, ...], Tensor]:
        """No pairs, and the scale of the first step."""
        return (), _first_length(slope)

    def direction(self, energy: Energy, y: Tensor, slope: Tensor, memory: Any) -> Tensor:
        """The two loops."""
        pairs, scale = memory
        q, alphas = slope, []
        for s, t, rho in reversed(pairs):
            alpha = rho * (s * q).sum(1, keepdim=True)
            q = q - alpha * t
            alphas.append(alpha)
        q = scale * q
        for (s, t, rho), alpha in zip(pairs, reversed(alphas), strict=True):
            q = q + s * (alpha - rho * (t * q).sum(1, keepdim=True))
        return -q

    def learn(self, memory: Any, step: Tensor, change: Tensor) -> Any:
        """One more pair, and the oldest forgotten; rows without positive curvature learn nothing of it."""
        pairs, scale = memory
        curved = (step * change).sum(1, keepdim=True)
        eps = torch.finfo(step.dtype).eps
        sound = curved > eps * (norms(step) * norms(change)).unsqueeze(1)
        rho = torch.where(sound, 1 / torch.where(sound, curved, 1.0), 0.0)
        size = change.square().sum(1, keepdim=True)
        scale = torch.where(sound, curved / torch.where(size > 0, size, 1.0), scale)
        return (*pairs, (step, change, rho))[-self.memory :], scale


@options
class NewtonCG(Minimizer):
    """Newton's step, by conjugate gradients on products with the Hessian, as exactly as the slope is small.

    Quadratic near the minimum and memory-free. Choose it for ill-conditioned energies whose Hessian products are
    affordable; directions of negative curvature end the inner iteration.

    Attributes:
        inner: the largest number of products a step.

    Raises:
        ValueError: inner is below one.

    Source: Nocedal and Wright 2006, algorithm 7.1.
    """

    inner: int = 100

    def __post_init__(self) -> None:
        if self.inner < 1:
            raise ValueError(f"NewtonCG: inner must be at least 1; got {self.inner!r}.")

    def init(self, y: Tensor, slope: Tensor) -> Tensor:
        """The size of the first slope (batch, 1)."""
        return norms(slope).unsqueeze(1)

    def direction(self, energy: Energy, y: Tensor, slope: Tensor, memory: Tensor) -> Tensor:
        """d with H d = -slope, roughly."""
        product = energy.curvature(y)
        tiny = torch.finfo(y.dtype).tiny
        first = norms(slope).unsqueeze(1)
        goal = first * torch.minimum(torch.full_like(first, 0.5), (first / memory.clamp_min(tiny)).sqrt())
        goal = torch.minimum(goal, first * (first / memory.clamp_min(tiny)).clamp_max(0.5))
        d, r = torch.zeros_like(slope), -slope
        p, rr = r, r.square().sum(1, keepdim=True)
        active = rr > 0
        for k in range(min(self.inner, 2 * y.shape[1])):
            if not any_true(active):
                break
            Hp = product(p)
            curved = (p * Hp).sum(1, keepdim=True)
            flat = active & ~(curved > 1e-14 * p.square().sum(1, keepdim=True))
            # The first direction is the slope: a step along it is a step of descent.
            if k == 0:
                d = torch.where(flat, p, d)
            active = active & ~flat
            alpha = torch.where(active, rr / torch.where(active, curved, 1.0), 0.0)
            d, r = d + alpha * p, r - alpha * Hp
            new = r.square().sum(1, keepdim=True)
            active = active & (new.sqrt() > goal)
            p = torch.where(active, r + new / rr.clamp_min(tiny) * p, p)
            rr = new
        return d


def _first_length(slope: Tensor) -> Tensor:
    """Steps of unit length at most, where nothing is known of the curvature (batch, 1)."""
    return 1 / norms(slope).unsqueeze(1).clamp_min(1.0)
