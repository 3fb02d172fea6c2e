"""One run on several processes, as torchrun starts them; on a single one every method is free or does nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import logging
import os
import sys
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from ..zoo.errors import CheckpointError
from .errors import Interrupted, TrainingError

log = logging.getLogger("restpoint.train")

STRATEGIES = ("ddp", "fsdp")


@dataclasses.dataclass(frozen=True)
class Parallel:
    """This process among those of the run.

    Attributes:
        rank: from 0.
        world: how many processes.
        device: of this process.
        strategy: "ddp" keeps a copy of the model in every process, "fsdp" a part of every tensor.
    """

    rank: int
    world: int
    device: torch.device
    strategy: str

    @property
    def first(self) -> bool:
        """Whether this process writes files, evaluates, and speaks."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether the run has one process."""
        return self.world == 1

    def shard(self, *modules: nn.Module) -> None:
        """With "fsdp", leave each process its part of every parameter of `modules`, in place.

        A module is gathered as one, once a step: a solver evaluates the same layers dozens of times, and gathering
        them at each would cost more than it saves. What is sharded between steps are weights, gradients, and with them
        the states of the optimiser and the averaged weights.
        """
        if self.alone or self.strategy != "fsdp":
            return
        mesh = init_device_mesh(self.device.type, (self.world,))
        for module in modules:
            fully_shard(module, mesh=mesh)

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module whose forward and backward passes average gradients over processes."""
        if self.alone or self.strategy == "fsdp" or not any(p.requires_grad for p in module.parameters()):
            return module
        return DistributedDataParallel(module, device_ids=[self.device] if self.device.type == "cuda" else None)

    @contextlib.contextmanager
    def averaging(self, module: nn.Module, last: bool) -> Iterator[None]:
        """Around the passes of one part of a step's batch: gradients travel with the last part alone."""
        if isinstance(module, DistributedDataParallel) and not last:
            with module.no_sync():
                yield
            return
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(last)
        yield

    def any(self, *flags: int) -> list[int]:
        """The largest of all processes' values, for each of `flags`."""
        if self.alone:
            return list(flags)
        values = torch.tensor(flags, dtype=torch.int64)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return [int(v) for v in values]

    def managed(self, act: Callable[[], object], *, first: bool = False) -> bool:
        """Whether `act` went well in every process, or, where `first`, in the first, which alone does it.

        An OSError is logged by the process that met it, and makes this False in all.

        Raises:
            CheckpointError: a process met one; then all do.
        """
        failure: OSError | CheckpointError | None = None
        try:
            if self.first or not first:
                act()
        except (OSError, CheckpointError) as error:
            failure = error
        ours = 0 if failure is None else 1 if isinstance(failure, OSError) else 2
        (worst,) = self.any(ours)
        if ours == 1:
            log.warning("process %d: %s", self.rank, failure)
        if worst == 2:
            raise failure if isinstance(failure, CheckpointError) else CheckpointError("Another process says why.")
        return worst == 0

    def total(self, value: float) -> float:
        """The sum over processes."""
        if self.alone:
            return value
        values = torch.tensor([value], dtype=torch.float64)
        dist.all_reduce(values)
        return float(values)

    def gather(self, content: bytes) -> list[bytes]:
        """Every process's bytes, in order; each process gets them all."""
        if self.alone:
            return [content]
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
        dist.all_gather(sizes, torch.tensor([len(content)]))
        longest = int(torch.stack(sizes).max())
        ours = torch.frombuffer(bytearray(content.ljust(longest, b"\0")), dtype=torch.uint8)
        parts = [torch.empty_like(ours) for _ in range(self.world)]
        dist.all_gather(parts, ours)
        return [part[: int(size)].numpy().tobytes() for part, size in zip(parts, sizes, strict=True)]

    def spread(self, content: bytes | None) -> bytes:
        """The first process's bytes, for all."""
        if self.alone:
            return content or b""
        size = torch.tensor([len(content or b"")])
        dist.broadcast(size, 0)
        buffer = torch.empty(int(size), dtype=torch.uint8)
        if self.first and content:
            buffer = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        dist.broadcast(buffer, 0)
        return buffer.numpy().tobytes()


@contextlib.contextmanager
def joined(device: str, strategy: str) -> Iterator[Parallel]:
    """Join the other processes where torchrun started several; leave them at the end if the caller had not joined.

    Raises:
        TrainingError: the strategy is unknown.
    """
    if strategy not in STRATEGIES:
        raise TrainingError(f"parallel must be {' or '.join(STRATEGIES)}; got {strategy!r}.")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Parallel(0, 1, torch.device(device), strategy)
        return
    place = torch.device(device)
    if place.type == "cuda":
        place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(place)
    ours = not dist.is_initialized()
    if ours:
        # While the first process evaluates, the others wait: torchrun notices a process that died, not the timeout.
        backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(days=1))
    try:
        yield Parallel(dist.get_rank(), dist.get_world_size(), place, strategy)
    except Interrupted:  # which comes to all processes
        dist.barrier()
        raise
    else:
        dist.barrier()
    finally:
        if ours:
            dist.destroy_process_group()


def leave(status: int) -> int:
    """End a process that trained with others, with this exit status; on a single one, only return the status.

    DTensor's caches hold on to the process group, also when it is destroyed, and so its C++ threads live on. One that
    lets go of a tensor while Python winds down asks for an interpreter that is no longer there, and Python ends it in
    the middle of C++ ("terminate called without an active exception"). So Python is not wound down: by now every file
    is closed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)
    return status


def plain(value: Tensor) -> Tensor:
    """A tensor of this process alone, of one that may be spread over all; every process must ask."""
    return value.full_tensor() if isinstance(value, DTensor) else value
