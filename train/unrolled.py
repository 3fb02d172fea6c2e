"""Equilibrium models trained for a while as the finite networks that they are the limit of."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from ..models.deq import DEQ
from ..solvers import Picard, UnrollAdjoint


@contextlib.contextmanager
def unrolled(model: nn.Module, layers: int) -> Iterator[None]:
    """Inside, every `DEQ` of `model` applies its cell `layers` times, and is differentiated through them all.

    A freshly initialised cell has no good rest point yet, and its first steps are cheaper and steadier as those of a
    weight-tied network.

    Source: Bai, Koltun and Kolter 2020, section 4.3 (shallow pretraining).
    """
    layers_of_model = [module for module in model.modules() if isinstance(module, DEQ)]
    before = [(deq.solver, deq.adjoint, deq.rtol, deq.atol, deq.max_steps) for deq in layers_of_model]
    for deq in layers_of_model:
        deq.solver, deq.adjoint, deq.rtol, deq.atol, deq.max_steps = Picard(), UnrollAdjoint(), 0.0, 0.0, layers
    try:
        yield
    finally:
        for deq, knobs in zip(layers_of_model, before, strict=True):
            deq.solver, deq.adjoint, deq.rtol, deq.atol, deq.max_steps = knobs
