"""What a run needs to go on: numbers and tensors in .safetensors files, which nothing has to be unpickled for.

One file holds all of it, or, where tensors are spread over processes, a folder: each process's parts of them, and one
file for the rest.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.utils import _pytree as pytree

from ..zoo.errors import CheckpointError
from ..zoo.files import sync_folder, write_atomically
from .parallel import Parallel, plain
from .shards import Stored, missing, read_shards, write_shards

# Nested dictionaries (with strings as keys) and lists of tensors, numbers, strings, booleans and None.
Tree = Any

TENSOR, SHARDED = "$tensor", "$sharded"
# In the folder of a sharded checkpoint.
REST, PARTS = "rest.safetensors", "parts"


def write_tree(path: Path, tree: Tree) -> None:
    """Write `tree` to `path`; the file is replaced whole.

    Raises:
        CheckpointError: the tree holds something that is neither a tensor nor one of JSON's types.
        OSError: the file cannot be written; what it held before is untouched.
    """
    write_atomically(path, pack(tree))


def write_sharded_tree(folder: Path, tree: Tree, parallel: Parallel) -> bool:
    """Write `tree`, some tensors of which are spread over processes, to `folder`; every process calls this.

    Nothing keeps the folder from being seen half written: give it a name that nobody looks for.

    Args:
        folder: that all processes share; made anew.
        tree: of what is not spread, the first process's counts.
        parallel: the processes.

    Returns:
        Whether it is written. Why not, the process that failed has logged.

    Raises:
        CheckpointError: the tree holds something else, or the processes do not share the folder.
    """
    found: dict[str, Tensor] = {}
    description = _encode(tree, "", found)
    sharded = {key: value for key, value in found.items() if isinstance(value, DTensor)}
    rest = {key: value for key, value in found.items() if key not in sharded}
    parts = folder / PARTS

    def begin() -> None:
        remove(folder)
        parts.mkdir(parents=True)

    def end() -> None:
        lacks = missing(_stored(_decode(description, rest, parts)))
        if lacks:
            raise CheckpointError(f"{lacks}. With parallel: fsdp all processes must see the same run's folder.")
        write_atomically(folder / REST, safetensors.torch.save(rest, {"tree": json.dumps(description)}))
        sync_folder(parts)

    return (
        parallel.managed(begin, first=True)
        and parallel.managed(lambda: write_shards(parts, sharded, parallel.rank))
        and parallel.managed(end, first=True)
    )


def remove(path: Path) -> None:
    """Remove a file or folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def is_spread(tree: Tree) -> bool:
    """Whether `tree` holds tensors of which this process has but a part."""
    return any(isinstance(leaf, DTensor) for leaf in pytree.tree_leaves(tree))


def read_tree(path: Path) -> Tree:
    """What `write_tree` or `write_sharded_tree` wrote; of the latter the tensors that are spread stay where they are.

    Raises:
        CheckpointError: the file cannot be read, is truncated, or is none of `write_tree`; or the folder is not whole.
    """
    parts = path / PARTS if path.is_dir() else None
    try:
        tree = unpack((path if parts is None else path / REST).read_bytes(), parts)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is not a whole checkpoint ({error}).") from error
    lacks = missing(_stored(tree))
    if lacks:
        raise CheckpointError(f"{path} is not a whole checkpoint: {lacks}.")
    return tree


def pack(tree: Tree) -> bytes:
    """`tree` as the bytes of a .safetensors file: its tensors, and all else as JSON in the file's header.

    Raises:
        CheckpointError: the tree holds something else, or a tensor of which this process has but a part.
    """
    tensors: dict[str, Tensor] = {}
    description = _encode(tree, "", tensors)
    spread = next((name for name, value in tensors.items() if isinstance(value, DTensor)), None)
    if spread is not None:
        raise CheckpointError(f"{spread} is spread over processes, and does not go to one file.")
    return safetensors.torch.save(tensors, {"tree": json.dumps(description)})


def unpack(content: bytes, parts: Path | None = None) -> Tree:
    """The tree of `pack`'s bytes; `parts` is where its sharded tensors lie, if they do not say so themselves."""
    tensors = safetensors.torch.load(content)
    # The library hands out the header's metadata for files alone; its layout is a length and then JSON.
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    return _decode(json.loads(header["__metadata__"]["tree"]), tensors, parts)


def _stored(tree: Tree) -> list[Stored]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Stored)]


def _encode(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, DTensor | Stored):
        about = {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
        if isinstance(value, Stored):
            return {SHARDED: value.name, **about, "folder": str(value.folder)}
        tensors[where] = value
        return {SHARDED: where, **about}
    if isinstance(value, Tensor):
        # Tied weights share memory, which the format refuses: each name gets its own copy.
        tensors[where] = value.detach().cpu().clone().contiguous()
        return {TENSOR: where}
    if isinstance(value, Mapping):
        return {str(key): _encode(v, f"{where}/{key}" if where else str(key), tensors) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(v, f"{where}/{index}", tensors) for index, v in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise CheckpointError(f"A checkpoint cannot hold {where}, which is of type {type(value).__name__}.")


def _decode(value: Any, tensors: Mapping[str, Tensor], parts: Path | None) -> Any:
    if isinstance(value, list):
        return [_decode(v, tensors, parts) for v in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {TENSOR}:
        return tensors[value[TENSOR]]
    if SHARDED in value:
        folder = Path(value["folder"]) if parts is None else parts
        return Stored(folder, value[SHARDED], tuple(value["shape"]), getattr(torch, value["dtype"]))
    return {k: _decode(v, tensors, parts) for k, v in value.items()}


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict; of a sharded model each process gets its part of every tensor, as a DTensor."""
    return dict(model.state_dict())


def whole_state(model: nn.Module, keep: bool = True) -> dict[str, Tensor]:
    """The model's state dict with whole tensors; of a sharded model every process must ask.

    One tensor at a time is gathered; where `keep` is False, none of them stays.
    """
    state = {}
    for key, value in model.state_dict().items():
        whole = plain(value)
        if keep:
            state[key] = whole
    return state


def load_model_state(model: nn.Module, state: Mapping[str, Tensor | Stored]) -> None:
    """Put back what `model_state` gave, whatever the sharding then and now.

    Raises:
        CheckpointError: the state is of another model.
    """
    ours = model.state_dict()
    state = _read(state, ours)
    try:
        model.load_state_dict({k: _like(v, ours[k]) if k in ours else v for k, v in state.items()})
    except RuntimeError as error:
        raise CheckpointError(f"The checkpoint is of another model: {error}") from error


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimiser's state and options, by the place of the parameter or group; sharded as they are."""
    state = optimizer.state_dict()
    return {
        "state": {str(i): dict(entries) for i, entries in state["state"].items()},
        "groups": [{k: v for k, v in group.items() if k != "params"} for group in state["param_groups"]],
    }


def load_optimizer_state(optimizer: torch.optim.Optimizer, tree: Mapping[str, Any], *, options: bool) -> None:
    """Put back what `optimizer_state` gave.

    Args:
        optimizer: of the same parameters.
        tree: what `optimizer_state` returned.
        options: put back learning rate, momentum and so on as well, rather than to keep those of `optimizer`.

    Raises:
        CheckpointError: the state is of another optimiser or model.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    groups = optimizer.state_dict()["param_groups"]
    try:
        flat = {(i, k): v for i, entries in tree["state"].items() for k, v in entries.items()}
        flat = _read(flat, {(i, k): parameters[int(i)] for i, k in flat})
        state = {
            int(i): {k: _like(flat[i, k], parameters[int(i)]) for k in entries} for i, entries in tree["state"].items()
        }
        if options:
            groups = [
                {k: _typed(saved.get(k, v), v) for k, v in {**saved, **group}.items()}
                for group, saved in zip(groups, tree["groups"], strict=True)
            ]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    except (RuntimeError, ValueError, IndexError, KeyError) as error:
        raise CheckpointError(f"The checkpoint is of another optimiser or model: {error}") from error


def random_state() -> dict[str, Any]:
    """The states of every global generator of this process: Python's, NumPy's and torch's."""
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002 - timm's augmentation draws from the global generator
    return {
        "torch": torch.get_rng_state(),
        "cuda": list(torch.cuda.get_rng_state_all()) if torch.cuda.is_available() else [],
        "numpy": [kind, [int(k) for k in keys], *rest],
        "python": random.getstate(),
    }


def load_random_state(tree: Mapping[str, Any]) -> None:
    """Put back what `random_state` gave."""
    torch.set_rng_state(tree["torch"])
    if torch.cuda.is_available() and len(tree["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(tree["cuda"])
    kind, keys, *rest = tree["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
    version, internal, gauss = tree["python"]
    random.setstate((version, tuple(internal), gauss))


def _typed(value: Any, ours: Any) -> Any:
    # JSON has no tuples.
    return tuple(value) if isinstance(ours, tuple) else value


def _read(values: Mapping[Any, Any], templates: Mapping[Any, Tensor]) -> dict[Any, Any]:
    """`values` with what is still on the disk read, spread as the templates are."""
    stored = {key: value for key, value in values.items() if isinstance(value, Stored)}
    return {**values, **read_shards(stored, templates)}


def _like(value: Any, ours: Tensor) -> Any:
    """A tensor of `ours`, or of an optimiser about it, as the sharding of `ours` needs it."""
    if not isinstance(value, Tensor) or isinstance(value, DTensor) or not isinstance(ours, DTensor) or not value.ndim:
        return value
    # What has another shape, such as the averages over rows of a factored optimiser, every process keeps whole.
    placements = ours.placements if value.shape == ours.shape else [Replicate()] * ours.device_mesh.ndim
    return distribute_tensor(value.to(ours.device), ours.device_mesh, placements)
