"""Weight normalisation for equilibrium cells, through torch's parametrizations."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from ..solvers.transforms import inside_transform

# Per kind: what registers the normalisation on a module's `weight`.
NORMS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight": lambda module: parametrizations.weight_norm(module, "weight", dim=0),
    "spectral": lambda module: parametrizations.spectral_norm(module, "weight"),
}
_WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def normalise(cell: nn.Module, kind: str) -> list[str]:
    """Normalise the weight of every linear and convolution module of `cell`, in place.

    "weight" separates each output channel's length from its direction (Salimans and Kingma 2016); "spectral" divides
    by the largest singular value of the weight as an (out, rest) matrix, estimated by power iteration (Miyato et al.
    2018): for a convolution that is not the norm of the operator. In train() every pass moves that estimate by one step
    of the iteration, from an exact start. So after a step of an optimiser, which moves the weight as well, train() and
    eval() differ by what the iteration has yet to catch up, until passes in train() have caught up.

    Args:
        cell: the module; modules whose weight is already parametrised are left alone.
        kind: "weight" or "spectral".

    Returns:
        The names of the modules that were normalised.

    Raises:
        ValueError: the kind is unknown, the cell has nothing to normalise, or modules share a weight.
    """
    if kind not in NORMS:
        raise ValueError(f"norm must be None, {' or '.join(map(repr, NORMS))}; got {kind!r}.")
    weighted = {name: module for name, module in cell.named_modules() if isinstance(module, _WEIGHTED)}
    names = [name for name, module in weighted.items() if not parametrize.is_parametrized(module, "weight")]
    if not names:
        raise ValueError(
            f"norm={kind!r}: {type(cell).__name__} has no linear or convolution weight to normalise"
            + (", since they are parametrised already; leave norm out." if weighted else ".")
        )
    _refuse_ties(cell, names, kind)
    for name in names:
        module = cell.get_submodule(name)
        weight: Tensor = module.weight.detach()  # type: ignore[operator]
        NORMS[kind](module)
        if kind == "spectral" and not weight.is_meta:
            # torch starts with a few steps of the iteration, after which train() and eval() would still differ.
            u, _, v = torch.linalg.svd(weight.flatten(1).double(), full_matrices=False)
            estimate: Any = module.parametrizations.weight[0]  # type: ignore[union-attr, index]
            estimate._u.copy_(u[:, 0])
            estimate._v.copy_(v[0])
    return names


def _refuse_ties(cell: nn.Module, names: list[str], kind: str) -> None:
    """Parametrizations would give each owner of a shared weight a weight of its own."""
    owners: dict[int, list[str]] = {}
    for path, module in cell.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(f"{path}.{name}".removeprefix("."))
    for name in names:
        shared = owners[id(cell.get_submodule(name).weight)]
        if len(shared) > 1:
            raise ValueError(
                f"norm={kind!r}: {' and '.join(shared)} are one tensor, and normalisation would untie them; use one "
                "module in both places, or leave norm out."
            )


Weights = list[tuple[nn.Module, Tensor]]
"""A module that computes a tensor, and the tensor."""


def compute_weights(cell: nn.Module) -> Weights:
    """Every parametrised tensor of `cell`, computed now, with the graph that the caller's grad mode asks for.

    Raises:
        RuntimeError: an enclosing `torch.nn.utils.parametrize.cached()` holds a tensor without its graph, so that its
            parameters would silently get no gradient.
    """
    weights: Weights = []
    for module in cell.modules():
        if not parametrize.is_parametrized(module):
            continue
        for name, source in module.parametrizations.items():  # type: ignore[union-attr, operator]
            weight = getattr(module, name)
            # Under torch.func a graph belongs to a transform, and requires_grad does not tell.
            recorded = torch.is_grad_enabled() and not inside_transform()
            if recorded and not weight.requires_grad and any(p.requires_grad for p in source.parameters()):
                raise RuntimeError(
                    f"{type(module).__name__}.{name} was cached without its graph by an enclosing "
                    "torch.nn.utils.parametrize.cached(), so its parameters would get no gradient. Open the cache anew "
                    "for the pass that needs a gradient."
                )
            weights.append((source, weight))
    return weights


@contextlib.contextmanager
def holding(weights: Weights) -> Iterator[None]:
    """Inside, the tensors are these and are not computed again.

    An evaluation of a cell that a backward pass repeats must see the very tensors that the solve saw, also where
    computing them anew would move them, as a power iteration does. `parametrize.cached()` ends too early for that.
    """
    before = [source.__dict__.get("forward") for source, _ in weights]
    for source, weight in weights:
        source.forward = lambda weight=weight: weight
    try:
        yield
    finally:
        for (source, _), forward in zip(weights, before, strict=True):
            if forward is None:
                del source.forward
            else:
                source.forward = forward


def unnormalised(cell: nn.Module, names: list[str]) -> tuple[nn.Module, dict[str, Tensor], dict[str, bool]]:
    """A `normalise`d cell in a form that can be pickled, for torch refuses parametrised modules.

    Returns:
        The cell with plain weights, sharing every other tensor; what `renormalise` needs to restore it: the tensors
        of the parametrizations, and which parameters require a gradient.
    """
    tensors = {key: value.detach() for key, value in cell.state_dict().items() if ".parametrizations." in f".{key}"}
    flags = {name: parameter.requires_grad for name, parameter in cell.named_parameters()}
    return _bare(cell, {cell.get_submodule(name) for name in names}, {}), tensors, flags


def _bare(module: nn.Module, normalised: set[nn.Module], done: dict[nn.Module, nn.Module]) -> nn.Module:
    if module in done:
        return done[module]
    # The class that torch puts in place of a parametrised module's own is derived from it. It must not be touched:
    # remove_parametrizations would take the weight from every copy of the module, since copies share that class.
    kind: type[nn.Module] = type(module).__bases__[0] if module in normalised else type(module)
    bare = kind.__new__(kind)
    done[module] = bare
    bare.__dict__.update(module.__dict__)
    bare._modules = {key: m and _bare(m, normalised, done) for key, m in module._modules.items()}
    if module in normalised:
        del bare._modules["parametrizations"]
        bare._parameters = {**module._parameters, "weight": nn.Parameter(getattr(module, "weight").detach())}  # noqa: B009
        # weight_norm's hook for old state dicts is a local function, and is registered anew with the normalisation.
        hooks = module._load_state_dict_pre_hooks
        own = {key: hook for key, hook in hooks.items() if "<locals>" not in getattr(hook, "hook", hook).__qualname__}
        bare._load_state_dict_pre_hooks = OrderedDict(own)
    return bare


def renormalise(
    cell: nn.Module, names: list[str], kind: str, tensors: dict[str, Tensor], flags: dict[str, bool]
) -> None:
    """Undo `unnormalised` in place: register the normalisation anew and copy its tensors, bit for bit."""
    for name in names:
        NORMS[kind](cell.get_submodule(name))
    state: dict[str, Any] = {**cell.state_dict(), **tensors}
    cell.load_state_dict(state)
    for key, parameter in cell.named_parameters():
        parameter.requires_grad_(flags[key])
