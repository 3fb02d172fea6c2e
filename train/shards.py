"""Checkpoints of a run whose tensors are spread over processes: each writes its own parts, and none sees the whole.

The parts are written and read by `torch.distributed.checkpoint`, in .safetensors files. Two things of it are left out,
since they unpickle: `FileSystemWriter`'s index of a folder, in whose place the offsets in the files' headers tell what
is where, and the plans that its processes send each other, which nobody needs where each tensor's parts are disjoint.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, create_default_global_save_plan
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.tensor import DTensor

from ..zoo.errors import CheckpointError


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor that lies in the files of a folder.

    Attributes:
        folder: with the files.
        name: of the tensor in them.
        shape: of the whole tensor.
        dtype: of its numbers.
    """

    folder: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class _OwnParts(DefaultSavePlanner):
    """Plans one process's parts without asking the others."""

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        # The usual check, that the plans cover each tensor, is for one who sees them all: `missing` does it afterwards.
        self.global_plan, self.metadata = create_default_global_save_plan(all_plans)
        return self.global_plan, self.metadata


class _ShardWriter(dcp.HuggingFaceStorageWriter):
    """Writes one file for the parts of one process."""

    def __init__(self, folder: Path, rank: int) -> None:
        super().__init__(str(folder), save_distributed=True)
        self._number = rank + 1

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [dataclasses.replace(plan, storage_data={"shard_index": self._number}) for plan in plans]


def write_shards(folder: Path, tensors: Mapping[str, DTensor], rank: int) -> None:
    """Write this process's parts of `tensors` to a file of their own in `folder`, and see it on the disk.

    Raises:
        OSError: the file cannot be written.
    """
    own: dict[str, Any] = {}
    seen = set()
    for name, value in tensors.items():
        # Tied weights share memory, which the format refuses: each name gets its own copy.
        place = value.to_local().data_ptr()
        own[name] = value.detach().clone() if place in seen else value.detach()
        seen.add(place)
    if own:
        _attempt(
            lambda: dcp.save(own, storage_writer=_ShardWriter(folder, rank), planner=_OwnParts(), no_dist=True), folder
        )


def read_shards(stored: Mapping[Any, Stored], templates: Mapping[Any, Tensor]) -> dict[Any, Tensor]:
    """The tensors of `stored`, spread as those of `templates` are; where a template is not spread, whole.

    Each process reads from the files what it holds, and no more; how many had written them does not matter.

    Raises:
        CheckpointError: the files are damaged, or miss parts.
    """
    wanted: dict[Path, dict[str, Any]] = {}
    found: dict[Any, Tensor] = {}
    for key, place in stored.items():
        like = templates.get(key)
        spread = isinstance(like, DTensor) and tuple(like.shape) == place.shape
        found[key] = (
            torch.empty_like(like, dtype=place.dtype)  # type: ignore[arg-type]
            if spread
            else torch.empty(place.shape, dtype=place.dtype)
        )
        wanted.setdefault(place.folder, {})[place.name] = found[key]
    for folder, tensors in wanted.items():
        reader = dcp.HuggingFaceStorageReader(str(folder))
        _attempt(lambda: dcp.load(tensors, storage_reader=reader, no_dist=True), folder)  # noqa: B023
    return found


def missing(stored: list[Stored]) -> str:
    """What files lack of these tensors, in words; empty where all is there and whole, as far as their headers tell."""
    for folder in {place.folder for place in stored}:
        try:
            known = dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            return f"{folder} holds no whole files ({error})"
        for place in (place for place in stored if place.folder == folder):
            entry = known.get(place.name)
            chunks = entry.chunks if isinstance(entry, TensorStorageMetadata) else []
            there = sum({tuple(chunk.offsets): chunk.sizes.numel() for chunk in chunks}.values())
            if there != torch.Size(place.shape).numel():
                return f"{folder} holds {there:,} of the {torch.Size(place.shape).numel():,} numbers of {place.name}"
    return ""


def _attempt(work: Callable[[], Any], folder: Path) -> None:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninit")
            work()
    except CheckpointException as error:  # which is no Exception, and wraps what went wrong
        reason = next(iter(error.failures.values()))[0]
        if isinstance(reason, OSError) or not isinstance(reason, Exception):
            raise reason from None
        raise CheckpointError(f"{folder} does not hold what was asked for ({reason}).") from reason
