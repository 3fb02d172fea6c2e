"""Compiled loops, kept from solve to solve."""

from __future__ import annotations

import collections
import dataclasses
import math
import threading
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from ...transforms import no_derivatives
from ..problem import Problem
from ..shared_steps import CALM
from .attempt import RUNNING, Chunk, FunctionalRhs, Plan, Position, Setting, attempt, flat_attempt
from .fingerprint import Fingerprint
from .loop import Loop, current_mode
from .pull import Pullback, Pulled, used
from .reasons import Unfit

# Programs that are kept.
_MOST = 64
# Bytes of states in a chunk of memory, and the number of steps in one.
_CHUNK, _LONGEST = 4 * 2**20, 256
# So many programs may disagree with one field before there is no further one.
_CHANGES = 2


class Engine:
    """The compiled loops of all solves that differ in nothing but the values of tensors.

    Attributes:
        plan: what they do.
        evaluations: of the field in one attempt.
        forward: the loop over attempts.
    """

    def __init__(self, problem: Problem, args: tuple[object, ...], known: Sequence[Tensor], inner: int) -> None:
        """Compile the forward loop; the other one is compiled when it is first needed.

        Args:
            problem: such as it is made for.
            args: the field's arguments, as the tensors in `known`.
            known: the tensors that the field may use.
            inner: output times in between, and those that fill them up.

        Raises:
            Unfit: it cannot be compiled.
        """
        y, device = problem.y0, problem.y0.device
        self._inner, self._mode = inner, current_mode()
        capacity = min(_LONGEST, _CHUNK // max(y.numel() * y.element_size(), 1))
        capacity = max(capacity // CALM, 1) * CALM
        slots = capacity if problem.dense else min(capacity, inner)
        control, rhs = problem.controller, self._rhs(problem, args)
        with no_derivatives():
            time = torch.zeros((), dtype=torch.float64, device=device) + problem.times.values[0]
            self.plan = Plan(problem.method, control, problem.tolerance.columns, capacity, slots, problem.dense, 0, 0)
            trial, dense = self.plan.step(rhs, time, y, torch.zeros_like(time), ())
            history = control.factor(torch.ones_like(time), (), self.plan.order)[1] if control.adaptive else ()
            self.plan = dataclasses.replace(self.plan, carries=len(trial.carry), memories=len(history))
            before = rhs.calls
            self.plan.step(rhs, time, y, torch.zeros_like(time), trial.carry)
            self.evaluations = rhs.calls - before
            self._dense_shape = () if dense is None else (slots + 1, *dense.shape)
            here = self.start(y, trial.carry, float(time), 0.0)
            fixed = [self.setting(problem), *self.chunk(y, trial.carry).flat()]
            self.forward = Loop(
                flat_attempt(self.plan, rhs), here.flat(), fixed, known, range(1, len(fixed)), self._mode
            )
            self._check_attempt(rhs, here, fixed, known)
        self._backward: dict[Hashable, tuple[Loop, list[bool]] | Unfit] = {}

    def _check_attempt(
        self, rhs: FunctionalRhs, here: Position, fixed: Sequence[Tensor], known: Sequence[Tensor]
    ) -> None:
        """Make sure that one accepted step of the compiled loop is what its operations say.

        Raises:
            Unfit: it is not.
        """
        setting = Setting.of(fixed[0])
        # As good as any error is accepted, and the step is long enough to tell.
        setting = setting._replace(atol=torch.full_like(setting.atol, 1e30))
        numbers = torch.cat([torch.stack(setting[:4]), setting.inner])
        here = here._replace(h=setting.span / 64, budget=torch.ones_like(here.budget))
        once, chunk = attempt(self.plan, rhs, here, setting, Chunk.of(fixed[1:], self.plan)), fixed[1:]
        # A dense output that nobody asks for may be written over.
        kept = chunk if bool(once.filled) else chunk[: 2 + self.plan.carries]
        expected = [once.y, *once.carry, *(memory[0].clone() for memory in kept)]
        found = self.forward(here.flat(), [numbers, *chunk], known)[2:]
        _compare([*found, *(memory[0] for memory in kept)], expected)

    @staticmethod
    def _rhs(problem: Problem, args: tuple[object, ...]) -> FunctionalRhs:
        return FunctionalRhs(problem.rhs.field, args, problem.rhs.spec, problem.rhs.batch)

    def start(self, y: Tensor, carry: tuple[Tensor, ...], t: float, h: float) -> Position:
        """The position before the first attempt."""

        def number(value: float) -> Tensor:
            return torch.tensor(value, dtype=torch.float64, device=y.device)

        counts = torch.tensor([0, 0, 0, RUNNING, True, True, 0], device=y.device).unbind()
        history = tuple(number(1.0) for _ in range(self.plan.memories))
        return Position._make((number(t), number(h), number(0.0), *counts, y, carry, history))

    def setting(self, problem: Problem) -> Tensor:
        """What stays the same, as a vector."""
        times, tolerance = problem.times.values, problem.tolerance
        numbers = times.new_tensor([tolerance.rtol, tolerance.atol])
        missing = times.new_full((self._inner - (len(times) - 2),), torch.inf) * (times[-1] - times[0]).sign()
        return torch.cat([times[-1:], times[-1:] - times[:1], numbers, times[1:-1], missing])

    def chunk(self, y: Tensor, carry: tuple[Tensor, ...]) -> Chunk:
        """New memory."""
        rows = self.plan.capacity + 1
        return Chunk(
            torch.empty((rows, 3), dtype=torch.float64, device=y.device),
            y.new_empty((rows, *y.shape)),
            tuple(part.new_empty((rows, *part.shape)) for part in carry),
            (y.new_empty(self._dense_shape),) if self.plan.slots else (),
        )

    def dense_bars(self, like: Tensor) -> tuple[Tensor, ...]:
        """Zeros for the cotangents of a chunk's dense outputs, if there are any."""
        return (like.new_zeros(self._dense_shape),) if self.plan.slots else ()

    def backward(
        self,
        problem: Problem,
        args: tuple[object, ...],
        known: Sequence[Tensor],
        shared: Sequence[Tensor],
        timed: bool,
        chunk: Chunk,
    ) -> tuple[Loop, list[bool]]:
        """The loop that pulls cotangents back, and which of the `shared` tensors it has some for.

        Raises:
            Unfit: it cannot be compiled.
        """
        key = (places_of(shared, known), timed)
        if key not in self._backward:
            try:
                self._backward[key] = self._compile_backward(problem, args, known, shared, timed, chunk)
            except Unfit as reason:
                self._backward[key] = reason
        made = self._backward[key]
        if isinstance(made, Unfit):
            raise made
        return made

    def _compile_backward(
        self,
        problem: Problem,
        args: tuple[object, ...],
        known: Sequence[Tensor],
        shared: Sequence[Tensor],
        timed: bool,
        chunk: Chunk,
    ) -> tuple[Loop, list[bool]]:
        rhs = self._rhs(problem, args)
        reached = used(rhs, problem.times.values[0], problem.y0, shared)
        wanted = tuple(tensor for tensor, there in zip(shared, reached) if there)
        pullback = Pullback(self.plan, rhs, wanted, timed)
        with no_derivatives():
            after = self.end(problem.y0, tuple(part[0] for part in chunk.carry), wanted)
            fixed = [*self.dense_bars(problem.y0), *chunk.flat()]
            loop = Loop(pullback.flat(), after.flat(), fixed, known, mode=self._mode)
            _check_pullback(pullback, loop, after, fixed, known)
            return loop, reached

    def end(self, y_bar: Tensor, carry: tuple[Tensor, ...], shared: Sequence[Tensor]) -> Pulled:
        """The cotangents at the end of a solve."""
        zeros = torch.zeros((2,), dtype=torch.float64, device=y_bar.device)
        counts = torch.ones((2,), dtype=torch.long, device=y_bar.device)
        carry_bars = tuple(part.new_zeros(part.shape) for part in carry)
        totals = tuple(tensor.new_zeros(tensor.shape) for tensor in shared)
        return Pulled._make((*counts.unbind(), *zeros.unbind(), y_bar, carry_bars, totals))


def _check_pullback(
    pullback: Pullback, loop: Loop, after: Pulled, fixed: Sequence[Tensor], known: Sequence[Tensor]
) -> None:
    """Make sure that the compiled loop pulls cotangents through a step as its operations say.

    Raises:
        Unfit: it does not.
    """
    wave = torch.linspace(1, 40, after.y.numel(), device=after.y.device).cos()
    one = torch.ones_like(after.left)
    after = after._replace(y=wave.to(after.y).view_as(after.y), left=one, last=one)
    chunk = Chunk.of(fixed[len(fixed) - 2 - pullback.plan.carries - (pullback.plan.slots > 0) :], pullback.plan)
    dense_bars = fixed[: pullback.plan.slots > 0]
    _compare(loop(after.flat(), fixed, known)[1:], pullback.step(after, chunk, dense_bars).flat()[1:])


def _compare(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Make sure that a compiled program does what the operations that it was compiled from do.

    Raises:
        Unfit: it does something else.
    """
    for here, there in zip(found, expected, strict=True):
        size = float(there.abs().max()) if there.numel() else 0.0
        error = float((here - there).abs().max()) if there.numel() else 0.0
        if math.isfinite(size) and not error <= size * torch.finfo(there.dtype).eps ** 0.6:
            raise Unfit(f"the compiler's program is wrong, by {error:.2g} of {size:.2g}, which is a fault of torch's")


_lock = threading.RLock()
_engines: collections.OrderedDict[Hashable, Engine | Unfit] = collections.OrderedDict()
_disagreed: dict[Hashable, int] = {}
_restless: set[Hashable] = set()
_RESTLESS = "evaluating the field changes what it holds, such as a count of its evaluations"


def engine_for(problem: Problem, args: tuple[object, ...], seen: Fingerprint) -> tuple[Engine, list[Tensor], Hashable]:
    """The engine of a problem, compiled now or before; the tensors that it may use; and its key.

    Raises:
        Unfit: there is none.
    """
    if seen.kind in _restless:
        raise Unfit(_RESTLESS)
    y, columns = problem.y0, problem.tolerance.columns
    inner = _filled_up(problem.times.count - 2)
    key = (
        seen.key,
        problem.rhs.spec,
        len(y),
        y.stride(),
        problem.method,
        problem.controller,
        None if columns is None else tuple(columns.tolist()),
        inner,
        problem.dense,
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.get_float32_matmul_precision(),
        current_mode(),
    )
    known = [*seen.tensors, *([] if columns is None else [columns])]
    with _lock:
        try:
            made = _engines.get(key)
        except TypeError as error:
            raise Unfit(
                f"the solver or the controller cannot be compared with those of other solves: {error}"
            ) from None
        if made is None:
            try:
                made = Engine(problem, args, known, inner)
            except Unfit as reason:
                made = reason
            if Fingerprint(problem.rhs.field, args).key != seen.key:
                _restless.add(seen.kind)
                raise Unfit(_RESTLESS)
            _engines[key] = made
            while len(_engines) > _MOST:
                _engines.popitem(last=False)
        _engines.move_to_end(key)
    if isinstance(made, Unfit):
        raise made
    return made, known, key


def disagrees(key: Hashable) -> None:
    """Forget an engine that computes something else than its field; for good, if it was not the first one."""
    with _lock:
        _disagreed[key] = _disagreed.get(key, 0) + 1
        if _disagreed[key] < _CHANGES:
            _engines.pop(key, None)
        else:
            _engines[key] = Unfit(
                "the field changes from solve to solve by something else than tensors, arguments and attributes"
            )


def _filled_up(count: int) -> int:
    """`count` or more, so that few numbers of output times lead to programs of their own."""
    return 0 if count <= 0 else max(8, 1 << (count - 1).bit_length())


def places_of(tensors: Sequence[Tensor], known: Sequence[Tensor]) -> tuple[int, ...]:
    """Where among the `known` tensors each of `tensors` is found.

    Raises:
        Unfit: one is not.
    """
    places = {id(tensor): place for place, tensor in enumerate(known)}
    for tensor in tensors:
        if id(tensor) not in places:
            raise Unfit(
                f"a tensor of shape {tuple(tensor.shape)} that requires a gradient is found neither in the field's "
                f"arguments nor in its closure, attributes or globals"
            )
    return tuple(places[id(tensor)] for tensor in tensors)
