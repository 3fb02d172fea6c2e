"""A discrete structure inside a network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...solvers.inference import Structured, sparse_map
from ...solvers.options import suggest

RELAXATIONS = ("marginals", "sparsemap", "argmax", "sample")


class StructuredLatent(nn.Module):
    """A latent structure: potentials in, indicators of the structure's parts out, and gradients through them.

    The layer has no parameters: potentials come from the network before it, and the network behind it reads indicators
    that are

    - "marginals": the expected structure, of all structures; dense and smooth;
    - "sparsemap": the expected structure of a mixture of few, with exact zeros and exact gradients;
    - "argmax": the best structure, whole; its gradient is that of the marginals (straight through), which is biased;
    - "sample": a structure drawn anew at every call, with the same gradient.

    Args:
        distribution: what makes a distribution of potentials: `LinearChain`, `SemiMarkov`, `DependencyTree`,
            `Constituency`, `Alignment`, or a function such as `functools.partial(DependencyTree, projective=False)`.
        relaxation: one of the above.

    Raises:
        ValueError: an unknown relaxation.

    Source: Kim et al. 2017 (marginals); Niculae, Martins and Cardie 2018 (SparseMAP in latent trees); Peng, Thomson and
    Smith 2018 (straight through structures).

    Example:
        >>> parse = StructuredLatent(functools.partial(DependencyTree, projective=False), "sparsemap")
        >>> arcs = parse(scores, lengths=lengths)  # (batch, 1 + words, 1 + words)
    """

    def __init__(self, distribution: Callable[..., Structured], relaxation: str = "marginals") -> None:
        super().__init__()
        if relaxation not in RELAXATIONS:
            raise ValueError(
                f"StructuredLatent: relaxation must be one of {', '.join(map(repr, RELAXATIONS))}; "
                f"got {relaxation!r}.{suggest(str(relaxation), list(RELAXATIONS))}"
            )
        self.distribution = distribution
        self.relaxation = relaxation

    def forward(self, *potentials: Tensor, **options: Any) -> Any:
        """Indicators, hard or soft, in the layout of the distribution's marginals; zero in the padding.

        Args:
            potentials: of the distribution, by position.
            options: further arguments of the distribution, such as lengths.

        Raises:
            TypeError, ValueError: as the distribution; a sample without structure.
        """
        distribution = self.distribution(*potentials, **options)
        if self.relaxation == "sparsemap":
            return sparse_map(distribution).marginals
        marginals = distribution.marginals
        if self.relaxation == "marginals":
            return marginals
        with torch.no_grad():
            if self.relaxation == "argmax":
                structure = distribution.argmax
            else:
                structure = pytree.tree_map(lambda stacked: stacked[0], distribution.sample(1))
            hard = distribution.indicators(structure)
        return pytree.tree_map(lambda h, m: h + (m - m.detach()), hard, marginals)

    def extra_repr(self) -> str:
        """The options, for repr()."""
        return f"relaxation={self.relaxation!r}"
