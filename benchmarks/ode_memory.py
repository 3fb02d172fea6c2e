"""Peak memory of the gradient of a trajectory against its number of steps, adjoint by adjoint.

    python benchmarks/ode_memory.py [--quick] [--plot FILE]

Memory is what tensors take at the peak, forward and backward pass together, counted exactly: the same on every machine.
The state is as large as it must be for the laws to show: `CheckpointAdjoint` records what fits into its first few
megabytes, and only beyond that grows with the square root of the number of steps. Gradients are compared with those of
the same steps recorded as a whole. The plot needs matplotlib.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from restpoint.solvers.diagnose import peak_memory
from restpoint.solvers.ode import (
    BacksolveAdjoint,
    CheckpointAdjoint,
    ConstantController,
    DirectAdjoint,
    Dopri5,
    InterpolatedAdjoint,
    Reversible,
    ReversibleAdjoint,
    solve_ode,
)


@dataclasses.dataclass(frozen=True)
class Kind:
    """An adjoint, its solver, how its memory is to grow from the fewest steps to the most, and its error at most."""

    name: str
    adjoint: Any
    solver: Any = dataclasses.field(default_factory=Dopri5)
    flat: bool = False
    root: bool = False
    exact: bool = False


KINDS = (
    Kind("direct", DirectAdjoint()),
    Kind("checkpoint", CheckpointAdjoint(), root=True, exact=True),
    Kind("checkpoint, recursive", CheckpointAdjoint(recursive=True), exact=True),
    Kind("reversible", ReversibleAdjoint(), Reversible(Dopri5()), flat=True, exact=True),
    Kind("backsolve", BacksolveAdjoint(), flat=True),
    Kind("interpolated", InterpolatedAdjoint()),
)
# Memory that does not grow may still differ by so much: the last step may be shorter, and takes an evaluation more.
SLACK = 1.05


def gradient(steps: int, solver: Any, adjoint: Any, y0: Tensor, weight: Tensor) -> list[Tensor]:
    """Of a loss of the final state."""
    control = ConstantController(dt=1 / steps)
    solution = solve_ode(
        lambda t, y: torch.tanh(y @ weight), y0, (0.0, 1.0), solver=solver, adjoint=adjoint, controller=control
    )
    return list(torch.autograd.grad(solution.value[-1].square().mean(), [y0, weight]))


def relative(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest relative error."""
    return max(float((x - e).norm() / e.norm()) for x, e in zip(found, exact, strict=True))


def verdict(what: str, value: float, bound: float) -> None:
    """One figure beside what is aimed at."""
    print(f"  {what:58}{value:10.3g}   (at most {bound:.3g}: {'met' if value <= bound else 'MISSED'})")


def measure(counts: Sequence[int], samples: int = 512, size: int = 64) -> dict[str, list[float]]:
    """Peaks in MiB by adjoint, printed beside the gradients' errors and what is aimed at."""
    rng = torch.Generator().manual_seed(0)
    y0 = torch.randn(samples, size, dtype=torch.float64, generator=rng).requires_grad_()
    weight = (2 * torch.randn(size, size, dtype=torch.float64, generator=rng) / math.sqrt(size)).requires_grad_()
    print(f"\nPeak memory in MiB by number of steps, state of {samples} x {size} float64, and the gradient's error")
    print(f"{'':26}" + "".join(f"{count:>12}" for count in counts) + f"{'error':>12}")
    peaks: dict[str, list[float]] = {}
    errors: dict[str, float] = {}
    for kind in KINDS:
        peaks[kind.name] = [
            peak_memory(lambda n=n, kind=kind: gradient(n, kind.solver, kind.adjoint, y0, weight)) / 2**20
            for n in counts
        ]
        exact = gradient(counts[0], kind.solver, DirectAdjoint(), y0, weight)
        errors[kind.name] = relative(gradient(counts[0], kind.solver, kind.adjoint, y0, weight), exact)
        cells = "".join(f"{peak:12.1f}" for peak in peaks[kind.name])
        print(f"{kind.name:26}{cells}{errors[kind.name]:12.1e}", flush=True)
    more = counts[-1] / counts[0]
    for kind in KINDS:
        growth = peaks[kind.name][-1] / peaks[kind.name][0]
        if kind.flat:
            verdict(f"memory of {counts[-1]} steps / of {counts[0]}, {kind.name}", growth, SLACK)
        if kind.root:
            verdict(f"memory of {counts[-1]} steps / of {counts[0]}, {kind.name}", growth, SLACK * math.sqrt(more))
        if kind.exact:
            verdict(f"error of the gradient, {kind.name}", errors[kind.name], 1e-10)
    return peaks


def plot(path: str, counts: Sequence[int], peaks: dict[str, list[float]]) -> None:
    """Both axes logarithmic, so that a power law is a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for name, values in peaks.items():
        axes.loglog(counts, values, marker="o", label=name)
    axes.set(xlabel="steps", ylabel="peak memory, MiB", xticks=counts, xticklabels=[str(n) for n in counts])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Everything that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    parser.add_argument("--plot", metavar="FILE", help="draw the table")
    args = parser.parse_args()
    torch.set_num_threads(1)
    counts = (25, 100) if args.quick else (25, 100, 400)
    peaks = measure(counts)
    if args.plot:
        plot(args.plot, counts, peaks)


if __name__ == "__main__":
    main()
