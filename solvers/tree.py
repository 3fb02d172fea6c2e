"""States: a tensor, tuple, list or dict of tensors as one (batch, n) matrix, and back."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


class StateError(ValueError, TypeError):
    """A state, or what a function made of it, that does not fit; the message says what and where."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One tensor of a state: its place in the structure, shape without the batch, and type."""

    path: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Real numbers per sample; a complex entry counts twice."""
        return math.prod(self.shape) * (2 if self.dtype.is_complex else 1)


@dataclasses.dataclass(frozen=True)
class StateSpec:
    """How a state lies in its (batch, n) matrix. The batch size is free: a compacted batch has the same spec.

    Attributes:
        leaves: the tensors, in the order of their columns.
        structure: the pytree structure.
        dtype: of the matrix: the promoted real type of all leaves.
        device: of the matrix.
    """

    leaves: tuple[Leaf, ...]
    structure: Any
    dtype: torch.dtype
    device: torch.device

    @property
    def size(self) -> int:
        """Columns of the matrix."""
        return sum(leaf.size for leaf in self.leaves)

    @property
    def single(self) -> bool:
        """Whether the state is one real tensor, for which matrix and state share memory."""
        return self.structure.is_leaf() and not self.leaves[0].dtype.is_complex

    def flatten(self, state: Any, name: str, cast: bool = False) -> Tensor:
        """The matrix (batch, n) of a `state` that must have this spec.

        Args:
            state: what the user's function returned.
            name: how to call it in an error.
            cast: accept another floating-point type and convert it, as under autocast.

        Raises:
            StateError: structure, shape, dtype or device differ; the message names the place, what was expected
                and what was found.
        """
        if self.single and isinstance(state, Tensor):
            # The common case, once an evaluation: no more than what finds a fault.
            leaf = self.leaves[0]
            fits = state.ndim == len(leaf.shape) + 1 and state.shape[1:] == leaf.shape
            if fits and state.dtype == leaf.dtype and state.device == self.device:
                return state if state.ndim == 2 else state.reshape(len(state), leaf.size)
        tensors, structure = pytree.tree_flatten(state)
        if structure != self.structure:
            tensors, structure = pytree.tree_flatten(_in_order(state, self.structure))
        if structure != self.structure:
            raise StateError(
                f"{name}: expected the structure of the initial value, {_in_words(self.structure)}, got "
                f"{_in_words(structure)}."
            )
        batch: int | None = None
        for tensor, leaf in zip(tensors, self.leaves, strict=True):
            where = f"{name}{leaf.path}"
            if not isinstance(tensor, Tensor):
                raise StateError(f"{where}: expected a tensor, got {type(tensor).__name__}.")
            if tensor.shape[1:] != leaf.shape or tensor.ndim == 0:
                raise StateError(f"{where}: expected shape (batch, {_shape(leaf.shape)}), got {tuple(tensor.shape)}.")
            if tensor.dtype != leaf.dtype and not (cast and tensor.dtype.is_floating_point):
                raise StateError(f"{where}: expected dtype {leaf.dtype} as in the initial value, got {tensor.dtype}.")
            if tensor.device != self.device:
                raise StateError(f"{where}: expected device {self.device}, got {tensor.device}.")
            if batch is not None and len(tensor) != batch:
                raise StateError(f"{where}: expected a batch of {batch} as in the other tensors, got {len(tensor)}.")
            batch = len(tensor)
        return self._join(tensors)

    def _join(self, tensors: list[Tensor]) -> Tensor:
        columns = [
            (torch.view_as_real(t) if t.is_complex() else t).reshape(t.shape[0], leaf.size).to(self.dtype)
            for t, leaf in zip(tensors, self.leaves, strict=True)
        ]
        return columns[0] if len(columns) == 1 else torch.cat(columns, dim=1)

    def unflatten(self, matrix: Tensor) -> Any:
        """The state of a `matrix` (..., batch, n); leading dimensions, as of a trajectory, are kept."""
        lead = matrix.shape[:-1]
        if self.single:
            return matrix.reshape(lead + self.leaves[0].shape)
        tensors = []
        parts = matrix.split([leaf.size for leaf in self.leaves], dim=-1) if len(self.leaves) > 1 else (matrix,)
        for part, leaf in zip(parts, self.leaves, strict=True):
            if leaf.dtype.is_complex:
                pairs = part.reshape(lead + leaf.shape + (2,)).contiguous()
                tensors.append(torch.view_as_complex(pairs).to(leaf.dtype))
            else:
                tensors.append(part.reshape(lead + leaf.shape).to(leaf.dtype))
        return pytree.tree_unflatten(tensors, self.structure)


def flatten(state: Any, name: str = "initial value", allow_complex: bool = False) -> tuple[Tensor, StateSpec]:
    """The matrix (batch, n) of a `state`, and the spec that leads back.

    Args:
        state: a tensor or a tuple, list or dict of tensors, nested as you like; their first dimension is the batch.
        name: how to call it in an error.
        allow_complex: complex tensors are stored as pairs of reals.

    Raises:
        StateError: no tensors; a tensor without a batch dimension; batches or devices that differ; an empty batch;
            an integer or boolean tensor.
    """
    paths, structure = pytree.tree_flatten_with_path(state)
    if not paths:
        raise StateError(f"{name}: expected a tensor or a structure of tensors, got {state!r}.")
    leaves: list[Leaf] = []
    tensors: list[Tensor] = []
    for path, tensor in paths:
        where = pytree.keystr(path)
        if not isinstance(tensor, Tensor):
            raise StateError(f"{name}{where}: expected a tensor, got {type(tensor).__name__}.")
        if tensor.ndim == 0:
            raise StateError(f"{name}{where}: expected a leading batch dimension, got a tensor of shape ().")
        if not (tensor.dtype.is_floating_point or (allow_complex and tensor.dtype.is_complex)):
            kinds = "floating-point or complex" if allow_complex else "floating-point"
            raise StateError(f"{name}{where}: expected a {kinds} dtype, got {tensor.dtype}.")
        first = tensors[0] if tensors else tensor
        if len(tensor) != len(first):
            raise StateError(
                f"{name}{where}: expected a batch of {len(first)} as in the first tensor, got {len(tensor)}."
            )
        if tensor.device != first.device:
            raise StateError(f"{name}{where}: expected device {first.device}, got {tensor.device}.")
        leaves.append(Leaf(where, tuple(tensor.shape[1:]), tensor.dtype))
        tensors.append(tensor)
    if len(tensors[0]) == 0:
        raise StateError(f"{name}: the batch is empty (shape {tuple(tensors[0].shape)}); a solve needs a sample.")
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    spec = StateSpec(tuple(leaves), structure, dtype.to_real(), tensors[0].device)
    return spec._join(tensors), spec


def _in_order(state: Any, structure: Any) -> Any:
    """`state` with the keys of its dictionaries in the order of `structure`, where they are the same."""

    def ordered(found: Any, like: Any) -> Any:
        if type(like) is dict and type(found) is dict and like.keys() == found.keys():
            return {key: ordered(found[key], part) for key, part in like.items()}
        if type(like) in (list, tuple) and type(found) is type(like) and len(found) == len(like):
            return type(like)(map(ordered, found, like))
        return found

    return ordered(state, pytree.tree_unflatten([None] * structure.num_leaves, structure))


def _in_words(structure: Any) -> str:
    """Such as `a tensor`, or `(tensor, {'a': tensor})`."""
    if structure.is_leaf():
        return "a tensor"
    return repr(pytree.tree_unflatten([_Tensor()] * structure.num_leaves, structure))


class _Tensor:
    def __repr__(self) -> str:
        return "tensor"


def norms(matrix: Tensor) -> Tensor:
    """Euclidean norm of every row (batch,), in float32 or better."""
    wide = torch.float32 if matrix.dtype in (torch.float16, torch.bfloat16) else matrix.dtype
    return torch.linalg.vector_norm(matrix, dim=1, dtype=wide)


def scaled_norms(matrix: Tensor) -> Tensor:
    """The same where squares would overflow or underflow, at some more cost."""
    if matrix.shape[1] == 0:
        return norms(matrix)
    if matrix.dtype in (torch.float16, torch.bfloat16):
        matrix = matrix.float()
    largest = torch.linalg.vector_norm(matrix, float("inf"), dim=1)
    largest = torch.where((largest > 0) & torch.isfinite(largest), largest, 1.0)
    return norms(matrix / largest.unsqueeze(1)) * largest


def _shape(shape: tuple[int, ...]) -> str:
    return ", ".join(map(str, shape)) or "no further dimensions"
