"""Two processes with half of the batch each, run by test_distributed.py; rank 0 writes its gradients to a file."""

import os
import sys

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel

from restpoint.solvers import (
    Anderson,
    Broyden,
    CheckpointAdjoint,
    ImplicitAdjoint,
    PhantomAdjoint,
    Picard,
    ReversibleAdjoint,
    UnrollAdjoint,
    fixed_point,
)
from restpoint.solvers.linear import GMRES

CASES = {
    "implicit": (Anderson(), ImplicitAdjoint()),
    "krylov": (Anderson(), ImplicitAdjoint(GMRES())),
    "second order": (Anderson(), ImplicitAdjoint(order=2)),
    "shine": (Broyden(), ImplicitAdjoint(GMRES(), reuse="start")),
    "phantom": (Anderson(), PhantomAdjoint()),
    "unrolled": (Picard(), UnrollAdjoint()),
    "checkpointed": (Picard(), CheckpointAdjoint()),
    "reversible": (Picard(0.5), ReversibleAdjoint()),
}


class Model(torch.nn.Module):
    """An equilibrium between two layers; one parameter does not require a gradient."""

    def __init__(self, case):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.cell, self.last = (torch.nn.Linear(6, 6).double() for _ in range(3))
        with torch.no_grad():
            self.cell.weight.mul_(0.5)
        self.first.bias.requires_grad_(False)
        self.solver, self.adjoint = CASES[case]

    def forward(self, x):
        x = self.first(x)
        f = lambda z, x: torch.tanh(self.cell(z) + x)  # noqa: E731
        rtol = 1e-5 if isinstance(self.adjoint, ReversibleAdjoint) else 1e-11
        solution = fixed_point(
            f, torch.zeros_like(x), (x,), solver=self.solver, adjoint=self.adjoint, rtol=rtol, max_steps=100
        )
        return self.last(solution.value)


def batch():
    """Eight samples; those of the second half are harder, so that the processes take different numbers of steps."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(8, 6, generator=g, dtype=torch.float64)
    return x * torch.tensor([0.01] * 4 + [1.0] * 4, dtype=torch.float64).unsqueeze(1)


def gradients(model, x, steps=2):
    """After `steps` steps of plain gradient descent, so that the second forward pass sees updated weights."""
    for step in range(steps):
        model.zero_grad()
        model(x).square().sum(dim=1).mean().backward()
        if step < steps - 1:
            with torch.no_grad():
                for p in model.parameters():
                    if p.grad is not None:
                        p.sub_(0.1 * p.grad)
    return {k.removeprefix("module."): p.grad for k, p in model.named_parameters() if p.grad is not None}


def main(rank, store, out):
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    x = batch()[4 * rank : 4 * rank + 4]
    results = {case: gradients(DistributedDataParallel(Model(case)), x) for case in CASES}
    if rank == 0:
        save_file({f"{case}/{name}": grad for case, grads in results.items() for name, grad in grads.items()}, out)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
