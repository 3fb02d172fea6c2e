"""Spanning trees that may cross: the matrix-tree theorem without subtractions, and the best trees."""

from __future__ import annotations

import heapq
import itertools
import math

import torch
from torch import Tensor
from torch._C import _functorch

from .semiring import Semiring
from .sparing import Carry, walk

_NEVER = 1 << 30


def tree_sum(semiring: Semiring, arcs: Tensor, real: Tensor, single_root: bool, sparing: bool = False) -> Tensor:
    """The sum over all spanning trees, (size, batch), in a semiring that can divide.

    The determinant of the graph's Laplacian, by eliminating one node after the other: what led through a node becomes
    arcs of the others. All terms are positive (Grassmann, Taksar and Heyman's form of Gaussian elimination for
    M-matrices), and so logarithms can be used, at any scale and to full relative accuracy, where the determinant of the
    exponentials overflows or cancels.

    One arc at most from the root is a limit: every arc from the root has weight w epsilon, and all quantities are known
    by the lowest power of epsilon in them, and its coefficient.

    Args:
        semiring: of the answer.
        arcs: (size, batch, words + 1, words), from heads (the root first) to words.
        real: (batch, words), False for padding.
        single_root: whether one word exactly depends on the root.
        sparing: see `walk`.

    Source: Tutte 1984, theorem 6.4; Koo et al. 2007; Grassmann, Taksar and Heyman 1985.
    """
    words = real.shape[1]
    padded = ~real
    is_root = torch.arange(words + 1, device=real.device).unsqueeze(1) == 0
    both = real.unsqueeze(1) & torch.nn.functional.pad(real, (1, 0), value=True).unsqueeze(2)
    arcs = semiring.only(both, arcs)
    # A padded word hangs from the root by an arc of weight one.
    shape = (1,) * (arcs.ndim - 1)
    arcs = torch.where(padded.unsqueeze(1) & is_root, semiring.ones(shape, arcs), arcs)
    orders = (is_root & real.unsqueeze(1)).long()
    # The longest in front, so that those that have a word k are the first ones.
    order, present = _by_length(real)
    if order is not None:
        arcs, orders, real = arcs[:, order], orders[order], real[order]

    def step(carry: Carry, k: int) -> tuple[Carry, None]:
        here, power, total, spent = carry
        active, already = present[k], here.shape[1]
        if not active:
            return carry, None
        if active > already:
            # Those whose last word this is come in.
            here = torch.cat([here[..., : k + 2, : k + 1], arcs[:, already:active, : k + 2, : k + 1]], 1)
            power = torch.cat([power[:, : k + 2, : k + 1], orders[already:active, : k + 2, : k + 1]])
            total = torch.cat([total, semiring.ones((active - already,), arcs)], 1)
            spent = torch.cat([spent, spent.new_zeros(active - already)])
        into = here[:, :, : k + 1, k]
        if not single_root:
            pivot = semiring.sum(into, -1)
        else:
            steps = power[:, : k + 1, k].masked_fill(torch.isneginf(into[0]), _NEVER)
            lowest = steps.amin(1, keepdim=True)
            pivot = semiring.sum(semiring.only(steps == lowest, into), -1)
            spent = spent + lowest.squeeze(1)
        total = semiring.times(total, pivot)
        if k == 0:
            return (here, power, total, spent), None
        share = semiring.divide(into, pivot.unsqueeze(-1))
        detour = semiring.times(share.unsqueeze(-1), here[:, :, k + 1, :k].unsqueeze(2))
        pair = torch.stack([here[:, :, : k + 1, :k], detour], -1)
        # No word is its own head.
        loop = torch.arange(k + 1, device=real.device).unsqueeze(1) == torch.arange(1, k + 1, device=real.device)
        keep = ~loop.unsqueeze(-1)
        if single_root:
            through = (steps - lowest).unsqueeze(2) + power[:, k + 1, :k].unsqueeze(1)
            both_orders = torch.stack([power[:, : k + 1, :k], through], -1)
            both_orders = both_orders.masked_fill(torch.isneginf(pair[0]), _NEVER)
            power = both_orders.amin(-1)
            keep = keep & (both_orders == power.unsqueeze(-1))
        return (semiring.sum(semiring.only(keep, pair), -1), power, total, spent), None

    start = (arcs[:, :0], orders[:0], semiring.ones((0,), arcs), torch.zeros_like(real[:0, 0], dtype=torch.int64))
    (_, _, total, spent), _ = walk(step, start, range(words - 1, -1, -1), sparing)
    result = semiring.only(spent == real.any(1), total) if single_root else total
    return result if order is None else result[:, order.argsort()]


def _by_length(real: Tensor) -> tuple[Tensor | None, list[int]]:
    """The samples in the order of their lengths, the longest first, and how many have each word.

    None, and all of them, where all are equally long; or where a transform hides it: padding then is only work.
    """
    batch, words = real.shape
    if _functorch.is_functorch_wrapped_tensor(real):
        return None, [batch] * words
    present: list[int] = real.sum(0).tolist()
    return (None if present[-1] == batch else real.sum(1).argsort(descending=True)), present


def best_trees(scores: list[list[float]], k: int, single_root: bool) -> list[list[int]]:
    """The k best spanning trees of one sentence, best first, each as the heads of words 1, 2, ...; fewer if there are.

    What follows the best tree is the best of those that differ from it first at word 1, 2, ...: one search each.

    Args:
        scores: [head][word] over root and words; minus infinity where there is no arc.
        k: how many.
        single_root: whether one word exactly depends on the root.

    Source: Chu and Liu 1965; Edmonds 1967; Lawler 1972 (the k best).
    """
    words = len(scores) - 1
    ticket = itertools.count()
    queue: list[tuple[float, int, list[int], list[list[float]], int]] = []

    def offer(allowed: list[list[float]], fixed: int) -> None:
        heads = _best_tree(allowed, single_root)
        if heads is not None:
            total = math.fsum(scores[h][m] for m, h in enumerate(heads, 1))
            heapq.heappush(queue, (-total, next(ticket), heads, allowed, fixed))

    offer(scores, 0)
    found: list[list[int]] = []
    while queue and len(found) < k:
        _, _, heads, allowed, fixed = heapq.heappop(queue)
        found.append(heads)
        if len(found) == k:
            break
        for m in range(fixed + 1, words + 1):
            branch = [row[:] for row in allowed]
            branch[heads[m - 1]][m] = -math.inf
            for before in range(1, m):
                for h in range(words + 1):
                    if h != heads[before - 1]:
                        branch[h][before] = -math.inf
            offer(branch, m - 1)
    return found


# Lexicographic: first as few arcs from the root as possible, then the score. What searches only compares and adds.
_Weight = tuple[int, float]


def _best_tree(scores: list[list[float]], single_root: bool) -> list[int] | None:
    """The best tree, or None."""
    n = len(scores)
    weights: dict[int, dict[int, _Weight]] = {m: {} for m in range(1, n)}
    for h in range(n):
        for m in range(1, n):
            if h != m and scores[h][m] > -math.inf:
                weights[m][h] = (-1 if single_root and h == 0 else 0, scores[h][m])
    heads = _contract(weights, n)
    if heads is None or (single_root and sum(h == 0 for h in heads.values()) != 1):
        return None
    return [heads[m] for m in range(1, n)]


def _contract(weights: dict[int, dict[int, _Weight]], fresh: int) -> dict[int, int] | None:
    """Heads of all nodes of the best tree that is rooted at 0; `fresh` is a name that no node has."""
    heads: dict[int, int] = {}
    for m, into in weights.items():
        if not into:
            return None
        heads[m] = max(into, key=into.__getitem__)
    cycle = _cycle(heads)
    if cycle is None:
        return heads
    members = set(cycle)
    smaller: dict[int, dict[int, _Weight]] = {fresh: {}}
    enters: dict[int, int] = {}
    leaves: dict[int, int] = {}
    for m, into in weights.items():
        if m in members:
            lost = into[heads[m]]
            for h, weight in into.items():
                if h not in members:
                    # What is won against the arc of the cycle that gives way.
                    gain = (weight[0] - lost[0], weight[1] - lost[1])
                    if h not in smaller[fresh] or gain > smaller[fresh][h]:
                        smaller[fresh][h], enters[h] = gain, m
            continue
        smaller[m] = {h: w for h, w in into.items() if h not in members}
        inner = [h for h in into if h in members]
        if inner:
            leaves[m] = max(inner, key=into.__getitem__)
            smaller[m][fresh] = into[leaves[m]]
    outer = _contract(smaller, fresh + 1)
    if outer is None:
        return None
    entry = outer.pop(fresh)
    result = {m: leaves[m] if h == fresh else h for m, h in outer.items()}
    result.update({m: heads[m] for m in cycle})
    result[enters[entry]] = entry
    return result


def _cycle(heads: dict[int, int]) -> list[int] | None:
    seen: dict[int, int] = {}
    for start in heads:
        node = start
        while node in heads and node not in seen:
            seen[node] = start
            node = heads[node]
        if node in heads and seen[node] == start:
            cycle = [node]
            while heads[cycle[-1]] != node:
                cycle.append(heads[cycle[-1]])
            return cycle
    return None
