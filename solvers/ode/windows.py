"""Cotangents through many steps at once, for small states: what costs there is calling the field, not what it does."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch._C import _functorch

from ..solution import SolverError
from .externals import clock
from .lined_up import LinedUp
from .mesh import Taken
from .method import Carry
from .problem import Keeper, Problem
from .pullback import Backward, ExplicitPullback
from .replay import check_repeats, replay
from .tape import vector_jacobian

# States of so few columns, whose derivative takes as many passes.
_COLUMNS = 16
# Batches of so few numbers; beyond that the operations cost more than calling them.
_NUMBERS = 2**10
# Multiply-adds of all passes with the tensors that the field uses, taken as matrices: likewise.
_WORK = 2**18
# The states of a window take about so many bytes, with which an operation stays within a processor's cache.
_WINDOW = 2**17


def suits(problem: Problem, shared: list[Tensor]) -> bool:
    """Whether the steps of a problem, whose field uses the tensors `shared`, are better pulled back many at once."""
    numbers, columns = problem.y0.numel(), problem.y0.shape[1]
    weights = sum(tensor.numel() for tensor in shared)
    return 0 < columns <= _COLUMNS and numbers <= _NUMBERS and numbers * weights <= _WORK


class StateKeeper(Keeper):
    """Keeps all states while they fit into some memory.

    Attributes:
        states: at the start of every step, and at the end; None if they did not fit.
    """

    def __init__(self, limit: int) -> None:
        """`limit` is how many bytes they may take."""
        super().__init__(None)
        self._left = limit
        self.states: list[Tensor] | None = []

    def offer(self, index: int, y: Tensor, carry: Carry, breaks: bool = False) -> None:
        """Keep it."""
        super().offer(index, y, carry, breaks)
        if self.states is None:
            return
        self.states.append(y)
        self._left -= y.numel() * y.element_size()
        if self._left < 0:
            self.states = None

    def close(self, y: Tensor, carry: Carry) -> None:
        """Keep the last one."""
        if self.states is not None:
            self.states.append(y)
            self.kept = self.kept[:1]

    def line_up(self, lined: LinedUp) -> None:
        """Each sample's states as its steps are lined up."""
        super().line_up(lined)
        if self.states is None or not lined.count:
            return
        *before, last = self.states
        rows = lined.iterations.unsqueeze(-1).expand(-1, -1, last.shape[1])
        states = torch.stack(before).gather(0, rows)
        self.states = [*torch.where(lined.taken.unsqueeze(-1), states, last).unbind(0), last]


class WindowPullback(ExplicitPullback):
    """Pulls cotangents through the steps of an explicit Runge-Kutta method, a window of steps at once.

    All states are known, so that the steps of a window are one batch, recorded once, and n passes yield the derivative
    of every step's end by its start; from the end of the window to its start it then takes one product of small
    matrices a step. This supposes that samples do not depend on each other. The cotangents that it finds are pulled
    back through the recording once more, for those of what all steps share, and must be found again: where they are
    not, and where the field cannot be mapped over steps, the window is done step by step.
    """

    def pull(self, span: range, y: Tensor, carry: Carry, bar: Backward) -> Tensor:
        """As `ExplicitPullback.pull`."""
        states = [y]
        with torch.no_grad():
            for index in span:
                y, carry, _ = replay(self.method, self.tape.rhs, self.mesh, range(index, index + 1), y, carry)
                states.append(y)
        self.tape.sums.evaluations += len(span) * (self.tableau.stages - self.tableau.fsal)
        self.pull_states(span, states, bar)
        return y

    def pull_states(self, span: range, states: list[Tensor], bar: Backward) -> None:
        """The same where the states at the start of every step in `span` and at the end are known."""
        size = max(_WINDOW // (states[0].numel() * states[0].element_size()), 2)
        for stop in range(len(span), 0, -size):
            first = max(0, stop - size)
            part, known = span[first:stop], states[first : stop + 1]
            if not (self._possible and self._pull_window(part, known, bar)):
                check_repeats(super().pull(part, known[0], (), bar), known[-1])

    # Until something speaks against it.
    _possible = True

    def _pull_window(self, span: range, states: list[Tensor], bar: Backward) -> bool:
        """Whether it worked; if not, nothing has changed."""
        try:
            return self._pull_mapped(span, states, bar)
        except SolverError:
            raise
        except Exception:
            # As where vmap records nothing: a field that is evaluated once more in its derivative, such as one under
            # torch.utils.checkpoint, fails outside of vmap.
            self._possible = False
            return False

    def _pull_mapped(self, span: range, states: list[Tensor], bar: Backward) -> bool:
        steps = [self.mesh.steps[index] for index in span]
        if any(step.replace is not None or step.rows is not None for step in steps):
            return False
        dense = self.bars.window(span)
        groups = [_Group(self, steps, states, [i for i, step in enumerate(steps) if not step.dense], None)]
        groups += [_Group(self, steps, states, [i for i, step in enumerate(steps) if step.dense], dense)]
        groups = [group for group in groups if group.places]
        self._possible = all(group.record() for group in groups)
        if not self._possible:
            return False
        matrices, extra = [_scattered(groups, parts) for parts in zip(*(group.derivative() for group in groups))]
        cotangent, after, before = bar.y.unsqueeze(1), [], []
        for matrix, more in zip(reversed(matrices.unbind(0)), reversed(extra.unbind(0))):
            after.append(cotangent)
            cotangent = torch.baddbmm(more.unsqueeze(1), cotangent, matrix)
            before.append(cotangent)
        found, expected = (torch.stack(rows[::-1]).squeeze(2) for rows in (after, before))
        pulled = [group.pull(found) for group in groups]
        again = _scattered(groups, [rows for rows, _ in pulled]) + extra
        self._possible = _same(again, expected)
        if self._possible:
            bar.y = cotangent.squeeze(1)
            for group, (_, rest) in zip(groups, pulled):
                self.tape.sums.add(rest)
                self.tape.sums.add(group.rest)
                self.tape.sums.evaluations += group.evaluations
        return self._possible


class _Group:
    """Steps of a window all of which have a dense output that somebody asks for, or none of which has.

    Attributes:
        places: of the steps in the window.
        rest: cotangents of what all steps share that come from the dense outputs.
        evaluations: of the field, one for every step and stage.
    """

    def __init__(
        self,
        pullback: WindowPullback,
        steps: list[Taken],
        states: list[Tensor],
        places: list[int],
        dense: Tensor | None,
    ) -> None:
        """`dense` are the cotangents of the window's dense outputs, (steps, p + 1, batch, n)."""
        self.method, self.tape, self.places = pullback.method, pullback.tape, places
        self.rest: list[Tensor | None] = [None] * len(self.tape.sums.inputs)
        self.evaluations = 0
        if not places:
            return
        device = states[0].device
        self.t, self.h = (_stacked([getattr(steps[i], name) for i in places], device) for name in ("t", "h"))
        self.y = torch.stack([states[i] for i in places]).requires_grad_()
        self.after = torch.stack([states[i + 1] for i in places])
        self.dense_bar = None if dense is None else dense[places]
        self.interpolant: Tensor | None = None

    def record(self) -> bool:
        """Whether the steps could be recorded at once, and end where they ended before."""
        method, rhs = self.method, self.tape.rhs

        def step(t: Tensor, h: Tensor, y: Tensor) -> tuple[Tensor, ...]:
            taken = method.step(rhs, t, y, h, method.init(rhs, t, y))
            return (taken.y,) if self.dense_bar is None else (taken.y, method.dense(rhs, t, y, h, taken))

        began, calls = clock(), rhs.calls
        try:
            with torch.enable_grad(), _no_fallback():
                self.end, *interpolants = torch.func.vmap(step)(self.t, self.h, self.y)
        except Exception:
            # Whatever it was, going step by step will tell; most likely control flow that looks at values.
            return False
        self.evaluations = (rhs.calls - calls) * len(self.places)
        slack = math.sqrt(torch.finfo(self.y.dtype).eps)
        if not self.end.requires_grad or not torch.allclose(self.end, self.after, rtol=slack, atol=slack):
            return False
        self.interpolant = interpolants[0] if interpolants else None
        last = self.end if self.interpolant is None else self.interpolant
        place = f"Between t = {float(self.t.min()):.6g} and t = {float(self.t.max()):.6g}"
        self.tape.sums.externals.check(last, (self.y,), began, lambda: place)
        return True

    def derivative(self) -> tuple[Tensor, Tensor]:
        """Of the ends by the starts (steps, batch, n, n), and the starts' cotangents by way of the dense outputs."""
        extra: Tensor | None = None
        if self.interpolant is not None:
            inputs = (self.y, *self.tape.sums.inputs)
            assert self.dense_bar is not None
            extra, *self.rest = vector_jacobian((self.interpolant,), inputs, (self.dense_bar,), True)
        columns = []
        for i in range(self.y.shape[-1]):
            unit = torch.zeros_like(self.end)
            unit[..., i] = 1
            (column,) = vector_jacobian((self.end,), (self.y,), (unit,), True)
            columns.append(column)
        matrices = torch.stack(columns, dim=-2)  # type: ignore[arg-type]
        return matrices, torch.zeros_like(self.end) if extra is None else extra

    def pull(self, bars: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """Cotangents of the starts, and of what all steps share, from those of all the window's ends."""
        retain, inputs = self.tape.sums.externals.retain, (self.y, *self.tape.sums.inputs)
        first, *rest = vector_jacobian((self.end,), inputs, (bars[self.places],), retain)
        assert first is not None
        return first, rest


def _scattered(groups: list[_Group], parts: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    """What belongs to the groups, in the order of the window's steps."""
    if len(groups) == 1:
        return parts[0]
    order = torch.tensor([place for group in groups for place in group.places], device=parts[0].device)
    return torch.cat(list(parts))[order.argsort()]


def _same(found: Tensor, expected: Tensor) -> bool:
    """Whether cotangents (steps, batch, n) are the same to rounding."""
    slack = math.sqrt(torch.finfo(found.dtype).eps)
    size = expected.abs().amax((1, 2), keepdim=True)
    return bool(((found - expected).abs() <= slack * size).all())


def _stacked(values: list[float] | list[Tensor], device: torch.device) -> Tensor:
    if isinstance(values[0], Tensor):
        return torch.stack(values)
    return torch.tensor(values, dtype=torch.float64, device=device)


@contextlib.contextmanager
def _no_fallback() -> Iterator[None]:
    """Operations that vmap would go through one by one raise instead."""
    before = _functorch._is_vmap_fallback_enabled()  # type: ignore[attr-defined]
    _functorch._set_vmap_fallback_enabled(False)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        _functorch._set_vmap_fallback_enabled(before)  # type: ignore[attr-defined]
