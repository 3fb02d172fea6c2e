"""Dense output: the solution between its steps."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..transforms import autocast_to
from ..tree import StateSpec
from .mesh import Mesh, take
from .times import TimeError


def polynomial(coefficients: Tensor, theta: Tensor) -> Tensor:
    """sum_p theta^p coefficients_p.

    Args:
        coefficients: (points, p + 1, batch, n).
        theta: (points,) or (points, batch).

    Returns:
        (points, batch, n).
    """
    exponents = torch.arange(coefficients.shape[1], device=theta.device)
    powers = (theta.unsqueeze(1) ** exponents.view(-1, *[1] * (theta.ndim - 1))).to(coefficients.dtype)
    if theta.ndim == 1:
        flat = coefficients.reshape(*coefficients.shape[:2], -1)
        return torch.bmm(powers.unsqueeze(1), flat).view(len(theta), *coefficients.shape[2:])
    return (powers.unsqueeze(-1) * coefficients).sum(1)


def slope(coefficients: Tensor) -> Tensor:
    """The coefficients (points, p, batch, n) of the derivative with respect to theta."""
    exponents = torch.arange(1, coefficients.shape[1], device=coefficients.device, dtype=coefficients.dtype)
    return coefficients[:, 1:] * exponents.view(-1, 1, 1)


class Interpolation:
    """The solution at any time within the solve, differentiable as the solution itself is.

    Between steps it is the integrator's own interpolant, or a cubic Hermite one.
    """

    def __init__(
        self,
        spec: StateSpec,
        mesh: Mesh,
        dense: Tensor,
        span: tuple[Tensor, Tensor],
        reached: Tensor,
        ends: tuple[Tensor | None, Tensor | None],
    ) -> None:
        """`dense` holds every step of `mesh`; `span` is where the samples started and were to end, each (batch,)."""
        self._spec, self._dense = spec, dense
        self._first, self._last = span
        self._reached = reached
        index = torch.arange(len(mesh.steps), device=dense.device)
        self._shared = not isinstance(mesh.picks, Tensor)
        if not self._shared:
            index = index.unsqueeze(1).expand(-1, dense.shape[2])
        self._t, self._h = mesh.all_times(index, *ends)
        self._sign = (self._last - self._first).sign()

    def __call__(self, t: Float[Tensor, "times"] | Float[Tensor, "batch times"]) -> Any:
        """The state at times `t`, (T,) or (batch, T), the times stacked in front: (T, batch, ...) per tensor.

        NaN after a sample has ended early.

        Raises:
            TimeError: times outside of the solve, or of another shape.
        """
        coefficients, theta, _, missing = self._find(t)
        with autocast_to(None, theta.device):
            values = polynomial(coefficients, theta)
        return self._spec.unflatten(torch.where(missing, torch.nan, values))

    def derivative(self, t: Float[Tensor, "times"] | Float[Tensor, "batch times"]) -> Any:
        """The state's derivative with respect to time, likewise."""
        coefficients, theta, h, missing = self._find(t)
        with autocast_to(None, theta.device):
            rates = polynomial(slope(coefficients), theta)
        rates = rates / h.to(rates.dtype).reshape(*h.shape, *[1] * (rates.ndim - h.ndim))
        return self._spec.unflatten(torch.where(missing, torch.nan, rates))

    def _find(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(coefficients, theta, length of the step, whether a sample never came there) of every time."""
        batch = self._dense.shape[2]
        if t.ndim not in (1, 2) or (t.ndim == 2 and len(t) != batch):
            raise TimeError(f"t: expected shape (T,) or (batch, T) = ({batch}, T), got {tuple(t.shape)}.")
        times = t.double()
        each = times.T if t.ndim == 2 else times.unsqueeze(1)
        low, high = torch.minimum(self._first, self._last), torch.maximum(self._first, self._last)
        slack = 1e-12 * (high - low)
        outside = (each < low - slack) | (each > high + slack) | ~each.isfinite()
        if bool(outside.any()):
            missed = each.expand_as(outside)[outside][0].item()
            raise TimeError(
                f"t: the solve reaches from {self._first.min().item():.6g} to {self._last.max().item():.6g}; got "
                f"{missed:.6g}."
            )
        missing = ((each - self._reached) * self._sign > slack).expand(-1, batch).unsqueeze(-1)
        if self._shared and t.ndim == 1:
            sign = self._sign[0]
            index = torch.searchsorted((self._t * sign).detach().contiguous(), (times * sign).detach(), right=True) - 1
            index = index.clamp(0, len(self._t) - 1)
            start, h = self._t[index], self._h[index]
            return self._dense[index], (times - start) / h, h, missing
        starts = (self._t.unsqueeze(1) if self._shared else self._t).expand(-1, batch)
        lengths = (self._h.unsqueeze(1) if self._shared else self._h).expand(-1, batch)
        taken = torch.where(lengths == 0, torch.inf, starts * self._sign).detach().T
        # A sample that takes no step in a row is not found there: its rows are sorted to the end.
        ordered, order = taken.sort(dim=1)
        wanted = (each * self._sign).expand(-1, batch).detach().T.contiguous()
        place = (torch.searchsorted(ordered.contiguous(), wanted, right=True) - 1).clamp(min=0)
        index = order.gather(1, place).T
        start, h = starts.gather(0, index), lengths.gather(0, index)
        theta = (each - start) / torch.where(h == 0, 1.0, h)
        return take(self._dense, index), theta, h, missing
