"""The function under diagnosis, recorded once at a point with everything that it depends on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..fixed_point.problem import Problem, operator_of_recording
from ..linear import LinearOperator
from ..tree import flatten, norms


def problem_of(f: Callable[..., Any], z: Any, args: tuple[Any, ...] | list[Any], root: bool) -> tuple[Problem, Tensor]:
    """The problem, and z as a matrix (batch, n).

    Raises:
        TypeError: args is not a tuple.
        StateError: z is no state.
    """
    if not isinstance(args, (tuple, list)):
        raise TypeError(f"args must be a tuple of what follows the state; got {type(args).__name__}.")
    matrix, spec = flatten(z, "z")
    return Problem(f, tuple(args), spec, root, "residual(x)" if root else "f(z)"), matrix


def jacobian_of(f: Callable[..., Any], z: Any, args: tuple[Any, ...] | list[Any]) -> tuple[LinearOperator, Tensor]:
    """J = df/dz at z as an operator, and z as a matrix (batch, n)."""
    problem, matrix = problem_of(f, z, args, root=True)
    return problem.linearize(matrix), matrix


def leaves_of(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The leaf tensors that a graph ends in: parameters, and whatever else requires grad."""
    found: dict[int, Tensor] = {}
    tensors = list(tensors)
    found.update((id(t), t) for t in tensors if t.is_leaf and t.requires_grad)
    pending = [t.grad_fn for t in tensors if t.grad_fn is not None]
    seen = set()
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor):
            found[id(variable)] = variable
        pending.extend(parent for parent, _ in node.next_functions if parent is not None)
    return list(found.values())


def with_gradients(args: Any) -> Any:
    """`args` with every floating-point tensor a leaf of its own."""

    def leaf(t: Tensor) -> Tensor:
        return t.detach().requires_grad_() if t.is_floating_point() else t

    return pytree.tree_map_only(Tensor, leaf, args)


@dataclasses.dataclass(frozen=True)
class Recording:
    """One recorded evaluation.

    Attributes:
        operator: A = -dr/dz there.
        residual: r (batch, n).
        point: the state (batch, n), a leaf of the graph.
        out: f(z) or F(x) (batch, n), with its graph.
        inputs: the tensors of args that out may depend on, in their order.
    """

    operator: LinearOperator
    residual: Tensor
    point: Tensor
    out: Tensor
    inputs: tuple[Tensor, ...]

    @classmethod
    def at(cls, problem: Problem, z: Tensor) -> Recording:
        """Evaluate at z (batch, n)."""
        args = with_gradients(problem.args)
        with torch.enable_grad():
            point = z.detach().requires_grad_()
            out = dataclasses.replace(problem, args=args).output(point)
        residual = -out.detach() if problem.root else out.detach() - z.detach()
        inputs = tuple(t for t in pytree.tree_leaves(args) if isinstance(t, Tensor) and t.requires_grad)
        return cls(operator_of_recording(problem, point, out), residual, point, out, inputs)

    def response(self, sources: Sequence[Tensor], tangents: Sequence[Tensor]) -> Tensor:
        """The derivative of out (batch, n) along `tangents` of the leaves `sources`, by differentiating a pull-back."""
        nothing = torch.zeros_like(self.out)
        if not (self.out.requires_grad and sources):
            return nothing
        with torch.enable_grad():
            w = torch.zeros_like(self.out, requires_grad=True)
            pulled = torch.autograd.grad(self.out, list(sources), w, create_graph=True, allow_unused=True)
        used = [(g, t) for g, t in zip(pulled, tangents, strict=True) if g is not None and g.requires_grad]
        if not used:
            return nothing
        outputs, along = zip(*used, strict=True)
        return torch.autograd.grad(outputs, w, along, allow_unused=True, materialize_grads=True)[0]


def require_rows(operator: LinearOperator) -> None:
    """Check that sample i of the function's value depends on sample i of the state alone.

    Raises:
        ValueError: it does not, and then nothing can be said per sample.
    """
    if operator.batch == 1:
        return
    lone = torch.zeros(operator.batch, operator.size, dtype=operator.dtype, device=operator.device)
    lone[0] = 1
    # A broken sample makes a NaN of every zero, and says nothing about coupling.
    reached = operator.rmatvec(lone)[1:].nan_to_num(nan=0.0)
    if bool((reached != 0).any()):
        raise ValueError(
            "the function couples the samples of a batch (batch normalisation, attention across the batch?), so that "
            "there is no Jacobian per sample to diagnose. Diagnose the samples one by one, as batches of one."
        )


def sign_vectors(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Independent entries of +1 and -1, of the shape and device of `like`, in float32 or better."""
    dtype = torch.float32 if like.dtype in (torch.float16, torch.bfloat16) else like.dtype
    bits = torch.randint(0, 2, like.shape, generator=generator, device=like.device)
    return bits.to(dtype) * 2 - 1


def unit_vectors(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Rows of length one and uniform direction, in float32 or better."""
    dtype = torch.float32 if like.dtype in (torch.float16, torch.bfloat16) else like.dtype
    v = torch.randn(like.shape, generator=generator, device=like.device, dtype=dtype)
    return v / norms(v).unsqueeze(1)
