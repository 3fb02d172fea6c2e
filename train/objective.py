"""A task's loss as a module, so that what wraps modules (DDP, FSDP) sees one forward pass a step."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor, nn

from ..models.deq import DEQ
from ..models.flow import ContinuousFlow
from ..models.ode import NeuralODE
from ..zoo.watch import watched
from .config import WarmupConfig
from .tasks import Outcome, Task
from .unrolled import unrolled

TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class Objective(nn.Module):
    """The loss of a model on a batch.

    Args:
        task: whose loss.
        model: what is trained; the task may call any of its methods, not only `forward`.
        autocast: the type to compute in where that is safe, or None.
        warmup: when the model is unrolled instead of solved.
    """

    def __init__(self, task: Task, model: nn.Module, autocast: str | None, warmup: WarmupConfig) -> None:
        super().__init__()
        self.task, self.model, self.warmup = task, model, warmup
        self.autocast = None if autocast is None else TYPES[autocast]

    def forward(self, batch: Any, step: int) -> tuple[Tensor, Outcome]:
        """The loss, where wrappers look for it, and all that the task tells."""
        device = next(self.model.parameters()).device.type
        with contextlib.ExitStack() as stack:
            if self.autocast is not None:
                stack.enter_context(torch.autocast(device, self.autocast))
            if step < self.warmup.steps:
                stack.enter_context(unrolled(self.model, self.warmup.layers))
            solves = stack.enter_context(watched(self.model))
            outcome = self.task.losses(self.model, batch, step)
        if not outcome.solutions:
            outcome.solutions = solves
        return outcome.loss, outcome


def compile_inner(model: nn.Module) -> None:
    """Compile, in place, what is evaluated most: the cells and fields of implicit layers, or else the model."""
    # Adjoints pull several cotangents back through one evaluation, whose buffers must not be given away by the first.
    torch._functorch.config.donated_buffer = False
    inner = [layer.cell for layer in model.modules() if isinstance(layer, DEQ)]
    inner += [layer.field for layer in model.modules() if isinstance(layer, NeuralODE | ContinuousFlow)]
    for module in [part for part in inner if isinstance(part, nn.Module)] or [model]:
        module.compile()
