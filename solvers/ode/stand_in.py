"""Healthy samples that stand in for those that have ended, whose rows count for nothing but must do no harm."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..transforms import all_true
from ..tree import norms
from .method import Rhs, Time


def standing_in(alive: Tensor) -> Tensor:
    """For each sample (batch,) the one whose row it is given: its own while it is `alive`, else the first that is."""
    return torch.where(alive, torch.arange(len(alive), device=alive.device), alive.int().argmax())


@torch.no_grad()
def own_args(rhs: Rhs, t: Time, y: Tensor, rows: Tensor) -> frozenset[int]:
    """Which of the leaves of args have a row for each sample, as far as the field can tell.

    These are as long as the batch, and giving rows of theirs to samples that have ended changes nothing for the others,
    as it would with a weight that is as long as the batch by chance.

    Args:
        y: states (batch, n) at t, those of the samples that have ended replaced already.
        rows: whose args stand in for each sample's.
    """
    leaves = pytree.tree_leaves(rhs.args)
    long = {i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == len(rows)}
    if not long:
        return frozenset()
    rhs.stand_in(None, frozenset())
    before = rhs(t, y)
    rounding = torch.finfo(y.dtype).eps ** 0.5
    ended = rows != torch.arange(len(rows), device=rows.device)

    def harmless(own: frozenset[int]) -> bool:
        rhs.stand_in(rows, own)
        return all_true(ended | (norms(rhs(t, y) - before) <= rounding * norms(before).clamp_min(rounding)))

    together = frozenset(long)
    if harmless(together):
        return together
    return frozenset(i for i in long if harmless(frozenset([i])))
