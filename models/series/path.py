"""Control paths: piecewise cubic curves through irregular observations, with their value and derivative."""

from __future__ import annotations

import dataclasses

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ...solvers.options import suggest

KINDS = ("hermite", "linear")


@dataclasses.dataclass(frozen=True)
class ControlPath:
    """A curve X over the points of time of each sample, parametrised by their number.

    At s = i sample b is at its point i, between them the time runs linearly. A controlled differential equation does
    not depend on how its path is parametrised, so samples with times of their own go through one solve, a series that
    has ended stands still, and a step from s = i to i + 1 follows the observations where they are dense.

    Attributes:
        coefficients: X = c0 + c1 u + c2 u^2 + c3 u^3 at s = i + u is given by coefficients[:, i].

    Source: Kidger et al. 2020, section 3, and lemma C.1 on parametrisations.
    """

    coefficients: Float[Tensor, "batch intervals 4 channels"]

    @property
    def end(self) -> float:
        """s at the last point."""
        return float(self.coefficients.shape[1])

    def value(self, s: Float[Tensor, ""] | Float[Tensor, " batch"]) -> Float[Tensor, "batch channels"]:
        """X(s); s is one number, or one a sample."""
        c, u = self._at(s)
        return c[:, 0] + u * (c[:, 1] + u * (c[:, 2] + u * c[:, 3]))

    def derivative(self, s: Float[Tensor, ""] | Float[Tensor, " batch"]) -> Float[Tensor, "batch channels"]:
        """dX/ds; at a point where it jumps, that of the interval after it."""
        c, u = self._at(s)
        return c[:, 1] + u * (2 * c[:, 2] + u * 3 * c[:, 3])

    def _at(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """The coefficients (batch, 4, channels) of the interval that holds s, and where in it s lies."""
        s = s.to(self.coefficients.dtype)
        place = s.detach().floor().clamp(0, self.coefficients.shape[1] - 1)
        index, u = place.long(), s - place
        if s.ndim == 0:
            return self.coefficients.index_select(1, index.reshape(1)).squeeze(1), u
        rows = torch.arange(len(self.coefficients), device=s.device)
        return self.coefficients[rows, index], u.unsqueeze(-1)


def spline_path(
    times: Float[Tensor, "batch length"],
    values: Float[Tensor, "batch length channels"],
    observed: Bool[Tensor, "batch length channels"],
    kind: str = "hermite",
) -> ControlPath:
    """The curve through what was observed, channel by channel.

    Each channel has its own knots, where it was observed: a point of time at which nothing was changes nothing, and
    what `values` holds there is never read. Before its first and after its last observation a channel is held (with
    "hermite" its slope fades after the last one); one that was never observed is zero.

    Args:
        times: ascending in each row; a series that has ended repeats its last time.
        values: what was observed.
        observed: where.
        kind: "hermite" for cubics whose slope at a knot is that of the interval before it, so that the path up to a
            time depends on nothing after the next observation; "linear" for straight lines, which stay within the
            data however uneven the times are.

    Raises:
        ValueError: shapes that do not fit each other, no point of time, times that descend, or an unknown kind.

    Source: Kidger et al. 2020, section 3.1; Morrill et al. 2021, Neural controlled differential equations for online
    prediction tasks, section 3 (Hermite cubics with backward differences).
    """
    if kind not in KINDS:
        raise ValueError(f"spline_path: there is no kind {kind!r}.{suggest(str(kind), list(KINDS))} Known: {KINDS}.")
    check_series(times, values, observed)
    values = torch.where(observed, values, torch.zeros_like(values))
    if times.shape[1] == 1:  # a path needs an interval
        times, values = (torch.cat([x, x], 1) for x in (times, values))
        observed = torch.cat([observed, torch.zeros_like(observed)], 1)
    length = times.shape[1]
    place = torch.arange(length, device=times.device).view(1, -1, 1)
    # Both ends are knots of every channel, of the nearest observation's value.
    latest = torch.where(observed, place, -1).cummax(1).values
    first = observed.long().argmax(1, keepdim=True)
    values = values.gather(1, torch.where(latest < 0, first, latest))
    knot = observed | (place == 0) | (place == length - 1)
    last = torch.where(knot, place, -1).cummax(1).values
    # Of each interval from point j to j + 1 the knots around it, and the one before these.
    left = last[:, :-1]
    following = torch.where(knot, place, length).flip(1).cummin(1).values.flip(1)
    right = following[:, 1:]
    before = last.gather(1, (left - 1).clamp(min=0))
    when = times.unsqueeze(-1).expand(values.shape)
    t0, t1, x0, x1 = when.gather(1, left), when.gather(1, right), values.gather(1, left), values.gather(1, right)
    span, rise = t1 - t0, x1 - x0
    # Where along the knots' interval, in [0, 1], the points lie; between knots of one time they are evenly spread.
    number = (right - left).to(values.dtype)
    start = _over(when[:, :-1] - t0, span, (place[:, :-1] - left) / number)
    stop = _over(when[:, 1:] - t0, span, (place[:, 1:] - left) / number)
    slope = rise
    if kind == "hermite":
        earlier = t0 - when.gather(1, before)
        slope = _over((x0 - values.gather(1, before)) * span, earlier, rise)
    c2, c3 = 2 * (rise - slope), slope - rise
    width = stop - start
    coefficients = torch.stack(
        [
            x0 + start * (slope + start * (c2 + start * c3)),
            width * (slope + start * (2 * c2 + start * 3 * c3)),
            width.square() * (c2 + 3 * start * c3),
            width.pow(3) * c3,
        ],
        dim=2,
    )
    return ControlPath(coefficients)


def observation_path(
    times: Float[Tensor, "batch length"],
    values: Float[Tensor, "batch length variables"],
    observed: Bool[Tensor, "batch length variables"],
    *,
    span: float = 1.0,
    intensity: float = 0.0,
    kind: str = "hermite",
) -> ControlPath:
    """The path of a series: its time, its variables, and how often each of these was observed so far.

    Args:
        times, values, observed: as of `spline_path`.
        span: so long is one unit of the channel of time, which starts at 0.
        intensity: what one observation adds to a variable's channel of counts; 0 leaves these channels out.
        kind: of the curve.

    Returns:
        A path of 1 + variables channels, or with counts of 1 + 2 variables.

    Source: Kidger et al. 2020, section 3.1 (time) and 3.3 (observational intensity).
    """
    check_series(times, values, observed)
    clock = ((times - times[:, :1]) / span).unsqueeze(-1).to(values.dtype)
    channels, seen = [clock, values], [torch.ones_like(clock, dtype=torch.bool), observed]
    if intensity:
        # Where a variable was not seen at the start, its count of zero was.
        known = observed.clone()
        known[:, 0] = True
        channels.append(intensity * observed.cumsum(1).to(values.dtype))
        seen.append(known)
    return spline_path(times.to(values.dtype), torch.cat(channels, -1), torch.cat(seen, -1), kind)


def check_series(times: Tensor, values: Tensor, observed: Tensor) -> None:
    """Refuse a series whose parts do not fit each other.

    Raises:
        ValueError: other shapes than (batch, length) and twice (batch, length, variables), no point of time, a mask
            that is not boolean, or times that descend.
    """
    if times.ndim != 2 or values.ndim != 3 or values.shape[:2] != times.shape or observed.shape != values.shape:
        raise ValueError(
            "A series has times (batch, length), and values and observed (batch, length, variables); got "
            f"{tuple(times.shape)}, {tuple(values.shape)} and {tuple(observed.shape)}."
        )
    if observed.dtype is not torch.bool:
        raise ValueError(f"observed must be boolean; got {observed.dtype}.")
    if not times.shape[1]:
        raise ValueError("A series has at least one point of time; got none.")
    wrong = ~(times.diff(dim=1) >= 0).all(1)
    if bool(wrong.any()):
        raise ValueError(f"times must ascend; those of series {int(wrong.nonzero()[0])} do not.")


def _over(a: Tensor, b: Tensor, otherwise: Tensor) -> Tensor:
    """a / b, and `otherwise` where b is zero, which has no derivative there."""
    empty = b == 0
    return torch.where(empty, otherwise, a / torch.where(empty, torch.ones_like(b), b))
