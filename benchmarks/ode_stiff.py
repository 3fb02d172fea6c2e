"""Stiff initial value problems beside scipy and diffrax, in one run: `python benchmarks/ode_stiff.py [--quick]`.

Everything is CPU time of one thread; what is compared takes turns, and the best turn counts. Errors are those of the
end, relative to its largest component, against a reference of scipy's Radau at 1e-12. Steps are accepted and rejected
ones together; scipy tells of accepted ones only. Diffrax (`pip install diffrax`) is left out where it is not
installed; its time is that of the compiled solve. scipy has no derivatives.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"

import numpy as np
import scipy.integrate
import torch

from restpoint.solvers.ode import CheckpointAdjoint, Kvaerno3, Kvaerno5, Method, solve_ode

try:
    import diffrax
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", True)
except ImportError:
    diffrax = None

RTOL, ATOL = 1e-6, 1e-8


@dataclasses.dataclass(frozen=True)
class Workload:
    """A problem y' = f(y, parameters), written once for any array library.

    Attributes:
        name: as printed.
        field: (components of y, parameters) -> components of y'.
        y0: initial values.
        end: the last time, from zero.
        parameters: what the gradient of the last component is taken with respect to, beside y0.
    """

    name: str
    field: Callable[[Sequence[Any], Sequence[Any]], list[Any]]
    y0: list[float]
    end: float
    parameters: list[float]


def van_der_pol(y: Sequence[Any], parameters: Sequence[Any]) -> list[Any]:
    return [y[1], parameters[0] * (1 - y[0] * y[0]) * y[1] - y[0]]


def robertson(y: Sequence[Any], parameters: Sequence[Any]) -> list[Any]:
    slow, middle, fast = parameters[0] * y[0], parameters[1] * y[1] * y[2], parameters[2] * y[1] * y[1]
    return [-slow + middle, slow - middle - fast, fast]


WORKLOADS = (
    Workload("van der Pol, mu 1000, to 1", van_der_pol, [2.0, 0.0], 1.0, [1000.0]),
    Workload("van der Pol, mu 1000, to 2000", van_der_pol, [2.0, 0.0], 2000.0, [1000.0]),
    Workload("Robertson, to 1e5", robertson, [1.0, 0.0, 0.0], 1e5, [0.04, 1e4, 3e7]),
)


@dataclasses.dataclass
class Entry:
    """One row of the table: what runs, and what it found; NaN where that is not known."""

    name: str
    forward: Callable[[], tuple[np.ndarray, float, float]]
    both: Callable[[], Any] | None = None
    time: float = math.inf
    time_both: float = math.inf


def ours(workload: Workload, solver: Method, adjoint: Any, name: str) -> Entry:
    def solve(y0: torch.Tensor, parameters: torch.Tensor) -> Any:
        def field(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return torch.stack(workload.field(y.unbind(-1), parameters.unbind(0)), -1)

        return solve_ode(
            field, y0, (0.0, workload.end), solver=solver, adjoint=adjoint, rtol=RTOL, atol=ATOL, max_steps=10**6
        )

    y0 = torch.tensor([workload.y0], dtype=torch.float64)
    parameters = torch.tensor(workload.parameters, dtype=torch.float64)

    def forward() -> tuple[np.ndarray, float, float]:
        with torch.no_grad():
            solution = solve(y0, parameters)
        return solution.value[-1, 0].numpy(), float(solution.stats.steps), float(solution.stats.evaluations)

    def both() -> torch.Tensor:
        leaves = y0.clone().requires_grad_(), parameters.clone().requires_grad_()
        return torch.autograd.grad(solve(*leaves).value[-1, 0, -1], leaves)[1]

    return Entry(name, forward, both)


def scipys(workload: Workload, method: str) -> Entry:
    def forward() -> tuple[np.ndarray, float, float]:
        found = scipy.integrate.solve_ivp(
            lambda t, y: workload.field(y, workload.parameters),
            (0.0, workload.end),
            workload.y0,
            method=method,
            rtol=RTOL,
            atol=ATOL,
        )
        return found.y[:, -1], len(found.t) - 1, found.nfev

    return Entry(f"scipy {method}", forward)


def diffraxs(workload: Workload) -> Entry:
    @jax.jit
    def solve(y0: Any, parameters: Any) -> Any:
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, p: jnp.stack(workload.field(y, p))),
            diffrax.Kvaerno5(),
            0.0,
            workload.end,
            None,
            y0,
            args=parameters,
            stepsize_controller=diffrax.PIDController(rtol=RTOL, atol=ATOL),
            max_steps=2**14,
        )
        return solution.ys[-1], solution.stats["num_steps"]

    gradient = jax.jit(jax.grad(lambda y0, p: solve(y0, p)[0][-1], argnums=(0, 1)))
    y0, parameters = jnp.array(workload.y0), jnp.array(workload.parameters)

    def forward() -> tuple[np.ndarray, float, float]:
        y, steps = solve(y0, parameters)
        return np.asarray(y), float(steps), math.nan

    def both() -> Any:
        return jax.block_until_ready(gradient(y0, parameters))

    return Entry("diffrax Kvaerno5", forward, both)


def measure(entries: Sequence[Entry], turns: int) -> None:
    """The least CPU times, in seconds, over rounds in which the entries take turns."""
    for entry in entries:
        entry.forward()
        if entry.both:
            entry.both()
    for _ in range(turns):
        for entry in entries:
            begin = time.process_time()
            entry.forward()
            entry.time = min(entry.time, time.process_time() - begin)
            if entry.both:
                begin = time.process_time()
                entry.both()
                entry.time_both = min(entry.time_both, time.process_time() - begin)


def report(workload: Workload, entries: Sequence[Entry]) -> None:
    reference = scipy.integrate.solve_ivp(
        lambda t, y: workload.field(y, workload.parameters),
        (0.0, workload.end),
        workload.y0,
        method="Radau",
        rtol=1e-12,
        atol=1e-14,
    ).y[:, -1]
    print(f"\n{workload.name} (rtol {RTOL:g}, atol {ATOL:g})")
    print(f"{'':34}{'steps':>7}{'evaluations':>13}{'error':>10}{'forward ms':>12}{'+ backward ms':>15}")
    for entry in entries:
        y, steps, evaluations = entry.forward()
        error = np.abs(y - reference).max() / np.abs(reference).max()
        counts = f"{steps:7.0f}" + ("            -" if math.isnan(evaluations) else f"{evaluations:13.0f}")
        both = "              -" if math.isinf(entry.time_both) else f"{1e3 * entry.time_both:15.1f}"
        print(f"{entry.name:34}{counts}{error:10.1e}{1e3 * entry.time:12.1f}{both}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the short problems, once")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    for workload in WORKLOADS:
        if quick and workload.end == 2000:
            continue
        entries = [
            ours(workload, Kvaerno3(), CheckpointAdjoint(), "Kvaerno3, checkpointed"),
            ours(workload, Kvaerno5(), CheckpointAdjoint(), "Kvaerno5, checkpointed"),
            scipys(workload, "Radau"),
            scipys(workload, "BDF"),
        ]
        if diffrax is not None:
            entries.append(diffraxs(workload))
        measure(entries, 1 if quick else 3)
        report(workload, entries)


if __name__ == "__main__":
    main()
