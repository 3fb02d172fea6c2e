"""Weights on disk: found by their card, verified byte by byte, and put into a model that they must fit."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor, nn

from .cards import Weights
from .errors import CheckpointError
from .fetch import fetch_weights

SHOWN = 8


def find_weights(weights: Weights, folders: Sequence[Path]) -> Path:
    """The file in the first of `folders` that holds it; where none does, it is fetched into the last.

    Raises:
        CheckpointError: none does, and the card names no source, or the transfer failed; the message names every place
            that was searched, and where to put the file.
        OSError: the last folder cannot be written.
    """
    for folder in folders:
        path = folder / weights.file
        if path.is_file():
            return path
    if weights.source:
        return fetch_weights(weights, folders[-1])
    raise CheckpointError(
        f"The weights {weights.file} are in none of {', '.join(str(f) for f in folders)}. Install restpoint again, "
        "or put the file into one of these folders; RESTPOINT_HOME names the parent of the last."
    )


def read_weights(path: Path, expected: Weights | None = None) -> dict[str, Tensor]:
    """The tensors of a .safetensors file.

    Args:
        path: of the file.
        expected: its card's entry, against which the bytes are verified before they are parsed.

    Raises:
        CheckpointError: the file is missing, truncated, not what its card says, or no .safetensors file.
    """
    if path.suffix != ".safetensors":
        raise CheckpointError(
            f"{path} does not end in .safetensors, and nothing else is read: other formats can run code when they are "
            "opened. Convert a state dict that you trust with safetensors.torch.save_file(state, path)."
        )
    try:
        # What is verified is what is parsed: the file is read once.
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"The weights {path} cannot be read: {error.strerror}.") from error
    if expected is not None:
        _verify(path, content, expected)
    try:
        return safetensors.torch.load(content)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path} is not a whole .safetensors file ({error}). Copy or download it again."
        ) from error


def _verify(path: Path, content: bytes, expected: Weights) -> None:
    remedy = f"Delete {path} and install, copy or download it again."
    if len(content) < expected.size:
        raise CheckpointError(f"{path} is truncated: {len(content)} bytes of {expected.size}. {remedy}")
    digest = hashlib.sha256(content).hexdigest()
    if digest != expected.sha256:
        raise CheckpointError(
            f"{path} is corrupt, or belongs to another card: its sha256 is {digest}, and its card says "
            f"{expected.sha256}. {remedy}"
        )


def pack_weights(model: nn.Module, file: str) -> tuple[bytes, Weights]:
    """The model's state dict as the bytes of a .safetensors file, and its entry on a card.

    Raises:
        CheckpointError: the state dict holds something that is no tensor.
    """
    state = model.state_dict()
    strange = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if strange:
        raise CheckpointError(f"The state dict holds what is no tensor, and cannot be saved: {_some(strange)}.")
    # Tied weights share memory, which the format refuses: each name gets its own copy.
    content = safetensors.torch.save({key: value.detach().cpu().clone().contiguous() for key, value in state.items()})
    return content, Weights(file, hashlib.sha256(content).hexdigest(), len(content))


def load_state(model: nn.Module, state: Mapping[str, Tensor], source: str, *, without: Iterable[str] = ()) -> None:
    """Copy `state` into `model`: every key and every shape must fit, or nothing is copied.

    Args:
        model: what receives the tensors.
        state: tensors by name.
        source: what to call the weights in an error.
        without: prefixes of names that are left as they are in the model.

    Raises:
        CheckpointError: keys are missing, unknown, or of another shape; the message names them and the shapes.
    """
    prefixes = tuple(without)
    given = {key: value for key, value in state.items() if not key.startswith(prefixes)}
    wanted = {key: value for key, value in model.state_dict().items() if not key.startswith(prefixes)}
    complaints = []
    if missing := [key for key in wanted if key not in given]:
        complaints.append(f"{len(missing)} missing: {_some(missing)}")
    if unknown := [key for key in given if key not in wanted]:
        complaints.append(f"{len(unknown)} unknown to the model: {_some(unknown)}")
    shapes = [
        f"{key} {tuple(given[key].shape)}, in the model {tuple(wanted[key].shape)}"
        for key in wanted
        if key in given and given[key].shape != wanted[key].shape
    ]
    if shapes:
        complaints.append(f"{len(shapes)} of another shape: {_some(shapes, '; ')}")
    if complaints:
        raise CheckpointError(
            f"{source} does not fit {type(model).__name__}. Of {len(wanted)} tensors, {'. Also '.join(complaints)}. "
            "Build the architecture with the arguments that these weights were trained with."
        )
    model.load_state_dict(given, strict=not prefixes)


def _some(items: Sequence[str], separator: str = ", ") -> str:
    more = f"{separator}and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return separator.join(items[:SHOWN]) + more
