"""Compiled solves beside torchdiffeq and compiled diffrax, in one run.

    python benchmarks/ode_compiled.py [--quick] [--only a,b,c2,c64]

Timed and compared as in ode.py: CPU time of one thread, the best of several turns. Compilation, which the first call of
each kind waits for, is measured on the wall clock and starts from an empty cache.
"""

# ruff: noqa: E402 - the number of threads and the compiler's cache are set before the libraries that read them
from __future__ import annotations

import argparse
import os
import tempfile
import time
import warnings
from collections.abc import Callable

CACHE = tempfile.TemporaryDirectory()
os.environ["TORCHINDUCTOR_CACHE_DIR"] = CACHE.name

import ode
import ode_peers
import ode_problems
import torch
from ode_peers import Solver
from ode_problems import Problem
from torch import Tensor

from restpoint.solvers.ode import CompileWarning, Dopri5, solve_ode


class Compiled(ode_peers.TorchSolver):
    """restpoint's, whose field is not evaluated in Python and cannot count."""

    def __init__(self) -> None:
        def solve(problem: Problem, field: Callable, y0: Tensor) -> tuple[Tensor, int]:
            solution = solve_ode(
                field, y0, problem.t, rtol=problem.rtol, atol=problem.atol, solver=Dopri5(), compile=True
            )
            self.solution = solution
            return solution.value, int(solution.stats.steps.max())

        super().__init__("restpoint compiled", solve, ours=True)

    def counts(self, problem: Problem) -> tuple[int | None, int | None, int | None]:
        """By the solution's own statistics."""
        self.answer(problem, True)
        forward, backward = self.solution.stats, self.solution.adjoint_stats
        return tuple(int(count.max()) for count in (forward.steps, forward.evaluations, backward.evaluations))


def compile_times(problem: Problem, solver: Solver) -> tuple[float, float]:
    """Seconds until the first solve is back, and until the first one that is differentiated is."""
    begin = time.perf_counter()
    solver.answer(problem, False)
    middle = time.perf_counter()
    solver.answer(problem, True)
    return middle - begin, time.perf_counter() - middle


def compare(problem: Problem, rows: dict[str, ode.Row]) -> None:
    """The ratios of one problem."""
    compiled = rows["restpoint compiled"]
    for name, target, faster in (("torchdiffeq", 10.0, True), ("diffrax (jit)", 1.5, False)):
        row = rows.get(name)
        if row is None or row.failure:
            continue
        for attribute, label in (("forward", "forward"), ("both", "forward + backward")):
            mine, theirs = getattr(compiled, attribute), getattr(row, attribute)
            if not faster:
                ode.verdict(f"compiled / {name}, {label}", mine / theirs, target, at_most=True)
            elif problem.name == "a":
                ode.verdict(f"{name} / compiled, {label}", theirs / mine, target)
            else:
                print(f"  {f'{name} / compiled, {label}':66}{theirs / mine:9.3g}")
    eager = rows["restpoint"]
    print(f"  {'eager / compiled, forward':66}{eager.forward / compiled.forward:9.3g}")
    print(f"  {'eager / compiled, forward + backward':66}{eager.both / compiled.both:9.3g}")


def main() -> None:
    """Everything that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer turns")
    parser.add_argument("--only", default="a,b,c2,c64", help="which problems, separated by commas")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    warnings.simplefilter("ignore")
    warnings.simplefilter("error", CompileWarning)
    others, missing = ode_peers.peers()
    for note in missing:
        print(note)
    others = [solver for solver in others if solver.name in ("torchdiffeq", "diffrax (jit)")]
    problems = {
        "a": ode_problems.spiral,
        "b": ode_problems.network,
        "c2": lambda: ode_problems.flow(2, 64, 256, exact=True),
        "c64": lambda: ode_problems.flow(64, 128, 128, exact=False),
    }
    for name in args.only.split(","):
        problem, compiled = problems[name](), Compiled()
        forward, backward = compile_times(problem, compiled)
        rows = ode.measure(problem, [*others, ode_peers.ours("restpoint"), compiled], 3 if args.quick else 15)
        compare(problem, rows)
        print(f"  {'seconds of compilation: forward, backward':66}{forward:9.3g}{backward:9.3g}", flush=True)


if __name__ == "__main__":
    main()
