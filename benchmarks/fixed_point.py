"""Fixed points beside torchdeq, in one run: `python benchmarks/fixed_point.py [--quick]`.

Everything is CPU time of one thread; peers and ours take turns, and the best of several turns counts, so that what
else the machine does weighs on both alike. Ratios carry over to other machines, absolute times do not.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import workloads
from torch import Tensor

from restpoint.solvers import (
    GMRES,
    Anderson,
    Broyden,
    ImplicitAdjoint,
    JacobianFreeAdjoint,
    PhantomAdjoint,
    Picard,
    fixed_point,
)

STEPS = 30
TARGETS = {
    ("mlp", "Picard"): 0.15, ("conv", "Picard"): 0.10, ("mlp", "Anderson"): 0.30, ("conv", "Anderson"): 0.25,
    ("mlp", "Broyden"): 1.0, ("conv", "Broyden"): 1.0,
}  # fmt: skip


def best_times(runs: Sequence[Callable[[], Any]], turns: int) -> list[float]:
    """The least CPU time of each, in seconds, over `turns` rounds in which they take turns."""
    best = [float("inf")] * len(runs)
    for _ in range(turns):
        for i, run in enumerate(runs):
            begin = time.process_time()
            run()
            best[i] = min(best[i], time.process_time() - begin)
    return best


def torchdeq_solver(name: str) -> Callable[..., Any] | None:
    """A solver of torchdeq, or None where it is not installed."""
    try:
        from torchdeq.solver import get_solver
    except ImportError:
        return None
    solver: Callable[..., Any] = get_solver(name)
    return solver


class Counted:
    """A function that counts its evaluations, for the peer that does not."""

    def __init__(self, f: Callable[..., Tensor]) -> None:
        self.f, self.count = f, 0

    def __call__(self, *args: Tensor) -> Tensor:
        """Evaluate, and count."""
        self.count += 1
        return self.f(*args)


@torch.no_grad()
def overhead(turns: int) -> None:
    """Time of 30 iterations over that of 30 bare evaluations."""
    print(f"\nOverhead of {STEPS} iterations over {STEPS} bare evaluations")
    print(f"{'workload':10}{'evaluation':>12}{'method':>12}{'restpoint':>12}{'torchdeq':>12}{'target':>10}")
    peers = {"Picard": "fixed_point_iter", "Anderson": "anderson", "Broyden": "broyden"}
    for name, (f, z0), rounds in (
        ("mlp", workloads.mlp(0.9), 20 * turns),
        ("conv", workloads.convolution(0.9), 2 * turns),
    ):

        def bare(f: Any = f, z: Tensor = z0) -> None:
            for _ in range(STEPS):
                z = f(z)

        runs: list[Callable[[], Any]] = [bare]
        for solver in (Picard(), Anderson(), Broyden()):
            runs.append(lambda s=solver, f=f, z=z0: fixed_point(f, z, solver=s, rtol=1e-30, max_steps=STEPS))
        for peer in peers.values():
            theirs = torchdeq_solver(peer)
            if theirs is not None:
                runs.append(lambda s=theirs, f=f, z=z0: s(f, z, max_iter=STEPS, tol=1e-30, stop_mode="rel"))
        base, *times = best_times(runs, rounds)
        for i, method in enumerate(peers):
            peer = f"{times[3 + i] / base - 1:+.0%}" if len(times) > 3 else "-"
            target = f"{TARGETS[name, method]:+.0%}"
            cost = f"{1e3 * base / STEPS:.2f} ms"
            print(f"{name:10}{cost:>12}{method:>12}{times[i] / base - 1:>+12.0%}{peer:>12}{target:>10}")


@torch.no_grad()
def evaluations() -> None:
    """Evaluations until the slowest sample's relative residual is below the tolerance; cap 200."""
    problems = {
        "mlp .5": workloads.mlp(0.5), "mlp .9": workloads.mlp(0.9), "gd .9": workloads.gradient_step(0.9),
        "gd .99": workloads.gradient_step(0.99), "conv .9": workloads.convolution(0.9, batch=8),
    }  # fmt: skip
    ours = {"Picard": Picard(), "Anderson": Anderson(), "Anderson 10": Anderson(memory=10), "Broyden": Broyden()}
    theirs = {"plain": ("fixed_point_iter", {}), "Anderson": ("anderson", {}), "And. 1e-8": ("anderson", {"lam": 1e-8}),
              "Broyden": ("broyden", {})}  # fmt: skip
    print("\nEvaluations to a relative residual of 1e-3 / 1e-5 (x: not within 200)")
    print(f"{'':10}" + "".join(f"{k:>14}" for k in ours) + "   | torchdeq" + "".join(f"{k:>12}" for k in theirs))
    for name, (f, z0) in problems.items():
        row = []
        for solver in ours.values():
            cells = []
            for rtol in (1e-3, 1e-5):
                solution = fixed_point(f, z0, solver=solver, rtol=rtol, max_steps=200)
                cells.append(str(int(solution.stats.evaluations.max())) if bool(solution.converged.all()) else "x")
            row.append("/".join(cells))
        peers = []
        for peer, options in theirs.values():
            solver, cells = torchdeq_solver(peer), []
            for tol in (1e-3, 1e-5):
                if solver is None:
                    cells.append("-")
                    continue
                counted = Counted(f)
                _, _, info = solver(counted, z0, max_iter=200, tol=tol, stop_mode="rel", **options)
                cells.append(str(counted.count) if float(info["rel_lowest"].max()) < tol else "x")
            peers.append("/".join(cells))
        print(f"{name:10}" + "".join(f"{c:>14}" for c in row) + "   |         " + "".join(f"{c:>12}" for c in peers))


@torch.no_grad()
def hard_row() -> None:
    """What one sample that hardly converges costs the others: rows that the function is called with."""
    width, batch = 128, 64
    rng = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(width, width, generator=rng))
    x = torch.randn(batch, width, generator=rng)
    radius = torch.full((batch, 1), 0.5)
    radius[0] = 0.995

    def f(z: Tensor, x: Tensor, radius: Tensor) -> Tensor:
        rows.append(len(z))
        return radius * (z @ basis.T) + x

    print("\nOne hard sample in a batch of 64 (Anderson, rtol 1e-5)")
    rows: list[int] = []
    hard = fixed_point(f, torch.zeros_like(x), (x, radius), rtol=1e-5, max_steps=500)
    total = sum(rows)
    rows = []
    easy = fixed_point(f, torch.zeros_like(x[1:]), (x[1:], radius[1:]), rtol=1e-5, max_steps=500)
    print(f"  evaluations of the hard sample {int(hard.stats.evaluations[0])}, of the others at most "
          f"{int(hard.stats.evaluations[1:].max())}, without it {int(easy.stats.evaluations.max())}")  # fmt: skip
    print(f"  rows evaluated: {total}, without it {sum(rows)}; a batch that stops together would evaluate "
          f"{batch * int(hard.stats.evaluations.max())}")  # fmt: skip
    print(f"  the others' values differ by {float((hard.value[1:] - easy.value).abs().max()):.1e}")


def layer(turns: int) -> None:
    """Forward and backward of a whole equilibrium layer, with the error of its gradient against float64."""
    block, injection = workloads.mlp_block(0.9)
    z0 = torch.zeros_like(injection)
    probe = torch.randn(z0.shape, generator=torch.Generator().manual_seed(3))
    gain, x = torch.ones(z0.shape[1], requires_grad=True), injection.clone().requires_grad_()

    def cell(z: Tensor, x: Tensor) -> Tensor:
        return (block(z) + x) * gain

    exact = _reference(block, injection, probe)
    rows = []
    for name, adjoint, rtol in (
        ("implicit 1e-5, GMRES 1e-5", ImplicitAdjoint(GMRES(rtol=1e-5)), 1e-5),
        ("implicit 3e-4, GMRES 1e-3", ImplicitAdjoint(GMRES(rtol=1e-3)), 3e-4),
        ("implicit 1e-3, GMRES 1e-3", ImplicitAdjoint(GMRES(rtol=1e-3)), 1e-3),
        ("phantom, 5 steps", PhantomAdjoint(5, 0.9), 1e-3),
        ("Jacobian-free", JacobianFreeAdjoint(), 1e-3),
    ):

        def ours(adjoint: Any = adjoint, rtol: float = rtol) -> list[Tensor]:
            value = fixed_point(cell, z0, (x,), adjoint=adjoint, rtol=rtol, max_steps=100).value
            return list(torch.autograd.grad((value * probe).sum(), (gain, x)))

        rows.append((f"restpoint, {name}", ours))
    try:
        from torchdeq import get_deq
    except ImportError:
        print("\n(torchdeq is not installed: no peer for the layer)")
    else:
        common = {
            "f_solver": "anderson",
            "f_max_iter": 100,
            "b_max_iter": 100,
            "f_stop_mode": "rel",
            "b_stop_mode": "rel",
        }
        for name, options in (
            ("implicit 1e-5", {"ift": True, "f_tol": 1e-5, "b_tol": 1e-5, "b_solver": "anderson"}),
            ("implicit 1e-3", {"ift": True, "f_tol": 1e-3, "b_tol": 1e-3, "b_solver": "anderson"}),
            ("phantom, 5 steps", {"grad": 5, "tau": 0.9, "f_tol": 1e-3}),
            ("one step", {"grad": 1, "f_tol": 1e-3}),
        ):
            deq = get_deq(**common, **options)

            def theirs(deq: Any = deq) -> list[Tensor]:
                value = deq(lambda z: cell(z, x), z0)[0][-1]
                return list(torch.autograd.grad((value * probe).sum(), (gain, x)))

            rows.append((f"torchdeq, {name}", theirs))
    times = best_times([run for _, run in rows], 3 * turns)
    print("\nThe layer, forward + backward (MLP of 512, spectral radius .9)")
    for (name, run), seconds in zip(rows, times, strict=True):
        error = [float((a.double() - b).norm() / b.norm()) for a, b in zip(run(), exact, strict=True)]
        print(f"  {name:34}{1e3 * seconds:9.1f} ms   gradient error {max(error):.1e}")


def _reference(block: Callable[[Tensor], Tensor], injection: Tensor, probe: Tensor) -> list[Tensor]:
    """The gradient in float64, by unrolling to convergence."""
    gain = torch.ones(probe.shape[1], dtype=torch.float64, requires_grad=True)
    x = injection.double().requires_grad_()
    z = torch.zeros_like(x)
    for _ in range(400):
        z = (block(z) + x) * gain
    return list(torch.autograd.grad((z * probe.double()).sum(), (gain, x)))


@torch.no_grad()
def compiled(turns: int) -> None:
    """The solver around a compiled function against the solver around the function itself."""
    f, z0 = workloads.mlp(0.9)
    fast = torch.compile(f)
    fast(z0)
    runs = [lambda g=g: fixed_point(g, z0, rtol=1e-30, max_steps=STEPS) for g in (f, fast)]
    eager, inductor = best_times(runs, 10 * turns)
    print(
        f"\nAnderson on the MLP, {STEPS} steps: eager {1e3 * eager:.1f} ms, compiled function {1e3 * inductor:.1f} ms"
    )
    print(f"  compiled / eager: {inductor / eager:.2f}")


def main() -> None:
    """Run all parts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer turns, no compilation")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    turns = 1 if quick else 4
    overhead(turns)
    evaluations()
    hard_row()
    layer(turns)
    if not quick:
        compiled(turns)


if __name__ == "__main__":
    main()
