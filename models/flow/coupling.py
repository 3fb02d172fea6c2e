"""Which noise goes with which sample: the pairs whose lines flow matching learns from."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

Coupling = Callable[[Tensor, Tensor], Tensor]


def independent(z: Float[Tensor, "batch *shape"], x: Float[Tensor, "batch *shape"]) -> Int[Tensor, " batch"]:
    """Every z with the x of its own row."""
    return torch.arange(len(z), device=z.device)


def optimal(z: Float[Tensor, "batch *shape"], x: Float[Tensor, "batch *shape"]) -> Int[Tensor, " batch"]:
    """For each x the row of the z that is its own in the matching of least total squared distance.

    The lines of such pairs cross less, so that the field that is learnt is straighter and takes fewer evaluations; over
    batches the pairs' distribution still has base and data as its margins, so that what is learnt carries one to the
    other. Costs O(batch^3) on the CPU.

    Source: Tong et al. 2024, section 3.2; Pooladian et al. 2023; the assignment: scipy's (Crouse 2016).
    """
    from scipy.optimize import linear_sum_assignment

    distances = torch.cdist(x.detach().flatten(1).double(), z.detach().flatten(1).double()).square()
    _, columns = linear_sum_assignment(distances.cpu().numpy())
    return torch.from_numpy(columns).to(z.device)


COUPLINGS: dict[str, Coupling] = {"independent": independent, "optimal": optimal}
