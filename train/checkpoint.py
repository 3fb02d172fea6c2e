"""What a run needs to go on, in one .safetensors file that is replaced whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ..zoo.errors import CheckpointError
from ..zoo.files import write_atomically


def save_checkpoint(
    path: Path, model: nn.Module, averaged: nn.Module, optimizer: torch.optim.Optimizer, step: int, skipped: int
) -> None:
    """Write weights, averaged weights, optimiser state, counters and the random state to `path`.

    The learning rate and the place in the data are functions of the step, and are not stored.

    Raises:
        OSError: the file cannot be written; what it held before is untouched.
    """
    tensors: dict[str, Tensor] = {"step": torch.tensor(step), "skipped": torch.tensor(skipped)}
    tensors["random"] = torch.get_rng_state()
    tensors |= {f"model/{key}": value for key, value in model.state_dict().items()}
    tensors |= {f"averaged/{key}": value for key, value in averaged.state_dict().items()}
    for index, entries in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{key}": torch.as_tensor(value) for key, value in entries.items()}
    copies = {key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()}
    write_atomically(path, safetensors.torch.save(copies))


def load_checkpoint(
    path: Path, model: nn.Module, averaged: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[int, int]:
    """Put everything that `save_checkpoint` wrote back into its place; returns step and skipped.

    Raises:
        CheckpointError: the file is damaged, or of another model.
    """
    try:
        tensors = safetensors.torch.load(path.read_bytes())
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} is not a whole checkpoint ({error}). Start anew in another folder.") from error
    try:
        model.load_state_dict(_under("model/", tensors))
        averaged.load_state_dict(_under("averaged/", tensors))
        state: dict[int, dict[str, Any]] = {}
        for key, value in _under("optimizer/", tensors).items():
            index, _, name = key.partition("/")
            state.setdefault(int(index), {})[name] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} is of another model or optimiser: {error}") from error
    torch.set_rng_state(tensors["random"])
    return int(tensors["step"]), int(tensors["skipped"])


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
