"""Structured distributions beside torch-struct, in one run: `python benchmarks/inference.py [--quick]`.

Everything is CPU time of one thread; what is compared takes turns, and the best turn counts. Memory is what torch's
allocator holds at its highest, above what the potentials themselves take, as torch's profiler records it. torch-struct
(`pip install torch-struct`) is left out where it is not installed.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from restpoint.solvers.inference import LinearChain

BATCH = 32
SIZES = ((64, 16), (256, 16), (256, 32))


def best_times(runs: Sequence[Callable[[], Any]], turns: Sequence[int]) -> list[float]:
    """The least CPU time of each, in seconds, over as many turns as each is given."""
    best = [float("inf")] * len(runs)
    for turn in range(max(turns)):
        for i, run in enumerate(runs):
            if turn < turns[i]:
                begin = time.process_time()
                run()
                best[i] = min(best[i], time.process_time() - begin)
    return best


def peak(run: Callable[[], Any]) -> int:
    """Bytes that are allocated at the highest point of a run, above those before it."""
    held = highest = 0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            highest = max(highest, held)
    return highest


def plain_log_partition(potentials: Tensor) -> Tensor:
    """The recursion that anybody would write."""
    scores = potentials.new_zeros(potentials.shape[0], potentials.shape[2])
    for step in potentials.unbind(1):
        scores = torch.logsumexp(scores.unsqueeze(2) + step, 1)
    return torch.logsumexp(scores, 1)


def plain(potentials: Tensor) -> Tensor:
    potentials = potentials.detach().requires_grad_()
    return torch.autograd.grad(plain_log_partition(potentials).sum(), potentials)[0]


def plain_twice(potentials: Tensor, probe: Tensor) -> Tensor:
    potentials = potentials.detach().requires_grad_()
    (marginals,) = torch.autograd.grad(plain_log_partition(potentials).sum(), potentials, create_graph=True)
    return torch.autograd.grad(marginals, potentials, probe)[0]


def ours(potentials: Tensor) -> Tensor:
    potentials = potentials.detach().requires_grad_()
    return torch.autograd.grad(LinearChain(potentials).log_partition.sum(), potentials)[0]


def ours_twice(potentials: Tensor, probe: Tensor) -> Tensor:
    potentials = potentials.detach().requires_grad_()
    return torch.autograd.grad(LinearChain(potentials).marginals.transitions, potentials, probe)[0]


def torch_struct() -> Any:
    """The package, or None."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import torch_struct as package
    except ImportError:
        return None
    return package


def theirs(potentials: Tensor) -> Tensor:
    """torch-struct has [.., t, j, i] for i at t and j at t + 1."""
    potentials = potentials.detach().mT.requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _theirs(potentials)


def _theirs(potentials: Tensor) -> Tensor:
    value = torch_struct().LinearChainCRF(potentials).partition
    return torch.autograd.grad(value.sum(), potentials)[0].mT


def chain(turns: int) -> None:
    """Marginals by a forward and a backward pass, and the derivative of the marginals."""
    has_peer = torch_struct() is not None
    print(f"\nLinear chain, batch {BATCH}, float32: log-partition forward + backward (the marginals)")
    print(f"{'length, states':>16}{'restpoint':>12}{'plain loop':>12}{'torch-struct':>14}{'loop / ours':>13}"
          f"{'struct / ours':>15}{'error: ours':>13}{'loop':>9}{'struct':>9}")  # fmt: skip
    for length, states in SIZES:
        potentials = torch.randn(BATCH, length - 1, states, states, generator=torch.Generator().manual_seed(0))
        exact = plain(potentials.double())
        runs: list[Callable[[Tensor], Tensor]] = [ours, plain, *([theirs] if has_peer else [])]
        counts = [4 * turns, 4 * turns, 1][: len(runs)]
        times = best_times([lambda f=f, p=potentials: f(p) for f in runs], counts)
        errors = [float((f(potentials).double() - exact).abs().max()) for f in runs]
        milliseconds = [f"{1e3 * t:.1f} ms" for t in times] + ["-"] * (not has_peer)
        peer = f"{times[2] / times[0]:.0f}" if has_peer else "-"
        print(f"{f'{length}, {states}':>16}{milliseconds[0]:>12}{milliseconds[1]:>12}{milliseconds[2]:>14}"
              f"{times[1] / times[0]:>13.2f}{peer:>15}{errors[0]:>13.0e}{errors[1]:>9.0e}"
              + (f"{errors[2]:>9.0e}" if has_peer else f"{'-':>9}"))  # fmt: skip

    print("\nThe same, and then a vector times the Jacobian of the marginals (structured attention's backward pass)")
    for length, states in SIZES[:2] if turns == 1 else SIZES:
        rng = torch.Generator().manual_seed(0)
        potentials, probe = (torch.randn(BATCH, length - 1, states, states, generator=rng) for _ in range(2))
        exact = plain_twice(potentials.double(), probe.double())
        runs = [lambda p: ours_twice(p, probe), lambda p: plain_twice(p, probe)]  # noqa: B023
        times = best_times([lambda f=f, p=potentials: f(p) for f in runs], [2 * turns] * 2)
        errors = [float((f(potentials).double() - exact).abs().max()) for f in runs]
        print(f"{f'{length}, {states}':>16}{1e3 * times[0]:>9.1f} ms{1e3 * times[1]:>9.1f} ms   loop / ours "
              f"{times[1] / times[0]:.2f}   errors {errors[0]:.0e}, {errors[1]:.0e}")  # fmt: skip


def memory() -> None:
    """The highest allocation of a forward and backward pass."""
    print("\nMemory of a forward + backward pass, batch 32, above the potentials")
    for length, states in SIZES[1:]:
        potentials = torch.randn(BATCH, length - 1, states, states)
        runs = {"restpoint": ours, "plain loop": plain}
        if torch_struct() is not None:
            runs["torch-struct"] = theirs
        row = {name: peak(lambda f=f, p=potentials: f(p)) / 2**20 for name, f in runs.items()}
        print(f"{f'{length}, {states}':>16}  " + ", ".join(f"{k} {v:.0f} MB" for k, v in row.items())
              + f"; the potentials {potentials.nbytes / 2**20:.0f} MB")  # fmt: skip


def scales() -> None:
    """What is left of the marginals where the potentials are large."""
    print("\nScale of the potentials (64, 16): largest error of the marginals, float32")
    for scale in (1.0, 20.0, 1000.0):
        potentials = scale * torch.randn(BATCH, 63, 16, 16, generator=torch.Generator().manual_seed(1))
        exact = plain(potentials.double())
        runs = {"restpoint": ours, "plain loop": plain} | ({"torch-struct": theirs} if torch_struct() else {})
        row = {name: float((f(potentials).double() - exact).abs().max()) for name, f in runs.items()}
        print(f"{scale:>16g}  " + ", ".join(f"{k} {v:.0e}" for k, v in row.items()))


def main() -> None:
    """Run all parts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer turns")
    turns = 1 if parser.parse_args().quick else 4
    torch.set_num_threads(1)
    chain(turns)
    scales()
    memory()


if __name__ == "__main__":
    main()
