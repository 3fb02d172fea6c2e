"""What the integrators' drivers and adjoints expect of a method: `init`, `step` and `dense` on (batch, n) matrices.

A state of any structure is one real matrix y (batch, n) inside (`StateSpec`), and the user's field an `Rhs` that takes
and returns such matrices. Times t and steps h come in two shapes:

- one step for the batch: Python floats, or 0-dim tensors where a derivative with respect to time is recorded;
- one step per sample: tensors (batch,).

`column(h, y)` makes either of them multiply a matrix. h is negative when time runs backwards, and zero for samples of a
per-sample solve that only wait: a step of zero must return y.

A method is a frozen option class. What it carries from step to step is explicit and of two kinds: `carry`, a tuple of
tensors which are part of the numerical solution and are differentiated (the derivative kept by first-same-as-last
methods, the second state of a reversible one), and `memory`, anything that is reused but carries no derivative (work
space, factorisations). After a rejected step the driver passes the old carry and the new memory. An empty carry makes
the driver call `init` before the step, so a method whose `step` has nothing to carry may return ().

Whether derivatives are recorded is the current grad mode, as everywhere in torch: under no_grad a method may write in
place and reuse buffers; with grad mode on, or inside a torch.func transform (`rhs.functional`), every operation must
be differentiable and out of place. Replays of accepted steps run the very same `init`, `step` and `dense`.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..transforms import autocast_type, inside_transform
from ..tree import StateError, StateSpec

Time = float | Tensor
Carry = tuple[Tensor, ...]


class Rhs:
    """The right-hand side dy/dt of a problem on (batch, n) matrices.

    The field runs under the autocast that was on when this was made; an integrator's own operations do not.

    Attributes:
        field: the user's function of (t, y, *args).
        args: its further arguments.
        spec: how the state lies in the matrix; a method that treats parts of the state differently looks here.
        batch: the number of samples.
        calls: how often the field has been evaluated.
        once: whether no more than first derivatives will be taken of what is recorded, which a method may make use of.
    """

    __slots__ = (
        "_as_is",
        "_autocast",
        "_device",
        "_dtype",
        "_full",
        "_own",
        "_rows",
        "_shape",
        "args",
        "batch",
        "calls",
        "field",
        "once",
        "spec",
    )

    def __init__(self, field: Callable[..., Any], args: tuple[Any, ...], spec: StateSpec, batch: int) -> None:
        self.field, self.args, self.spec, self.batch, self.calls, self.once = field, args, spec, batch, 0, False
        self._shape = (batch, spec.size)
        self._full = (batch, *spec.leaves[0].shape) if spec.single else None
        self._as_is = self._full == self._shape
        self._dtype, self._device = spec.dtype, spec.device
        self._autocast = autocast_type(spec.device)
        self.stand_in(None, frozenset())

    def stand_in(self, rows: Tensor | None, own: frozenset[int]) -> None:
        """From now on let other samples' args stand in for some.

        Args:
            rows: (batch,) the sample whose args each row is evaluated with, or None for its own.
            own: which of the leaves of args have a row for each sample.
        """
        self._rows, self._own = rows if own else None, own

    def __call__(self, t: Time, y: Tensor) -> Tensor:
        """The derivative (batch, n) at matrix `y`.

        Raises:
            StateError: the field returned another structure, shape, dtype or device than the state's.
        """
        self.calls += 1
        if self._full is None or self._autocast is not None:
            return self._checked(self._evaluate(t, y))
        dtype, full, as_is = self._dtype, self._full, self._as_is
        # As `time` has it, without the call.
        if not isinstance(t, Tensor):
            t = torch.scalar_tensor(t, dtype=dtype, device=self._device)
        elif t.dtype is not dtype:
            t = t.to(dtype)
        args = self.args if self._rows is None else self._swapped(self._rows)
        out = self.field(t, y if as_is else y.reshape(full), *args)
        if isinstance(out, Tensor) and out.shape == full and out.dtype is dtype and out.device == self._device:
            return out if as_is else out.reshape(self._shape)
        return self._checked(out)

    def _evaluate(self, t: Time, y: Tensor) -> Any:
        args = self.args if self._rows is None else self._swapped(self._rows)
        if self._autocast is None:
            return self.field(self.time(t), self.spec.unflatten(y), *args)
        # Weights that autocast has cast before would tie evaluations together, and may lack their derivatives.
        with torch.autocast(self._device.type, self._autocast, cache_enabled=False):
            return self.field(self.time(t), self.spec.unflatten(y), *args)

    def _swapped(self, rows: Tensor) -> tuple[Any, ...]:
        leaves, structure = pytree.tree_flatten(self.args)
        swapped = [leaf.index_select(0, rows) if i in self._own else leaf for i, leaf in enumerate(leaves)]
        args: tuple[Any, ...] = pytree.tree_unflatten(swapped, structure)
        return args

    def _checked(self, out: Any) -> Tensor:
        matrix = self.spec.flatten(out, "the field's derivative", cast=self._autocast is not None)
        if len(matrix) != self.batch:
            found = [tuple(leaf.shape) for leaf in pytree.tree_leaves(out)]
            raise StateError(f"the field's derivative: expected a batch of {self.batch}, got shapes {found}.")
        return matrix

    def time(self, t: Time) -> Tensor:
        """`t` as the field sees it: 0-dim or (batch,), in the state's real dtype and on its device."""
        if isinstance(t, Tensor):
            return t if t.dtype is self._dtype else t.to(self._dtype)
        return torch.scalar_tensor(t, dtype=self._dtype, device=self._device)

    def with_args(self, args: tuple[Any, ...]) -> Rhs:
        """The same field with other arguments, counting from zero."""
        other = Rhs(self.field, args, self.spec, self.batch)
        other._autocast = self._autocast
        return other

    @property
    def functional(self) -> bool:
        """Whether a method must refrain from writing in place."""
        return torch.is_grad_enabled() or inside_transform()


@dataclasses.dataclass(slots=True)
class Step:
    """One step as a method proposes it.

    Attributes:
        y: the state at its end (batch, n).
        error: an estimate of its local error (batch, n), or None from a method without one.
        carry: for the next step, should this one be accepted.
        memory: for the next step in any case.
        failed: mask (batch,) of samples whose step could not be computed, as when Newton's method diverges; None
            where that cannot happen.
        stages: what `dense` needs; private to the method.
    """

    y: Tensor
    error: Tensor | None
    carry: Carry
    memory: Any = None
    failed: Tensor | None = None
    stages: Any = None


class Method(abc.ABC):
    """A one-step integrator. Subclasses are frozen option classes (`@options`)."""

    @property
    @abc.abstractmethod
    def order(self) -> int:
        """Of the solution: the global error falls as h^order."""

    @property
    def error_order(self) -> int | None:
        """The error estimate falls as h^error_order; None for a method that has no estimate."""
        return None

    def tuned(self, rtol: float, atol: float) -> Method:
        """The same method for a solve with these tolerances; those that solve equations of their own make use of it."""
        return self

    def init(self, rhs: Rhs, t: Time, y: Tensor) -> Carry:
        """What the first step is given, and the first one after a jump of the field."""
        return ()

    def derivative(self, rhs: Rhs, t: Time, y: Tensor, carry: Carry) -> Tensor:
        """The field at (t, y), from the carry where it is there already."""
        return rhs(t, y)

    @abc.abstractmethod
    def step(self, rhs: Rhs, t: Time, y: Tensor, h: Time, carry: Carry, memory: Any = None) -> Step:
        """From y at t to t + h."""

    def strain(self, h: Time, step: Step) -> Tensor | None:
        """How long a step is, for every sample (batch,), in units of the longest one with which perturbations along
        the stiffest direction do not grow; None where that is not known, or no matter.
        """
        return None

    def dense(self, rhs: Rhs, t: Time, y: Tensor, h: Time, step: Step) -> Tensor:
        """The step's dense output: coefficients (p + 1, batch, n) of y(theta) = sum_p theta^p coefficient_p, theta in
        [0, 1]. It is called after the step was accepted and before the next one; it may set `step.carry` to what it
        has evaluated on the way. This one is the cubic Hermite interpolant, at the cost of two evaluations.
        """
        return hermite(y, step.y, rhs(t, y), rhs(t + h, step.y), h)


def hermite(y0: Tensor, y1: Tensor, f0: Tensor, f1: Tensor, h: Time) -> Tensor:
    """Coefficients (4, batch, n) of the cubic that has values y0, y1 and derivatives f0, f1 at the ends of a step h."""
    h = column(h, y0)
    change, start, end = y1 - y0, h * f0, h * f1
    return torch.stack((y0, start, 3 * change - 2 * start - end, start + end - 2 * change))


def column(h: Time, like: Tensor) -> Time:
    """`h` so that it multiplies a (batch, n) matrix of `like`'s type."""
    if not isinstance(h, Tensor):
        return h
    return h.to(like.dtype).unsqueeze(-1) if h.ndim else h.to(like.dtype)


def renewed(method: Method, rhs: Rhs, t: Time, y: Tensor, carry: Carry, restart: bool | Tensor) -> Carry:
    """The carry, made anew for the samples in `restart`."""
    if not carry or restart is True:
        return method.init(rhs, t, y)
    if restart is False:
        return carry
    assert isinstance(restart, Tensor)
    rows = restart.unsqueeze(-1)
    return tuple(torch.where(rows, new, old) for new, old in zip(method.init(rhs, t, y), carry))
