"""What structured attention chooses among: subsets, segments or trees over the keys."""

from __future__ import annotations

import abc

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ...solvers.inference import DependencyTree, LinearChain, SemiMarkov


class Structure(nn.Module, abc.ABC):
    """From scores of single keys to marginals of a structure over all of them.

    Attributes:
        square: whether queries and keys are the same positions.
    """

    square = False

    @abc.abstractmethod
    def forward(
        self,
        scores: Float[Tensor, "batch heads queries keys"],
        queries: Float[Tensor, "batch heads queries dim"],
        lengths: Int[Tensor, " batch"] | None,
    ) -> Float[Tensor, "batch heads queries keys"]:
        """Probabilities; of keys beyond the lengths zero.

        Args:
            scores: of every key for every query; -inf excludes one.
            queries: what the scores were made of.
            lengths: keys that there are.
        """


class Chain(Structure):
    """For every query a subset of the keys: each is chosen or not, and neighbours like to agree, or not.

    Attributes:
        transitions: of every head, from not chosen and chosen to the same at the next key: (heads, 2, 2).

    Source: Kim et al. 2017, section 3.1 (segmentation attention).
    """

    def __init__(self, heads: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.transitions = nn.Parameter(torch.zeros(heads, 2, 2, device=device, dtype=dtype))

    def forward(
        self,
        scores: Float[Tensor, "batch heads queries keys"],
        queries: Float[Tensor, "batch heads queries dim"],
        lengths: Int[Tensor, " batch"] | None,
    ) -> Float[Tensor, "batch heads queries keys"]:
        """The probability that a key is chosen."""
        unary = torch.stack([torch.zeros_like(scores), scores], -1).flatten(0, 2)
        edges = _each(self.transitions, scores)
        states = LinearChain(edges.to(unary.dtype), unary, _repeated(lengths, scores)).marginals.states
        return states[..., 1].reshape(scores.shape)


class Segments(Structure):
    """For every query segments of neighbouring keys, which are chosen or not as a whole.

    Args:
        heads: of the attention.
        longest: keys that a segment can have.

    Attributes:
        durations: what a segment of every length is worth, if not chosen and if chosen: (heads, longest, 2).
        transitions: from one segment to the next, (heads, 2, 2).

    Source: Sarawagi and Cohen 2004 (the distribution); Kim et al. 2017 (its use).
    """

    def __init__(
        self,
        heads: int,
        longest: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.longest = longest
        self.durations = nn.Parameter(torch.zeros(heads, longest, 2, device=device, dtype=dtype))
        self.transitions = nn.Parameter(torch.zeros(heads, 2, 2, device=device, dtype=dtype))

    def forward(
        self,
        scores: Float[Tensor, "batch heads queries keys"],
        queries: Float[Tensor, "batch heads queries dim"],
        lengths: Int[Tensor, " batch"] | None,
    ) -> Float[Tensor, "batch heads queries keys"]:
        """The probability that a key is in a segment that is chosen."""
        keys = scores.shape[-1]
        longest = min(self.longest, keys)
        flat = scores.flatten(0, 2)
        sums = [flat]
        for k in range(1, longest):
            # A segment of one key more; those that reach beyond the end do not exist.
            sums.append(sums[-1] + nn.functional.pad(flat[:, k:], (0, k)))
        chosen = torch.stack(sums, -1)
        worth = _each(self.durations[:, :longest], scores).to(flat.dtype).unsqueeze(1)
        potentials = torch.stack([torch.zeros_like(chosen), chosen], -1) + worth
        edges = _each(self.transitions, scores).to(flat.dtype)
        found = SemiMarkov(potentials, edges, _repeated(lengths, scores)).marginals.segments[..., 1]
        # A segment that starts j keys before and has more than j keys covers this one.
        more = found.flip(2).cumsum(2).flip(2)
        covered = [nn.functional.pad(more[:, : keys - j, j], (j, 0)) for j in range(longest)]
        return torch.stack(covered).sum(0).reshape(scores.shape)


class Tree(Structure):
    """One tree over all positions, in which every position attends to its head.

    Args:
        heads: of the attention.
        dim: of each.
        projective: whether arcs must not cross.

    Attributes:
        root: what stands for the key of the root, to which one position attends; its value is zero. (heads, dim).

    Source: Kim et al. 2017, section 3.2 (syntactic attention); Liu and Lapata 2018 (trees that may cross).
    """

    square = True

    def __init__(
        self,
        heads: int,
        dim: int,
        projective: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.projective = projective
        self.root = nn.Parameter(torch.zeros(heads, dim, device=device, dtype=dtype))

    def forward(
        self,
        scores: Float[Tensor, "batch heads queries keys"],
        queries: Float[Tensor, "batch heads queries dim"],
        lengths: Int[Tensor, " batch"] | None,
    ) -> Float[Tensor, "batch heads queries keys"]:
        """The probability that a key is the query's head."""
        root = (queries * self.root.unsqueeze(1)).sum(-1) / queries.shape[-1] ** 0.5
        # Rows are heads here, the root's first, and the column of the root is not used.
        arcs = nn.functional.pad(torch.cat([root.unsqueeze(2), scores.mT], 2), (1, 0)).flatten(0, 1)
        tree = DependencyTree(arcs, _repeated(lengths, scores, queries=False), projective=self.projective)
        return tree.marginals[:, 1:, 1:].mT.reshape(scores.shape)


def _each(parameter: Tensor, scores: Tensor) -> Tensor:
    """A head's parameter for every sample, head and query: (batch * heads * queries, ...)."""
    batch, heads, queries, _ = scores.shape
    rest = parameter.shape[1:]
    return parameter.reshape(1, heads, 1, *rest).expand(batch, heads, queries, *rest).flatten(0, 2)


def _repeated(lengths: Tensor | None, scores: Tensor, queries: bool = True) -> Tensor | None:
    if lengths is None:
        return None
    return lengths.repeat_interleave(scores.shape[1] * (scores.shape[2] if queries else 1))
