"""Quadratic programmes beside qpth, proxsuite's QPLayer and cvxpylayers: time, solutions, gradients, failure modes.

Run from this folder: `python optimize.py`. Times are CPU times of one thread, the least of some turns, in which the
libraries take turns, so that what else the machine does weighs on all alike. Ratios carry over to other machines,
absolute times do not. A library that is not installed is left out.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from restpoint.solvers import quadratic_program

D = torch.float64
Programme = tuple[Tensor, ...]


def random(batch: int, n: int, seed: int = 0) -> Programme:
    """Q, q, G, h, A, b with n inequalities and n / 5 equations."""
    g = torch.Generator().manual_seed(seed)
    root = torch.randn(batch, n, n, generator=g, dtype=D)
    q, x = (torch.randn(batch, n, generator=g, dtype=D) for _ in range(2))
    G, A = (torch.randn(batch, m, n, generator=g, dtype=D) for m in (n, n // 5))
    h = (G @ x[..., None])[..., 0] + torch.rand(batch, n, generator=g, dtype=D)
    return root @ root.mT / n + 0.1 * torch.eye(n, dtype=D), q, G, h, A, (A @ x[..., None])[..., 0]


def qpth() -> Callable[..., Tensor] | None:
    """x of qpth."""
    try:
        from qpth.qp import QPFunction
    except ImportError:
        return None
    return lambda *p: QPFunction(verbose=-1, check_Q_spd=False)(*p)


def qplayer() -> Callable[..., Tensor] | None:
    """x of proxsuite."""
    try:
        from proxsuite.torch.qplayer import QPFunction
    except ImportError:
        return None

    def solve(Q: Tensor, q: Tensor, G: Tensor, h: Tensor, A: Tensor, b: Tensor) -> Tensor:
        x: Tensor = QPFunction()(Q, q, A, b, G, torch.full_like(h, -1e20), h)[0]
        return x

    return solve


def cvxpylayers(n: int, m: int, p: int) -> Callable[..., Tensor] | None:
    """x of cvxpylayers at its defaults, with the square root of Q as its parameter."""
    try:
        import cvxpy as cp
        from cvxpylayers.torch import CvxpyLayer
    except ImportError:
        return None
    x, root = cp.Variable(n), cp.Parameter((n, n))
    q, G, h, A, b = (cp.Parameter(s) for s in (n, (m, n), m, (p, n), p))
    objective = cp.Minimize(0.5 * cp.sum_squares(root @ x) + q @ x)
    layer = CvxpyLayer(cp.Problem(objective, [G @ x <= h, A @ x == b]), parameters=[root, q, G, h, A, b], variables=[x])

    def solve(Q: Tensor, *rest: Tensor) -> Tensor:
        value: Tensor = layer(torch.linalg.cholesky(Q).mT, *rest)[0]
        return value

    return solve


def least(runs: dict[str, Callable[[], Any]], turns: int) -> dict[str, float]:
    """The least CPU time of each in seconds, over turns in which they take turns."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(turns):
        for name, run in runs.items():
            begin = time.process_time()
            run()
            best[name] = min(best[name], time.process_time() - begin)
    return best


def exact(problem: Programme, active: Tensor) -> Tensor:
    """x of the whole system on the active set, solved densely."""
    Q, q, G, h, A, b = problem
    on = active.to(D)
    rows = torch.cat([G * on[..., None], A], 1)
    corner = torch.diag_embed(torch.cat([1 - on, torch.zeros_like(b)], 1))
    matrix = torch.cat([torch.cat([Q, rows.mT], 2), torch.cat([rows, corner], 2)], 1)
    return torch.linalg.solve(matrix, torch.cat([-q, h * on, b], 1))[:, : q.shape[1]]


def gradients(solve: Callable[..., Tensor], problem: Programme) -> tuple[Tensor, list[Tensor]]:
    """x, and the gradient of a random functional of it in all six."""
    given = [t.detach().clone().requires_grad_() for t in problem]
    x = solve(*given)
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(9), dtype=D)
    return x.detach(), list(torch.autograd.grad((x * weight).sum(), given))


def speed(turns: int, with_cvxpy: bool) -> None:
    """Forward and backward time."""
    print("CPU seconds forward / backward, and how many times ours in brackets; float64, n inequalities, n/5 equations")
    for batch, n in ((64, 10), (64, 50), (64, 100), (128, 50), (128, 100)):
        problem = tuple(t.requires_grad_() for t in random(batch, n))
        found = {"restpoint": lambda *p: quadratic_program(*p).value, "qpth": qpth(), "QPLayer": qplayer()}
        if with_cvxpy and batch == 64 and n <= 50:
            found["cvxpylayers"] = cvxpylayers(n, n, n // 5)
        solvers = {name: solve for name, solve in found.items() if solve is not None}
        weight = torch.randn(batch, n, dtype=D)
        forward = least({name: lambda s=s, p=problem: s(*p) for name, s in solvers.items()}, turns)  # type: ignore[misc]
        both = least(
            {
                name: lambda s=s, p=problem, w=weight: torch.autograd.grad((s(*p) * w).sum(), p)
                for name, s in solvers.items()
            },  # type: ignore[misc]
            turns,
        )
        cells = []
        for name in solvers:
            there, back = forward[name], max(both[name] - forward[name], 0.0)
            times = f"({there / forward['restpoint']:.1f}x, {both[name] / both['restpoint']:.1f}x both)"
            cells.append(f"{name} {there:.4f} / {back:.4f}" + ("" if name == "restpoint" else f" {times}"))
        print(f"batch {batch:>3} n {n:>3}: " + "   ".join(cells), flush=True)


def accuracy(count: int) -> None:
    """Largest error of solution and gradient on random programmes, against the whole system solved densely."""
    print(f"\nLargest error on {count} random programmes: solution / gradient, relative to 1 + |exact|")
    for n in (10, 50):
        problem = random(count, n, seed=7)
        active = quadratic_program(*problem).active
        x, reference = gradients(lambda *p, a=active: exact(p, a), problem)
        for name, solve in (
            ("restpoint", lambda *p: quadratic_program(*p).value),
            ("qpth", qpth()),
            ("QPLayer", qplayer()),
        ):
            if solve is None:
                continue
            some = slice(None) if name == "restpoint" else slice(min(count, 100))
            mine, grads = gradients(solve, tuple(t[some] for t in problem))
            # Each library's weight is drawn for its own batch.
            _, theirs = (x, reference) if name == "restpoint" else gradients(
                lambda *p, a=active[some]: exact(p, a), tuple(t[some] for t in problem)
            )  # fmt: skip
            error = ((mine - x[some]).abs() / (1 + x[some].abs())).max()
            worst = max(_difference(a, b, i == 0) for i, (a, b) in enumerate(zip(grads, theirs, strict=True)))
            print(f"n {n:>3} {name:>10} on {len(mine):>4}: {error:.1e} / {worst:.1e}")


def _difference(a: Tensor, b: Tensor, symmetric: bool) -> float:
    if symmetric:
        a, b = (a + a.mT) / 2, (b + b.mT) / 2
    return float(((a - b).abs() / (1 + b.abs())).max())


def failures() -> None:
    """Residual of the optimality conditions where libraries break."""
    batch, n = 16, 20
    Q, q, G, h, A, b = random(batch, n)
    g = torch.Generator().manual_seed(3)
    low = torch.randn(batch, n, 6, generator=g, dtype=D)
    inside = -(G.mT @ torch.rand(batch, n, 1, generator=g, dtype=D))[..., 0]
    basis = torch.linalg.qr(torch.randn(batch, n, n, generator=g, dtype=D))[0]
    stiff = basis * torch.logspace(-8, 0, n, dtype=D) @ basis.mT
    stiff = (stiff + stiff.mT) / 2
    slope = (stiff @ torch.randn(batch, n, 1, generator=g, dtype=D))[..., 0]
    away = h.clone()
    against = G.clone()
    against[:, 1], away[:, 0], away[:, 1] = -G[:, 0], -1.0, -1.0
    cases: dict[str, Programme] = {
        "duplicate rows": (Q, q, torch.cat([G, G], 1), torch.cat([h, h], 1), A, b),
        "semidefinite Q": (low @ low.mT, inside, G, h, A, b),
        "linear": (torch.zeros_like(Q), inside, G, h, A, b),
        "condition 1e8": (stiff, slope, G, h, A, b),
        "infeasible": (Q, q, against, away, A, b),
    }
    print("\nFailure modes, n = 20, batch 16: largest violation of stationarity or feasibility; what it says")
    for name, problem in cases.items():
        line = []
        for library, solve in (
            ("restpoint", lambda *p: quadratic_program(*p).value),
            ("qpth", qpth()),
            ("QPLayer", qplayer()),
        ):
            if solve is None:
                continue
            try:
                x = solve(*problem)
                line.append(f"{library} {_violation(problem, x):.0e}")
            except Exception as error:
                line.append(f"{library} {type(error).__name__}")
        status = quadratic_program(*problem).report()
        print(f"{name:>15}: " + "   ".join(line) + f"   | {status[:70]}")


def _violation(problem: Programme, x: Tensor) -> float:
    """How far x is from optimal: infeasibility, or the objective's excess over ours."""
    Q, q, G, h, A, b = problem
    over = ((G @ x[..., None])[..., 0] - h).clamp_min(0).amax(1)
    off = ((A @ x[..., None])[..., 0] - b).abs().amax(1)
    ours = quadratic_program(*problem).objective
    value = (x * ((Q @ x[..., None])[..., 0] / 2 + q)).sum(1)
    excess = torch.where(ours.isnan(), 0.0, (value - ours).abs())
    return float(torch.stack([over, off, excess]).max())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--cvxpy", action="store_true", help="time cvxpylayers, which takes long")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    speed(options.turns, options.cvxpy)
    accuracy(options.count)
    failures()
