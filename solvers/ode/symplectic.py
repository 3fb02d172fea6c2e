"""Symplectic methods for separable systems of positions and momenta."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ..options import options
from ..transforms import any_true, inside_transform
from ..tree import StateError, StateSpec
from .method import Carry, Rhs, Step, Time, column
from .reversible import ReversibleMethod, Undone

# Cube root of two: the middle one of Yoshida's three steps is that much longer than the others.
_ROOT = 2 ** (1 / 3)
_OUTER, _INNER = 1 / (2 - _ROOT), -_ROOT / (2 - _ROOT)


class Symplectic(ReversibleMethod):
    """Alternating kicks p <- p + a h dp(q) and drifts q <- q + b h dq(p), for a separable field.

    The state is a pair of positions q and momenta p: a tuple or list (q, p), or a dict with the keys "q" and "p", each
    a tensor or a structure of tensors. The field returns (dq/dt, dp/dt) in the same structure, of which dq/dt must not
    depend on q, nor dp/dt on p; the times at which either is evaluated make time one more position and momentum.

    The flow is symplectic: over long times the energy of a Hamiltonian system oscillates and does not drift. This
    holds for steps of one length, which is why there is no error estimate: choose `ConstantController`. Every step can
    be undone, so `ReversibleAdjoint` works.

    Raises (when a solve begins):
        StateError: the state is no such pair.
        ValueError: dq/dt depends on q, or dp/dt on p.

    Source: Hairer, Lubich and Wanner 2006, Geometric numerical integration, sections I.1 and II.4.
    """

    # One more kick than drifts; both add up to one.
    kicks: ClassVar[tuple[float, ...]]
    drifts: ClassVar[tuple[float, ...]]

    def init(self, rhs: Rhs, t: Time, y: Tensor) -> Carry:
        """The force at the start."""
        pair = Pair(rhs.spec, type(self).__name__)
        rates = rhs(t, y)
        if not torch.is_grad_enabled() and not inside_transform():
            self._check_separable(rhs, t, y, rates, pair)
        return (pair.momentum(rates),)

    def step(self, rhs: Rhs, t: Time, y: Tensor, h: Time, carry: Carry, memory: Any = None) -> Step:
        """Kicks and drifts in turn."""
        after, force = self._compose(rhs, t, y, h, carry[0], self.kicks, self.drifts)
        return Step(after, None, (force,))

    def undo(self, rhs: Rhs, t: Time, y: Tensor, h: Time, carry: Carry, memory: Any = None) -> Undone:
        """The same kicks and drifts backwards."""
        before, force = self._compose(rhs, t + h, y, -h, carry[0], self.kicks[::-1], self.drifts[::-1])
        return before, (force,), None

    def _compose(
        self, rhs: Rhs, t: Time, y: Tensor, h: Time, force: Tensor, kicks: tuple[float, ...], drifts: tuple[float, ...]
    ) -> tuple[Tensor, Tensor]:
        pair = Pair(rhs.spec, type(self).__name__)
        length = column(h, y)
        q, p = pair.position(y), pair.momentum(y)
        kicked = drifted = 0.0
        for kick, drift in zip(kicks, drifts):
            if kick:
                p = p + kick * length * force
            kicked, drifted = kicked + kick, drifted + drift
            q = q + drift * length * pair.position(rhs(t + kicked * h, pair.join(q, p)))
            force = pair.momentum(rhs(t + drifted * h, pair.join(q, p)))
        if kicks[-1]:
            p = p + kicks[-1] * length * force
        return pair.join(q, p), force

    def _check_separable(self, rhs: Rhs, t: Time, y: Tensor, rates: Tensor, pair: Pair) -> None:
        """Move the momenta, then the positions: the force, then the velocity, must stay."""
        q, p = pair.position(y), pair.momentum(y)
        moved_p, moved_q = pair.join(q, 1.5 * p + 0.5), pair.join(1.5 * q + 0.5, p)
        for part, moved, names in ((pair.momentum, moved_p, ("dp/dt", "p")), (pair.position, moved_q, ("dq/dt", "q"))):
            before, after = part(rates), part(rhs(t, moved))
            slack = torch.finfo(y.dtype).eps ** 0.5 * (1 + before.abs())
            # A NaN says nothing: the field need not be defined wherever it is tried.
            if any_true((after - before).abs() > slack):
                raise ValueError(
                    f"{type(self).__name__} needs a separable field, but {names[0]} depends on {names[1]}: choose an "
                    "explicit method such as Tsit5(), or split the system otherwise."
                )


class Pair:
    """Which columns of a state's matrix are positions, and which momenta."""

    def __init__(self, spec: StateSpec, name: str) -> None:
        sizes: dict[str, int] = {}
        for leaf in spec.leaves:
            root = leaf.path.split("]")[0]
            sizes[root] = sizes.get(root, 0) + leaf.size
        roots = list(sizes)
        keyed = any(root.startswith("['") for root in roots)
        if len(roots) != 2 or (keyed and set(roots) != {"['q'", "['p'"}):
            raise StateError(
                f"{name}: expected a state of positions and momenta, (q, p) or {{'q': q, 'p': p}}, got "
                f"{spec.structure}."
            )
        self._swapped, self._split = roots[0] == "['p'", sizes[roots[0]]

    def position(self, matrix: Tensor) -> Tensor:
        """Columns of q."""
        return matrix[:, self._split :] if self._swapped else matrix[:, : self._split]

    def momentum(self, matrix: Tensor) -> Tensor:
        """Columns of p."""
        return matrix[:, : self._split] if self._swapped else matrix[:, self._split :]

    def join(self, q: Tensor, p: Tensor) -> Tensor:
        """The matrix."""
        return torch.cat((p, q) if self._swapped else (q, p), dim=1)


@options
class SemiImplicitEuler(Symplectic):
    """The symplectic Euler method: a kick, then a drift. Order 1, two evaluations, fixed steps.

    Source: Hairer, Lubich and Wanner 2006, section I.1.2.
    """

    kicks = (1.0, 0.0)
    drifts = (1.0,)

    @property
    def order(self) -> int:
        """One."""
        return 1


@options
class Leapfrog(Symplectic):
    """The velocity-Verlet, Stoermer or leapfrog method: half a kick, a drift, half a kick. Order 2, two evaluations.

    The one to start with for molecular dynamics, Hamiltonian networks and Hamiltonian Monte Carlo.

    Source: Verlet 1967; Hairer, Lubich and Wanner 2003, "Geometric numerical integration illustrated by the
    Stoermer-Verlet method".
    """

    kicks = (0.5, 0.5)
    drifts = (1.0,)

    @property
    def order(self) -> int:
        """Two."""
        return 2


@options
class Yoshida4(Symplectic):
    """Three leapfrog steps, the middle one backwards in time. Order 4, six evaluations, fixed steps.

    For long orbits at high accuracy.

    Source: Yoshida 1990, "Construction of higher order symplectic integrators".
    """

    kicks = (_OUTER / 2, (_OUTER + _INNER) / 2, (_OUTER + _INNER) / 2, _OUTER / 2)
    drifts = (_OUTER, _INNER, _OUTER)

    @property
    def order(self) -> int:
        """Four."""
        return 4
