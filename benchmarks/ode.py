"""Differential equations beside torchdiffeq, torchode, torchdyn and diffrax, in one run.

    python benchmarks/ode.py [--quick] [--only a,b,c2,c64,d,stiff,memory]

Everything is CPU time of one thread on one core; the solvers take turns, and the best of several turns counts, so that
what else the machine does weighs on all alike. Ratios carry over to other machines, absolute times do not. All take
Dormand and Prince's method with the same tolerances (the stiff problems: Kvaerno's of order 5). Errors are maxima
over all times and samples against a tight solution; a gradient's is relative to the norm of a tight one. A peer that
is not installed is left out, with a note.
"""

# ruff: noqa: E402 - the number of threads is set before the libraries that read it are imported
from __future__ import annotations

import argparse
import dataclasses
import math
import os
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[name] = "1"
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import ode_memory
import ode_peers
import ode_problems
import torch
from ode_peers import Solver
from ode_problems import Problem
from torch import Tensor

from restpoint.solvers.ode import CheckpointAdjoint, Dopri8, Kvaerno5


@dataclasses.dataclass
class Row:
    """What was measured of one solver on one problem; times in seconds, NaN where it failed."""

    forward: float = math.nan
    both: float = math.nan
    steps: int | None = None
    evaluations: int | None = None
    further: int | None = None
    error: float = math.nan
    gradient_error: float = math.nan
    failure: str = ""


def best_times(runs: Sequence[Callable[[], Any]], turns: int) -> list[float]:
    """The least CPU time of each over `turns` rounds in which they take turns."""
    best = [math.inf] * len(runs)
    for _ in range(turns):
        for i, run in enumerate(runs):
            begin = time.process_time()
            run()
            best[i] = min(best[i], time.process_time() - begin)
    return best


def reference(problem: Problem, stiff: bool) -> tuple[Tensor, list[Tensor]]:
    """A tight solution and its gradients, by recording all steps."""
    tight = problem.tight()
    method = Kvaerno5() if stiff else Dopri8()
    if stiff:
        tight = dataclasses.replace(tight, rtol=1e-9, atol=1e-3 * problem.atol)
    solver = ode_peers.ours("tight", solver=method, adjoint=CheckpointAdjoint())
    return solver.answer(tight, True)


def measure(problem: Problem, solvers: list[Solver], turns: int, stiff: bool = False) -> dict[str, Row]:
    """All rows of one table."""
    exact, exact_grads = reference(problem, stiff)
    rows: dict[str, Row] = {}
    runs: list[tuple[Row, str, Callable[[], Any]]] = []
    for solver in solvers:
        row = rows[solver.name] = Row()
        try:
            row.steps, row.evaluations, row.further = solver.counts(problem)
            solution, grads = solver.answer(problem, True)
            row.error = float((solution.double() - exact).abs().max())
            row.gradient_error = relative(grads, exact_grads)
            runs += [(row, "forward", solver.forward(problem)), (row, "both", solver.backward(problem))]
            for _, _, run in runs[-2:]:
                run()
        except (AssertionError, RuntimeError, ValueError) as failure:
            runs = [entry for entry in runs if entry[0] is not row]
            row.failure = " ".join(str(failure).split())[:60]
    times = best_times([run for _, _, run in runs], turns)
    for (row, attribute, _), seconds in zip(runs, times):
        setattr(row, attribute, seconds)
    report(problem, rows)
    return rows


def relative(grads: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest relative error of the gradients."""
    return max(float((g.double() - e).norm() / e.norm()) for g, e in zip(grads, exact, strict=True))


def report(problem: Problem, rows: dict[str, Row]) -> None:
    """The table."""
    print(f"\n{problem.name}: {problem.title}, rtol {problem.rtol:g}, atol {problem.atol:g}")
    heads = ("forward", "+ backward", "steps", "evals", "+ backward", "error", "gradient")
    print(f"{'':26}" + "".join(f"{head:>12}" for head in heads))
    for name, row in rows.items():
        if row.failure:
            print(f"{name:26}  failed: {row.failure}")
            continue
        counts = [row.steps, row.evaluations, row.further]
        cells = [f"{1e3 * row.forward:.2f} ms", f"{1e3 * row.both:.2f} ms"]
        cells += ["-" if count is None else str(count) for count in counts]
        cells += [f"{row.error:.1e}", f"{row.gradient_error:.1e}"]
        print(f"{name:26}" + "".join(f"{cell:>12}" for cell in cells), flush=True)


def verdict(what: str, value: float, target: float, at_most: bool = False) -> None:
    """One ratio beside what is aimed at."""
    met = value <= target if at_most else value >= target
    bound = "at most" if at_most else "at least"
    print(f"  {what:66}{value:9.3g}   ({bound} {target:g}: {'met' if met else 'MISSED'})")


CONTINUOUS = ("restpoint backsolve", "restpoint interpolated", "restpoint odeint_adjoint")
TORCH_PEERS = ("torchdiffeq", "torchdiffeq adjoint", "torchode", "torchdyn")


def compare(problem: Problem, rows: dict[str, Row]) -> None:
    """The ratios of one problem."""
    ours, theirs = rows["restpoint"], rows.get("torchdiffeq")
    others = [rows[name] for name in TORCH_PEERS if name in rows and not rows[name].failure]
    parts = (("forward", "forward"), ("both", "forward + backward"))
    if theirs is not None and others:
        faster, than_all = (3.0, 2.0) if problem.name in "ad" else (1.0, 1.0)
        for attribute, label in parts:
            mine = getattr(ours, attribute)
            verdict(f"torchdiffeq / restpoint, {label}", getattr(theirs, attribute) / mine, faster)
            fastest = min(getattr(row, attribute) for row in others)
            verdict(f"fastest PyTorch peer / restpoint, {label}", fastest / mine, than_all)
        verdict("error / torchdiffeq's", ours.error / theirs.error, 1.0, at_most=True)
    if problem.name == "a":
        overhead(problem, rows)
    if problem.name == "d":
        row = rows["restpoint per sample"]
        verdict("error with steps per sample", row.error, 1.7e-4, at_most=True)
        if "torchode" in rows:
            for attribute, label in parts:
                value = getattr(rows["torchode"], attribute) / getattr(row, attribute)
                verdict(f"torchode / restpoint, both with steps per sample, {label}", value, 2.0)
    compiled, xla = rows.get("restpoint compiled"), rows.get("diffrax (jit)")
    if compiled is None or compiled.failure:
        return
    verdict("gradient error of compiled / eager", compiled.gradient_error / ours.gradient_error, 1.2, at_most=True)
    if theirs is not None and problem.name == "a":
        for attribute, label in parts:
            verdict(f"torchdiffeq / compiled, {label}", getattr(theirs, attribute) / getattr(compiled, attribute), 10.0)
    if xla is not None and problem.name != "d":
        verdict("compiled / diffrax, forward + backward", compiled.both / xla.both, 1.5, at_most=True)


@torch.no_grad()
def overhead(problem: Problem, rows: dict[str, Row]) -> None:
    """Microseconds that a step costs beside its evaluations."""
    t, y = problem.t[0], problem.y0

    def evaluate() -> None:
        for _ in range(200):
            problem.field(t, y, *problem.params)

    one = best_times([evaluate], 10)[0] / 200
    for name in ("torchdiffeq", "torchode", "restpoint", "restpoint per sample", "restpoint odeint"):
        row = rows.get(name)
        if row is None or not row.steps or not row.evaluations:
            continue
        cost = 1e6 * (row.forward - one * row.evaluations) / row.steps
        if name == "restpoint":
            verdict("overhead of a step, microseconds: restpoint", cost, 120.0, at_most=True)
        else:
            print(f"  {'overhead of a step, microseconds: ' + name:66}{cost:9.3g}")


def stiff(turns: int, with_peers: list[Solver], quick: bool) -> None:
    """Stiff problems."""
    names = [solver.name for solver in with_peers]
    implicit: list[Solver] = list(ode_peers.stiff())
    if any(name.startswith("diffrax") for name in names):
        implicit.append(ode_peers.Diffrax("diffrax Kvaerno5 (jit)", "Kvaerno5"))
    explicit = [solver for solver in with_peers if solver.name in ("torchdiffeq", "torchode")]
    ends = (1.0,) if quick else (1.0, 2000.0)
    problems = [ode_problems.stiff_van_der_pol(end) for end in ends] + [ode_problems.robertson(10.0 if quick else 1e5)]
    for problem in problems:
        solvers = [*explicit, *implicit] if problem.name == "vdp 1" else implicit
        rows = measure(problem, solvers, turns, stiff=True)
        mine, xla = rows["restpoint Kvaerno5"], rows.get("diffrax Kvaerno5 (jit)")
        if xla is not None and mine.steps and xla.steps:
            verdict("steps / diffrax's", mine.steps / xla.steps, 1.0, at_most=True)


def main() -> None:
    """Everything that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer turns, a shorter d and shorter stiff problems")
    parser.add_argument("--only", default="a,b,c2,c64,d,stiff,memory", help="which parts, separated by commas")
    args = parser.parse_args()
    wanted = args.only.split(",")
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    warnings.simplefilter("ignore")
    others, missing = ode_peers.peers()
    for note in missing:
        print(note)
    # What takes a few milliseconds is disturbed by as much, and takes many turns to be seen undisturbed.
    turns = 2 if args.quick else 21
    problems = {
        "a": ode_problems.spiral,
        "b": ode_problems.network,
        "c2": lambda: ode_problems.flow(2, 64, 256, exact=True),
        "c64": lambda: ode_problems.flow(64, 128, 128, exact=False),
        "d": lambda: ode_problems.van_der_pol(2.0 if args.quick else 20.0),
    }
    for name, make in problems.items():
        if name in wanted:
            problem = make()
            # That continuous adjoints survive d is tested; they take minutes.
            mine = [x for x in ode_peers.eager() + ode_peers.compiled() if name != "d" or x.name not in CONTINUOUS]
            rows = measure(problem, others + mine, max(turns // 7, 1) if name == "d" else turns)
            compare(problem, rows)
    if "stiff" in wanted:
        stiff(1 if args.quick else 3, others, args.quick)
    if "memory" in wanted:
        ode_memory.measure((25, 100) if args.quick else (25, 100, 400))


if __name__ == "__main__":
    main()
