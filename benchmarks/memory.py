"""Peak memory of forward plus backward, and the gradient's error, against the number of iterations.

    python benchmarks/memory.py

Every adjoint differentiates the same convolutional fixed point after exactly K iterations (rtol = atol = 0). Memory is
counted in bytes of live tensors, so two runs print the same numbers. The exit status tells whether the adjoints that
claim memory independent of K keep it within 5 %.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from restpoint.solvers import (
    GMRES,
    Anderson,
    CheckpointAdjoint,
    ImplicitAdjoint,
    JacobianFreeAdjoint,
    PhantomAdjoint,
    Picard,
    ReversibleAdjoint,
    SolverWarning,
    UnrollAdjoint,
    fixed_point,
)
from restpoint.solvers.diagnose import peak_memory

ITERATIONS = (10, 30, 100, 300)
PICTURE = Path(__file__).resolve().parent.parent / "docs" / "images" / "memory.png"

# (name, adjoint, solver, whether its memory must not depend on K)
ADJOINTS = (
    ("implicit", ImplicitAdjoint(), Picard(), True),
    ("implicit, Anderson", ImplicitAdjoint(), Anderson(), True),
    ("phantom, 5 steps", PhantomAdjoint(), Picard(), True),
    ("one-step", JacobianFreeAdjoint(), Picard(), True),
    ("reversible", ReversibleAdjoint(), Picard(damping=0.1), True),
    ("checkpoint, recursive", CheckpointAdjoint(recursive=True), Picard(), False),
    ("checkpoint", CheckpointAdjoint(), Picard(), False),
    ("unroll", UnrollAdjoint(), Picard(), False),
)


class Block(nn.Module):
    """A residual block with the input added before its last activation; contracts by about 0.7 a step."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        """One evaluation."""
        return torch.tanh(0.6 * z + 0.5 * self.second(torch.tanh(self.first(z))) + x)


def main() -> int:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    block = Block(16).double()
    x = 0.3 * torch.randn(4, 16, 8, 8, dtype=torch.float64)
    direction = torch.randn_like(x)

    def gradient(adjoint, solver, steps: int, rtol: float = 0.0) -> Tensor:
        solution = fixed_point(
            block, torch.zeros_like(x), (x,), solver=solver, adjoint=adjoint, rtol=rtol, max_steps=steps
        )
        parts = torch.autograd.grad((solution.value * direction).sum(), tuple(block.parameters()))
        return torch.cat([part.flatten() for part in parts])

    exact = gradient(ImplicitAdjoint(GMRES(rtol=1e-14)), Anderson(), 500, 1e-14)
    memory: dict[str, list[int]] = {}
    error: dict[str, list[float]] = {}
    for name, adjoint, solver, _ in ADJOINTS:
        memory[name], error[name] = [], []
        for steps in ITERATIONS:
            found: list[Tensor] = []
            with warnings.catch_warnings():
                # The reversible iteration says by how much it has drifted; its error is in the table.
                warnings.simplefilter("ignore", SolverWarning)
                memory[name].append(peak_memory(lambda: found.append(gradient(adjoint, solver, steps))))  # noqa: B023
            error[name].append(float((found[0] - exact).norm() / exact.norm()))
    report(memory, error)
    picture(memory, error)
    ratios = {name: max(memory[name]) / memory[name][0] for name, _, _, flat in ADJOINTS if flat}
    failed = [name for name, ratio in ratios.items() if ratio > 1.05]
    print(f"not flat within 5 %: {', '.join(failed) or 'none'}; grows: {growing(memory)}")
    print(f"picture: {PICTURE.relative_to(PICTURE.parent.parent.parent)}")
    return 1 if failed else 0


def growing(memory: dict[str, list[int]]) -> str:
    return ", ".join(f"{n} x{memory[n][-1] / memory[n][0]:.1f}" for n, _, _, flat in ADJOINTS if not flat)


def report(memory: dict[str, list[int]], error: dict[str, list[float]]) -> None:
    heads = "".join(f"{f'K={k}':>10}" for k in ITERATIONS)
    print(f"peak memory, KiB{'':6}{heads}{'ratio':>10}")
    for name, values in memory.items():
        cells = "".join(f"{value / 1024:10.0f}" for value in values)
        print(f"{name:22}{cells}{values[-1] / values[0]:10.3f}")
    print(f"\ngradient's error{'':6}{heads}")
    for name, errors in error.items():
        print(f"{name:22}{''.join(f'{value:10.1e}' for value in errors)}")
    print()


def picture(memory: dict[str, list[int]], error: dict[str, list[float]]) -> None:
    figure = Figure(figsize=(11, 4.2))
    left, right = figure.subplots(1, 2)
    for place, name in enumerate(memory):
        # Some lines lie on top of each other: the later ones are thinner.
        style = {"marker": "os"[place % 2], "markersize": 7 - place / 2, "linewidth": 3.4 - 0.35 * place}
        left.loglog(ITERATIONS, [value / 2**20 for value in memory[name]], label=name, **style)
        right.loglog(ITERATIONS, error[name], label=name, **style)
    left.set_ylabel("peak memory of forward + backward (MiB)")
    right.set_ylabel("relative error of the gradient")
    for axes in (left, right):
        axes.set_xlabel("iterations K")
        axes.set_xticks(ITERATIONS, [str(k) for k in ITERATIONS])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    right.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=130)


if __name__ == "__main__":
    sys.exit(main())
