"""An energy of a state as its minimisers see it: values, slopes and products with the Hessian, sample by sample."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..transforms import autocast_to, inside_transform
from ..tree import StateError, StateSpec


@dataclasses.dataclass(frozen=True)
class Energy:
    """E(y, *args) of rows y (batch, n).

    Attributes:
        function: the user's; a number a sample.
        args: passed on to it after the state.
        spec: how the state lies in the rows.
        autocast: the type that the function is to be autocast to, or None.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    spec: StateSpec
    autocast: torch.dtype | None = None

    def value(self, y: Tensor) -> Tensor:
        """E (batch,).

        Raises:
            StateError: the function did not return one number a sample.
        """
        with autocast_to(self.autocast, y.device):
            energy = self.function(self.spec.unflatten(y), *self.args)
        if not isinstance(energy, Tensor):
            raise StateError(f"energy(y): expected a tensor of shape (batch,), got {type(energy).__name__}.")
        if energy.shape != (len(y),):
            raise StateError(
                f"energy(y): expected one number a sample, shape {(len(y),)}, got {tuple(energy.shape)}; sum over "
                "everything but the batch."
            )
        return energy.to(y.dtype)

    def slope(self, y: Tensor) -> Tensor:
        """dE/dy (batch, n), differentiable wherever derivatives are recorded."""
        if inside_transform():
            return torch.func.grad(lambda y: self.value(y).sum())(y)
        recording = torch.is_grad_enabled()
        with torch.enable_grad():
            point = y if y.requires_grad else y.detach().requires_grad_()
            energy = self.value(point)
            if not energy.requires_grad:
                return torch.zeros_like(y)
            (slope,) = torch.autograd.grad(energy.sum(), point, create_graph=recording, allow_unused=True)
        return torch.zeros_like(y) if slope is None else slope

    def both(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """E and dE/dy, as constants."""
        if inside_transform():
            slope, energy = torch.func.grad(lambda y: (lambda e: (e.sum(), e))(self.value(y)), has_aux=True)(y)
            return energy, slope
        with torch.enable_grad():
            point = y.detach().requires_grad_()
            energy = self.value(point)
            if not energy.requires_grad:
                return energy, torch.zeros_like(y)
            (slope,) = torch.autograd.grad(energy.sum(), point, allow_unused=True)
        return energy.detach(), torch.zeros_like(y) if slope is None else slope

    def curvature(self, y: Tensor) -> Callable[[Tensor], Tensor]:
        """v -> H v at the constant y, from one recording."""
        if inside_transform():
            return lambda v: torch.func.jvp(self.slope, (y,), (v,))[1]
        with torch.enable_grad():
            point = y.detach().requires_grad_()
            slope = self.slope(point)

        def product(v: Tensor) -> Tensor:
            if not slope.requires_grad:
                return torch.zeros_like(v)
            (out,) = torch.autograd.grad(slope, point, v, retain_graph=True, allow_unused=True)
            return torch.zeros_like(v) if out is None else out

        return product


def value_without(problem: Energy, y: Tensor, broken: Tensor) -> Tensor:
    """E (batch,), NaN in the samples that broke, of which nothing reaches the gradient of what all samples share.

    A healthy sample stands in for them, with its row of those args that have a row for each sample: giving these rows
    away must not change the energy of any other sample, as it would with a weight that is as long as the batch.
    """
    if inside_transform() or not 0 < int(broken.sum()) < len(broken):
        return problem.value(y)
    rows = torch.where(broken, (~broken).int().argmax(), torch.arange(len(broken), device=broken.device))
    leaves, structure = pytree.tree_flatten(problem.args)
    swapped = [t[rows] if isinstance(t, Tensor) and t.ndim and len(t) == len(rows) else t for t in leaves]
    other = dataclasses.replace(problem, args=tuple(pytree.tree_unflatten(swapped, structure)))
    with torch.no_grad():
        same = torch.isclose(problem.value(y), other.value(y[rows]), rtol=1e-6, equal_nan=True)
    if not bool((same | broken).all()):
        return problem.value(y)
    return torch.where(broken, torch.nan, other.value(y[rows]))
