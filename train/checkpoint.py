"""What a run needs to go on: numbers and tensors in one .safetensors file, which nothing has to be unpickled for."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ..zoo.errors import CheckpointError
from ..zoo.files import write_atomically

# Nested dictionaries (with strings as keys) and lists of tensors, numbers, strings, booleans and None.
Tree = Any

TENSOR = "$tensor"


def write_tree(path: Path, tree: Tree) -> None:
    """Write `tree` to `path`; the file is replaced whole.

    Raises:
        CheckpointError: the tree holds something that is neither a tensor nor one of JSON's types.
        OSError: the file cannot be written; what it held before is untouched.
    """
    write_atomically(path, pack(tree))


def read_tree(path: Path) -> Tree:
    """What `write_tree` wrote.

    Raises:
        CheckpointError: the file cannot be read, is truncated, or is none of `write_tree`.
    """
    try:
        return unpack(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is not a whole checkpoint ({error}).") from error


def pack(tree: Tree) -> bytes:
    """`tree` as the bytes of a .safetensors file: its tensors, and all else as JSON in the file's header."""
    tensors: dict[str, Tensor] = {}
    plain = _encode(tree, "", tensors)
    return safetensors.torch.save(tensors, {"tree": json.dumps(plain)})


def unpack(content: bytes) -> Tree:
    """The tree of `pack`'s bytes."""
    tensors = safetensors.torch.load(content)
    # The library hands out the header's metadata for files alone; its layout is a length and then JSON.
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    return _decode(json.loads(header["__metadata__"]["tree"]), tensors)


def _encode(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
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


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        return tensors[value[TENSOR]] if set(value) == {TENSOR} else {k: _decode(v, tensors) for k, v in value.items()}
    return [_decode(v, tensors) for v in value] if isinstance(value, list) else value


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict; of a sharded model every process must ask, and each gets the whole tensors."""
    return {key: _whole(value) for key, value in model.state_dict().items()}


def load_model_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put back what `model_state` gave, whatever the sharding then and now.

    Raises:
        CheckpointError: the state is of another model.
    """
    ours = model.state_dict()
    try:
        model.load_state_dict({k: _like(v, ours[k]) if k in ours else v for k, v in state.items()})
    except RuntimeError as error:
        raise CheckpointError(f"The checkpoint is of another model: {error}") from error


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimiser's state and options, by the place of the parameter or group."""
    state = optimizer.state_dict()
    return {
        "state": {str(i): {k: _whole(v) for k, v in entries.items()} for i, entries in state["state"].items()},
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
        state = {
            int(i): {k: _like(v, parameters[int(i)]) for k, v in entries.items()}
            for i, entries in tree["state"].items()
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


def _whole(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _like(value: Any, ours: Tensor) -> Any:
    if not (isinstance(value, Tensor) and isinstance(ours, DTensor) and value.shape == ours.shape):
        return value
    return distribute_tensor(value.to(ours.device), ours.device_mesh, ours.placements)
