"""Step-size controllers: how long the next step is, and whether the last one is accepted."""

from __future__ import annotations

import abc
import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from ..options import options

# A step shorter than the tolerance allows by more than this, as the first one mostly is, tells nothing of the trend.
_SHORT = 1.2

Size = float | Tensor
History = tuple[Any, ...]


@options
class Controller(abc.ABC):
    """Chooses the steps.

    Attributes:
        per_sample: every sample takes its own steps; otherwise the batch takes one. With times (batch, T) samples
            take their own steps in any case. The field then receives t as (batch,) instead of 0-dim.
        min_step: no step is shorter, except to land on a time; an error too large at this length is accepted.
        max_step: no step is longer.
        step_t: times that some step must end at.
        jump_t: times at which the field is discontinuous: a step ends just before each and another one starts, with
            nothing carried over, just after it.
    """

    per_sample: bool = False
    min_step: float = 0.0
    max_step: float = math.inf
    step_t: tuple[float, ...] = ()
    jump_t: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Check the knobs.

        Raises:
            ValueError: steps that are negative, NaN or out of order, or times that are not finite.
        """
        if not 0 <= self.min_step <= self.max_step:
            raise ValueError(f"min_step <= max_step must not be negative; got {self.min_step} and {self.max_step}.")
        for name in ("step_t", "jump_t"):
            times = getattr(self, name)
            times = times.tolist() if isinstance(times, Tensor) else list(times)
            if not all(math.isfinite(x) for x in times):
                raise ValueError(f"{name}: every time must be finite; got {times}.")
            object.__setattr__(self, name, tuple(float(x) for x in times))

    @property
    def adaptive(self) -> bool:
        """Whether it needs an error estimate."""
        return True

    @property
    @abc.abstractmethod
    def first_step(self) -> float | None:
        """The length of the first step; None estimates one from the field."""

    @abc.abstractmethod
    def factor(self, ratio: Size, history: History, order: int) -> tuple[Size, History]:
        """By what factor to change the step.

        Args:
            ratio: the estimated error over the tolerance: a float, or (batch,) for steps per sample. A step is
                accepted where it is at most one.
            history: what an earlier call returned; () at the start.
            order: the estimate falls as h^order.

        Returns:
            The factor, and the history in case that the step is accepted.
        """


@options
class ConstantController(Controller):
    """Steps of one length, each accepted. The last one, and any that must land on a time, is shortened.

    Attributes:
        dt: the length, positive in either direction of time.
    """

    dt: float = dataclasses.field(kw_only=True, default=math.nan)

    def __post_init__(self) -> None:
        """Check the knobs."""
        super().__post_init__()
        if not 0 < self.dt < math.inf:
            raise ValueError(f"ConstantController needs a positive step dt; got dt={self.dt}.")

    @property
    def adaptive(self) -> bool:
        """No error estimate is needed."""
        return False

    @property
    def first_step(self) -> float | None:
        """dt."""
        return self.dt

    def factor(self, ratio: Size, history: History, order: int) -> tuple[Size, History]:
        """Always one."""
        return 1.0, ()


@options
class PIDController(Controller):
    """Proportional, integral and derivative control of the error in proportion to the tolerance.

    With q = safety * r^(-1 / k) for an error r and an estimate of order k, the factor by which a step of the wished
    error would be longer, the factor is q_n^(i + p + d) * q_(n-1)^(-p - 2 d) * q_(n-2)^d over the last accepted steps,
    kept within factor_min and factor_max.

    Attributes:
        p, i, d: the gains. Integral control alone, p = d = 0 and i = 1, takes the fewest steps on smooth problems; a
            small proportional part costs almost none there and rejects far fewer where stability limits the steps.
        safety: aim at this fraction of the step that would just be accepted.
        factor_min: the smallest factor.
        factor_max: the largest factor; a step that follows a rejection does not grow.
        dt0: the first step; None estimates it.

    Source: Soederlind 2003, "Digital filters in adaptive time-stepping"; Hairer, Wanner 1996, section IV.2.
    """

    p: float = 0.2
    i: float = 0.8
    d: float = 0.0
    safety: float = 0.9
    factor_min: float = 0.2
    factor_max: float = 10.0
    dt0: float | None = None

    def __post_init__(self) -> None:
        """Check the knobs."""
        super().__post_init__()
        if not 0 < self.factor_min < 1 <= self.factor_max:
            raise ValueError(f"0 < factor_min < 1 <= factor_max must hold; got {self.factor_min}, {self.factor_max}.")
        if not 0 < self.safety <= 1:
            raise ValueError(f"safety must lie in (0, 1]; got {self.safety}.")
        if self.dt0 is not None and not 0 < self.dt0 < math.inf:
            raise ValueError(f"dt0 must be positive in either direction of time; got {self.dt0}.")
        if self.i + self.p + self.d <= 0:
            raise ValueError(f"the gains must have a positive sum; got p={self.p}, i={self.i}, d={self.d}.")

    @property
    def first_step(self) -> float | None:
        """dt0."""
        return self.dt0

    def factor(self, ratio: Size, history: History, order: int) -> tuple[Size, History]:
        """By the formula above; a step of no error may grow by factor_max."""
        if isinstance(ratio, Tensor):
            aim = self.safety * ratio.clamp(min=1e-16) ** (-1 / order)
        else:
            aim = self.safety * max(ratio, 1e-16) ** (-1 / order)
        gain = self.i + self.p + self.d
        factor = aim if gain == 1 else aim**gain
        following: tuple[Any, ...] = ()
        if self.p or self.d:
            last = history[0] if history else 1.0
            factor = factor * last ** (-self.p - 2 * self.d)
            following = (aim.clamp(max=_SHORT) if isinstance(aim, Tensor) else min(aim, _SHORT),)
        if self.d:
            factor = factor * (history[1] if history else 1.0) ** self.d
            following = (*following, last)
        if isinstance(factor, Tensor):
            assert isinstance(ratio, Tensor)
            return torch.where(
                ratio > 1, factor.clamp(self.factor_min, 1.0), factor.clamp(self.factor_min, self.factor_max)
            ), following
        return min(max(factor, self.factor_min), 1.0 if ratio > 1 else self.factor_max), following


@options
class PIController(PIDController):
    """Proportional and integral control: `PIDController` with gains that suit it."""

    p: float = 0.4
    i: float = 0.6


@options
class IController(PIDController):
    """Integral control: `PIDController` without the other gains."""

    p: float = 0.0
    i: float = 1.0
