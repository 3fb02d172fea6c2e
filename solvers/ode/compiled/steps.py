"""The driver that runs a compiled loop: what `SharedSteps` finds, by way of chunks of memory."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...solution import Status
from ..first_step import first_step
from ..mesh import END, FREE, Mesh, Taken
from ..problem import Problem, Run
from ..shared_steps import UNDERFLOW
from .attempt import ARRIVED, TROUBLE, Chunk, FunctionalRhs, Position
from .engine import Engine
from .reasons import Trouble


class CompiledSteps:
    """One solve by an engine, from the first to the last output time.

    Attributes:
        result: what it found.
        here: where it ended.
        chunks: memory with the accepted steps, and how many of each there are and how many dense outputs; only the
            last one unless all are kept.
    """

    def __init__(self, problem: Problem, engine: Engine, known: list[Tensor], keep: bool) -> None:
        """Solve.

        Raises:
            Trouble: a sample breaks, or no step is short enough.
        """
        self.problem, self.engine, self.known, self.keep = problem, engine, known, keep
        assert problem.times.listed is not None
        self.outputs = problem.times.listed
        self.sign = math.copysign(1.0, self.outputs[-1] - self.outputs[0])
        self.chunks: list[tuple[Chunk, int, int]] = []
        self.steps: list[Taken] = []
        self.picks: list[int] = []
        self.dense: list[Tensor] = []
        self.accepted = self.rejected = 0
        self.result = self._run()

    def _run(self) -> Run:
        problem, engine = self.problem, self.engine
        rhs, start = problem.rhs, self.outputs[0]
        first = problem.method.init(rhs, start, problem.y0)
        here = engine.start(
            problem.y0.contiguous(), first[: engine.plan.carries], start, self._first_step(start, first)
        )
        chunk: Chunk | None = None
        setting, zero = engine.setting(problem), torch.zeros_like(here.accepted)
        while True:
            if chunk is None or self.keep:
                chunk = engine.chunk(here.y, here.carry)
            budget = torch.full_like(zero, problem.max_steps - self.accepted - self.rejected)
            here = here._replace(accepted=zero, rejected=zero, filled=zero, budget=budget)
            here = Position.of(engine.forward(here.flat(), [setting, *chunk.flat()], self.known), engine.plan)
            t, h, ratio, *counts = torch.stack([*here[:3], *(part.double() for part in here[3:7])]).tolist()
            accepted, rejected, filled, phase = map(int, counts)
            if phase == TROUBLE:
                raise Trouble
            self._note(chunk, accepted, filled, phase == ARRIVED)
            self.accepted, self.rejected = self.accepted + accepted, self.rejected + rejected
            if phase == ARRIVED or self.accepted + self.rejected >= problem.max_steps:
                break
        self.here = here
        return self._report(here.y, phase == ARRIVED, t, h, ratio)

    def _first_step(self, t: float, carry: tuple[Tensor, ...]) -> float:
        control, given = self.problem.controller, self.problem.first_step
        given = control.first_step if given is None else float(given)
        h = abs(first_step(self.problem, t, self.problem.y0, carry) if given is None else given)
        h = min(max(h, control.min_step), control.max_step)
        resolution = UNDERFLOW * max(abs(t), abs(t + self.sign * h), 1e-6 * abs(self.outputs[-1] - t))
        return math.copysign(max(h, resolution), self.sign)

    def _note(self, chunk: Chunk, count: int, filled: int, arrived: bool) -> None:
        """Put a chunk's steps on the list."""
        if not self.keep:
            self.chunks.clear()
        self.chunks.append((chunk, count, filled))
        before = len(self.steps)
        for t, h, slot in chunk.log[:count].tolist():
            if slot >= 0:
                self.picks.append(len(self.steps))
            self.steps.append(Taken(t, h, FREE, True, not self.steps, slot >= 0))
        if arrived:
            self.steps[-1] = self.steps[-1]._replace(lands=END)
        if filled:
            dense = chunk.dense[0][:filled]
            self.dense.append(dense if self.keep or (arrived and not before) else dense.clone())

    def _places(self, t: float) -> Tensor:
        """The dense output that each inner output time lies in."""
        device = self.problem.y0.device
        if len(self.outputs) == 2:
            return torch.zeros((0,), dtype=torch.long, device=device)
        starts = [*(taken.t for taken in self.steps), t]
        ends = torch.tensor([starts[i + 1] for i in self.picks], dtype=torch.float64)
        inner = torch.tensor(self.outputs[1:-1], dtype=torch.float64)
        found = torch.searchsorted(ends * self.sign, inner * self.sign)
        return torch.where(found < len(ends), found, 0).to(device)

    def _report(self, y: Tensor, arrived: bool, t: float, h: float, ratio: float) -> Run:
        problem = self.problem
        batch, device = len(problem.y0), problem.y0.device

        def full(value: float) -> Tensor:
            return torch.full((batch,), value, dtype=torch.float64, device=device)

        def count(value: int) -> Tensor:
            return torch.full((batch,), value, dtype=torch.long, device=device)

        tries = self.accepted + self.rejected
        return Run(
            y=y,
            mesh=Mesh(self.steps, self.picks),
            dense=self.dense[0] if len(self.dense) == 1 else torch.cat(self.dense) if self.dense else None,
            places=self._places(t),
            reached=full(t),
            status=count(int(Status.CONVERGED if arrived else Status.MAX_STEPS)),
            accepted=count(self.accepted),
            rejected=count(self.rejected),
            evaluations=count(problem.rhs.calls + tries * self.engine.evaluations),
            ratio=full(ratio),
            step=full(h),
            wish=full(h),
            component=count(0),
            hits=[],
        )

    def agrees(self) -> bool:
        """Whether the field is the compiled one, as far as an evaluation after the last step shows."""
        problem, (chunk, count, _), here = self.problem, self.chunks[-1], self.here
        if not count:
            return True
        if here.carry:
            found, expected = here.carry[0], problem.rhs(here.t, here.y)
        else:
            row = count - 1
            rhs = FunctionalRhs(problem.rhs.field, problem.rhs.args, problem.rhs.spec, problem.rhs.batch)
            step, _ = self.engine.plan.step(rhs, chunk.log[row, 0], chunk.y[row], chunk.log[row, 1], ())
            found, expected = here.y, step.y
        slack = torch.finfo(found.dtype).eps ** 0.6
        size = expected.abs().max()
        return bool(((found - expected).abs() <= slack * (size + expected.abs())).all() | ~size.isfinite())
