"""What a run says while it runs: TensorBoard's curves, the log's lines, and the numbers behind both."""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from ..solvers import Stats
from .tasks import Outcome

log = logging.getLogger("restpoint.train")


class Curves:
    """TensorBoard's curves of a run; a context manager, which closes them.

    That they cannot be written, as on a full disk, is logged and ends no run.

    Args:
        folder: where they go.
        step: that the run goes on from; points after it, which an interrupted run may have left, are hidden.
        active: False writes nothing, for all processes but the first.
    """

    def __init__(self, folder: Path, step: int, active: bool = True) -> None:
        self._writer: SummaryWriter | None = SummaryWriter(str(folder), purge_step=step + 1) if active else None

    def __enter__(self) -> Curves:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def scalars(self, group: str, values: dict[str, float], step: int) -> None:
        """A point on each of the curves `group`/name."""
        for name, value in values.items():
            self._write("add_scalar", f"{group}/{name}", value, step)

    def pictures(self, images: dict[str, Tensor], step: int) -> None:
        """Pictures (channels, height, width) with values in [0, 1], by name."""
        for name, image in images.items():
            self._write("add_image", f"samples/{name}", image, step)

    def close(self) -> None:
        """Write what is still in memory."""
        if self._writer is not None:
            try:
                self._writer.close()
            except OSError as error:
                log.warning("the last points of the curves could not be written: %s", error)
            self._writer = None

    def _write(self, kind: str, name: str, value: float | Tensor, step: int) -> None:
        if self._writer is None:
            return
        try:
            getattr(self._writer, kind)(name, value, step)
        except OSError as error:
            log.warning("the curves end at step %d, they could not be written: %s", step, error)
            self._writer = None


class Pace:
    """Examples a second and the memory in use, between one call and the next."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._since, self._examples = time.perf_counter(), 0

    def add(self, examples: int) -> None:
        """So many more were trained on."""
        self._examples += examples

    def values(self) -> dict[str, float]:
        """examples_per_second since the last call, and memory_gb: the most that was ever in use, in 10^9 bytes."""
        now = time.perf_counter()
        rate = self._examples / max(now - self._since, 1e-9)
        self._since, self._examples = now, 0
        return {"examples_per_second": rate, "memory_gb": peak_memory(self.device) / 1e9}


def peak_memory(device: torch.device) -> int:
    """The most memory that was ever in use, in bytes: of the accelerator's tensors, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows does not tell by this way.
        return 0
    import sys

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def describe(outcome: Outcome, lr: float) -> dict[str, float]:
    """What one step is worth a point of: loss, metrics, learning rate, and how its solves went, both ways."""
    values = {"loss": float(outcome.loss.detach()), **outcome.metrics, "lr": lr}
    if outcome.solutions:
        values |= _solves("", [solution.stats for solution in outcome.solutions])
        values["converged"] = min(float(solution.converged.double().mean()) for solution in outcome.solutions)
    backward = [s.adjoint_stats for s in outcome.solutions if s.adjoint_stats is not None]
    if backward:
        values |= _solves("adjoint_", backward)
    return {name: value for name, value in values.items() if math.isfinite(value)}


def _solves(prefix: str, stats: list[Stats]) -> dict[str, float]:
    """The evaluations that all solves of a step took together, a sample, and the largest of their mean residuals."""
    return {
        f"{prefix}evaluations": sum(float(one.evaluations.double().mean()) for one in stats),
        f"{prefix}residual": max(float(one.residual.mean()) for one in stats),
    }


def in_words(values: dict[str, float], digits: int = 4) -> str:
    """Names and numbers on one line."""
    return ", ".join(f"{name} {value:.{digits}g}" for name, value in values.items())
