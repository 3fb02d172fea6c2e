"""Sparse maps onto the simplex beside the package `entmax`, in one run: `python benchmarks/simplex.py [--quick]`.

Everything is CPU time of one thread, float32, a forward and a backward pass; what is compared takes turns, and the best
turn counts. Errors are against float64. entmax (`pip install entmax`) is left out where it is not installed.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from restpoint.solvers import entmax, entmax15, sparsemax

SIZES = ((1024, 256), (8192, 64), (32768, 16), (512, 4096), (64, 32000))
TOP = 100

Map = Callable[[Tensor], Tensor]


def best_times(runs: Sequence[Callable[[], Any]], turns: int) -> list[float]:
    """The least CPU time of each, in seconds."""
    best = [float("inf")] * len(runs)
    for _ in range(turns):
        for i, run in enumerate(runs):
            begin = time.process_time()
            run()
            best[i] = min(best[i], time.process_time() - begin)
    return best


def package() -> Any:
    """The package entmax, or None."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import entmax as peer
    except ImportError:
        return None
    return peer


def maps() -> dict[str, tuple[Map, Map | None, Map | None]]:
    """By name: ours, the package's by its top k, and the package's by sorting or bisection."""
    peer = package()
    if peer is None:
        ours = {"sparsemax": sparsemax, "entmax15": entmax15, "alpha = 1.3": _ours_13}
        return {name: (f, None, None) for name, f in ours.items()}
    return {
        "sparsemax": (sparsemax, lambda z: peer.sparsemax(z, -1, k=TOP), lambda z: peer.sparsemax(z, -1)),
        "entmax15": (entmax15, lambda z: peer.entmax15(z, -1, k=TOP), lambda z: peer.entmax15(z, -1)),
        "alpha = 1.3": (_ours_13, None, lambda z: peer.entmax_bisect(z, 1.3, -1)),
    }


def _ours_13(scores: Tensor) -> Tensor:
    return entmax(scores, 1.3)


def both_ways(f: Map, scores: Tensor, gradient: Tensor) -> Tensor:
    leaf = scores.detach().requires_grad_()
    return torch.autograd.grad(f(leaf), leaf, gradient)[0]


def speed(turns: int, sizes: Sequence[tuple[int, int]]) -> None:
    print("\nForward + backward, ms")
    print(f"{'rows x width':>14}{'map':>14}{'restpoint':>11}{f'top {TOP}':>9}{'exact':>9}{'softmax':>9}"
          f"{'top / ours':>12}{'exact / ours':>14}{'ours / softmax':>16}")  # fmt: skip
    for rows, width in sizes:
        rng = torch.Generator().manual_seed(0)
        scores, gradient = torch.randn(rows, width, generator=rng), torch.randn(rows, width, generator=rng)
        for name, (ours, top, exact) in maps().items():
            fs: dict[str, Map | None] = {"ours": ours, "top": top, "exact": exact, "softmax": lambda z: z.softmax(-1)}
            there = {key: f for key, f in fs.items() if f is not None}
            runs = [lambda f=f, z=scores, g=gradient: both_ways(f, z, g) for f in there.values()]
            best = dict(zip(there, (1e3 * t for t in best_times(runs, turns)), strict=True))
            cells = [f"{best[key]:.2f}" if key in best else "-" for key in fs]
            ratios = [f"{best[key] / best['ours']:.1f}" if key in best else "-" for key in ("top", "exact")]
            print(f"{f'{rows} x {width}':>14}{name:>14}{cells[0]:>11}{cells[1]:>9}{cells[2]:>9}{cells[3]:>9}"
                  f"{ratios[0]:>12}{ratios[1]:>14}{best['ours'] / best['softmax']:>16.1f}")  # fmt: skip


def exactness() -> None:
    """Largest errors of the map, its gradient and its second derivatives, and of a sum in bfloat16."""
    print("\nLargest error: of the sum in bfloat16, and in float64 of gradient and double backward by differences")
    print(f"{'map':>14}{'':>11}{'bf16 sum - 1':>14}{'gradient':>11}{'double backward':>17}")
    rng = torch.Generator().manual_seed(0)
    scores = torch.randn(8, 12, generator=rng, dtype=torch.float64)
    probe, direction = (torch.randn(8, 12, generator=rng, dtype=torch.float64) for _ in range(2))
    wide = torch.randn(256, 512, generator=rng).bfloat16()
    h = 1e-6
    for name, (ours, _, exact) in maps().items():
        for who, f in (("restpoint", ours), ("entmax", exact)):
            if f is None:
                continue
            total = (f(wide).double().sum(-1) - 1).abs().max()

            def objective(z: Tensor, f: Map = f) -> Tensor:
                return (f(z).pow(2) * probe).sum()

            def slope(z: Tensor, graph: bool = False, f: Map = f) -> Tensor:
                leaf = z if graph else z.detach().requires_grad_()
                return torch.autograd.grad((f(leaf).pow(2) * probe).sum(), leaf, create_graph=graph)[0]

            leaf = scores.clone().requires_grad_()
            first = slope(leaf, True)
            moved = (objective(scores + h * direction) - objective(scores - h * direction)) / (2 * h)
            first_error = ((first.detach() * direction).sum() - moved).abs()
            (second,) = torch.autograd.grad((first * direction).sum(), leaf)
            # Differences of the gradient of ours, which the line before has checked.
            checked = maps()[name][0]
            wanted = (slope(scores + h * direction, f=checked) - slope(scores - h * direction, f=checked)) / (2 * h)
            second_error = (second - wanted).abs().max()
            print(f"{name:>14}{who:>11}{total:>14.0e}{first_error:>11.0e}{second_error:>17.0e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two turns, and the smallest size")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}")
    if package() is None:
        print("entmax is not installed; nothing of it is shown.")
    speed(2 if quick else 20, SIZES[:1] if quick else SIZES)
    exactness()


if __name__ == "__main__":
    main()
