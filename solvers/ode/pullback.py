"""Cotangents through recorded steps: by hand for explicit Runge-Kutta methods, by autograd for all others."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .explicit import ExplicitRungeKutta, Workspace
from .mesh import END, FREE, Mesh, PickBars, Taken
from .method import Carry, Method
from .replay import replay
from .tape import Recorded, Tape
from .tape import Sums as Sums
from .tape import vector_jacobian as vector_jacobian


@dataclasses.dataclass
class Backward:
    """Cotangents of where the backward pass is just now.

    Attributes:
        y: of the state (batch, n).
        carry: of the method's carry; () where nothing has arrived, and None for parts that it does not reach.
        t: of the time, 0-dim or (batch,) in float64; None where it is not wanted.
        end: of the last time of the solve, likewise.
    """

    y: Tensor
    carry: tuple[Tensor | None, ...] = ()
    t: Tensor | None = None
    end: Tensor | None = None


class ExplicitPullback:
    """Pulls cotangents through the steps of an explicit Runge-Kutta method, the combinations of stages by hand."""

    def __init__(self, method: ExplicitRungeKutta, tape: Tape, mesh: Mesh, bars: PickBars) -> None:
        """`bars` are the cotangents of the mesh's picks."""
        self.method, self.tableau = method, method.tableau
        self.tape, self.mesh, self.bars = tape, mesh, bars
        self._space: Workspace | None = None

    def pull(self, span: range, y: Tensor, carry: Carry, bar: Backward) -> Tensor:
        """From the end of the steps in `span` to their start.

        Args:
            span: indices into the mesh.
            y, carry: at the start of the first step.
            bar: changed in place.

        Returns:
            The state (batch, n) after the last step, for comparison with what the forward pass found.
        """
        self._space = self._space or Workspace(self.tableau, y)
        steps: list[tuple[Recorded, bool]] = []
        with torch.enable_grad():
            for index in span:
                mixed = self._mixed(index, carry)
                recorded, y, carry = self._record(index, y, carry, mixed)
                steps.append((recorded, mixed))
        for index in reversed(span):
            self._pull_step(index, *steps.pop(), bar)
        return y

    def pull_recorded(self, steps: list[Recorded], y: Tensor, bar: Backward) -> None:
        """From the end to the start of the solve, all of whose `steps` have been recorded; they are used up."""
        self._space = Workspace(self.tableau, y)
        for index in reversed(range(len(steps))):
            self._pull_step(index, steps.pop(), False, bar)

    def _record(self, index: int, y: Tensor, carry: Carry, mixed: bool) -> tuple[Recorded, Tensor, Carry]:
        """The step again: its evaluations, its end, and what it carries on."""
        taken, tableau, tape, space = self.mesh.steps[index], self.tableau, self.tape, self._space
        assert space is not None
        if taken.replace is not None:
            y = y.index_select(0, taken.replace)
            carry = tuple(part.index_select(0, taken.replace) for part in carry)
        tape.rhs.stand_in(taken.rows, self.mesh.own)
        end, dense = tableau.end, taken.dense
        first = tape.evaluate(taken.t, y) if mixed or taken.restart is True or not carry else None
        start = carry[0] if first is None else first[0].detach()
        if mixed:
            start = torch.where(_rows(taken.restart), start, carry[0])
        space.start(taken.t, y, taken.h)
        space.put(0, start)
        records, solution = [first], None
        for i in range(1, len(tableau.rows) if dense else tableau.stages):
            argument = space.combine(i)
            if i == end:
                solution = argument
                if not dense and index + 1 == len(self.mesh.steps):
                    records.append(None)
                    continue
            record = tape.evaluate(space.time(i), argument)
            space.put(i, record[0].detach())
            records.append(record)
        if solution is None:
            solution = space.combine(end)
        last = records[end] if end < len(records) else None
        return (records, start), solution, () if last is None else (last[0].detach(),)

    def _mixed(self, index: int, carry: Carry) -> bool:
        """Whether some samples take over the derivative at the start and others evaluate it."""
        return len(carry) > 0 and isinstance(self.mesh.steps[index].restart, Tensor)

    def _pull_step(self, index: int, recorded: Recorded, mixed: bool, bar: Backward) -> None:
        taken, dense, (records, start) = self.mesh.steps[index], self.bars.of(index), recorded
        space, h, end = self._space, taken.h, self.tableau.end
        assert space is not None
        rows = space.bar_rows
        space.bars.zero_()
        space.pull(h, end, bar.y)
        total = bar.y.clone()
        if dense is not None:
            total += dense[0]
            space.pull_polynomial(h, dense[1:])
        incoming = bar.carry[0] if bar.carry else None
        if incoming is not None:
            rows[end].add_(incoming)
        at_start: Tensor | float = 0.0
        by_length: Tensor | float = 0.0
        for i in range(len(records) - 1, -1, -1):
            record = records[i]
            if record is None:
                continue
            cotangent = torch.where(_rows(taken.restart), rows[0], 0.0) if mixed and i == 0 else rows[i]
            pulled, time = self.tape.pull(record, cotangent)
            if pulled is not None:
                total.add_(pulled)
                if i:
                    space.pull(h, i, pulled)
            if time is not None:
                at_start, by_length = at_start + time.double(), by_length + self.tableau.c[i] * time.double()
        if self.tape.timed:
            stages = [start if i == 0 or record is None else record[0].detach() for i, record in enumerate(records)]
            stretch = space.stretch(h, rows[: len(stages)], stages)
            if incoming is not None:
                stretch = stretch - space.stretch(h, [incoming], [stages[end]])
            self._pull_times(taken, at_start, by_length + stretch, bar)
        bar.y = total
        if mixed:
            bar.carry = (torch.where(_rows(taken.restart), 0.0, rows[0]),)
        else:
            bar.carry = () if records[0] is not None else (rows[0].clone(),)
        if taken.replace is not None:
            # Only ended samples are replaced, and what is left of these reaches no result.
            bar.y = torch.zeros_like(total).index_add_(0, taken.replace, total)
            bar.carry = tuple(
                None if part is None else torch.zeros_like(part).index_add_(0, taken.replace, part)
                for part in bar.carry
            )

    def _pull_times(self, taken: Taken, at_start: Tensor | float, length: Tensor, bar: Backward) -> None:
        """A step of constant length hands the cotangent of its end to its start; one that lands ends elsewhere."""
        after = torch.zeros_like(length) if bar.t is None else bar.t
        lands = torch.as_tensor(taken.lands, device=length.device)
        bar.t = torch.where(lands == FREE, after, -length) + at_start
        end = torch.where(lands == END, length + after, 0.0)
        bar.end = end if bar.end is None else bar.end + end


class RecordedPullback:
    """Pulls cotangents through the steps of any method, recording whole segments."""

    def __init__(self, method: Method, tape: Tape, mesh: Mesh, bars: PickBars, ends: Ends) -> None:
        """`ends` are the times whose cotangents are wanted."""
        self.method, self.tape, self.mesh, self.bars, self.ends = method, tape, mesh, bars, ends
        tape.rhs.once = True

    def pull(self, span: range, y: Tensor, carry: Carry, bar: Backward) -> Tensor:
        """As `ExplicitPullback.pull`."""
        sums, rhs = self.tape.sums, self.tape.rhs
        calls = rhs.calls
        with torch.enable_grad():
            leaf = y.detach().requires_grad_()
            held = tuple(part.detach().requires_grad_() for part in carry)
            start, end = (None if x is None else x.detach().requires_grad_() for x in self.ends)
            times = [x for x in (start, end) if x is not None]
            last, after, dense = replay(self.method, rhs, self.mesh, span, leaf, held, start, end)
        sums.evaluations += rhs.calls - calls
        outs, bars = [last], [bar.y]
        for part, cotangent in zip(after, bar.carry):
            if cotangent is not None:
                outs.append(part)
                bars.append(cotangent)
        for index, coefficients in dense.items():
            cotangent = self.bars.of(index)
            if cotangent is not None:
                outs.append(coefficients)
                bars.append(cotangent)
        recorded = [(out, cotangent) for out, cotangent in zip(outs, bars) if out.requires_grad]
        inputs = [leaf, *held, *times, *sums.inputs]
        grads = torch.autograd.grad(
            [out for out, _ in recorded],
            inputs,
            [cotangent for _, cotangent in recorded],
            retain_graph=sums.externals.retain,
            allow_unused=True,
        )
        bar.y = torch.zeros_like(y) if grads[0] is None else grads[0]
        bar.carry = tuple(grads[1 : 1 + len(held)])
        rest = list(grads[1 + len(held) :])
        if start is not None and (pulled := rest.pop(0)) is not None:
            bar.t = pulled if bar.t is None else bar.t + pulled
        if end is not None and (pulled := rest.pop(0)) is not None:
            bar.end = pulled if bar.end is None else bar.end + pulled
        sums.add(rest)
        return last.detach()


def _rows(mask: bool | Tensor) -> Tensor:
    assert isinstance(mask, Tensor)
    return mask.unsqueeze(-1)


Ends = tuple[Tensor | None, Tensor | None]
