"""Segmentations, trees and alignments where the answer is known at larger sizes, and structures that are none."""

import math

import networkx
import pytest
import torch

from restpoint.solvers.inference import Alignment, Constituency, DependencyTree, Segmentation, SemiMarkov

D = torch.float64


def random(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def counted(distribution):
    return round(math.exp(float(distribution.log_partition[0])))


class TestCounts:
    """With all potentials zero the partition function counts."""

    def test_spanning_trees(self):
        n = 9
        zero = torch.zeros(1, n + 1, n + 1, dtype=D)
        assert counted(DependencyTree(zero, projective=False, single_root=False)) == (n + 1) ** (n - 1)
        assert counted(DependencyTree(zero, projective=False)) == n ** (n - 1)

    def test_projective_trees(self):
        # Yuret 1998: binomial(3 n, n) / (2 n + 1) trees over n + 1 words with the root at one end.
        n = 8
        zero = torch.zeros(1, n + 1, n + 1, dtype=D)
        assert counted(DependencyTree(zero, single_root=False)) == math.comb(3 * n, n) // (2 * n + 1)

    def test_binary_trees(self):
        n = 9
        assert counted(Constituency(torch.zeros(1, n, n, 1, dtype=D))) == math.comb(2 * n - 2, n - 1) // n

    def test_segmentations(self):
        assert counted(SemiMarkov(torch.zeros(1, 12, 12, 1, dtype=D))) == 2**11
        assert counted(SemiMarkov(torch.zeros(1, 10, 2, 1, dtype=D))) == 89

    def test_alignments(self):
        # The central Delannoy number of 5.
        assert counted(Alignment(torch.zeros(1, 6, 6, 3, dtype=D))) == 1683

    def test_monotone_alignments(self):
        assert counted(Alignment.monotone(torch.zeros(1, 9, 4, dtype=D))) == math.comb(8, 3)


class TestSpanningTrees:
    @pytest.mark.parametrize("scale", [1.0, 30.0])
    def test_log_partition_is_a_determinant(self, scale):
        potentials = random(2, 8, 8, scale=scale)
        value = DependencyTree(potentials, projective=False, single_root=False).log_partition
        for b in range(2):
            weights = potentials[b].exp().fill_diagonal_(0.0)
            laplacian = (torch.diag(weights[:, 1:].sum(0)) - weights[1:, 1:]) if scale == 1 else None
            if laplacian is not None:
                torch.testing.assert_close(value[b], torch.linalg.slogdet(laplacian)[1], rtol=1e-12, atol=1e-12)
        assert torch.isfinite(value).all()

    @pytest.mark.parametrize("seed", range(4))
    def test_best_tree_as_networkx_finds_it(self, seed):
        n = 9
        potentials = random(1, n + 1, n + 1, seed=seed)
        heads = DependencyTree(potentials, projective=False, single_root=False).argmax[0].tolist()
        graph = networkx.DiGraph()
        for h in range(n + 1):
            for m in range(1, n + 1):
                if h != m:
                    graph.add_edge(h, m, weight=float(potentials[0, h, m]))
        best = networkx.maximum_spanning_arborescence(graph)
        assert sorted(best.edges) == sorted((h, m) for m, h in enumerate(heads, 1))

    def test_where_a_determinant_of_exponentials_cancels(self):
        """Two words prefer each other by e^80: the weight of the trees is below rounding of that of the cycle."""
        potentials = torch.zeros(1, 3, 3, dtype=D)
        potentials[0, 1, 2] = potentials[0, 2, 1] = 80.0
        tree = DependencyTree(potentials, projective=False)
        torch.testing.assert_close(tree.log_partition, torch.tensor([80.0 + math.log(2)], dtype=D), rtol=1e-14, atol=0)
        torch.testing.assert_close(tree.entropy, torch.tensor([math.log(2)], dtype=D), rtol=1e-13, atol=0)

    def test_one_root_where_most_weight_has_two(self):
        potentials = torch.zeros(1, 3, 3)
        potentials[0, 0, 1:] = 60.0
        tree = DependencyTree(potentials, projective=False)
        assert tree.marginals[0, 0].sum() == pytest.approx(1.0, abs=1e-5)
        assert (tree.argmax == 0).sum() == 1


def test_monotone_alignment_of_frames():
    scores = random(2, 6, 3)
    lengths = torch.tensor([[6, 3], [4, 2]])
    alignment = Alignment.monotone(scores, lengths)
    owner = alignment.marginals[:, 1:, 1:].sum(-1)
    torch.testing.assert_close(owner[0].sum(1), torch.ones(6, dtype=D))
    torch.testing.assert_close(owner[1].sum(1), torch.tensor([1.0, 1, 1, 1, 0, 0], dtype=D))
    assert owner[0, 0, 0] == pytest.approx(1.0)
    assert owner[1, 3, 1] == pytest.approx(1.0)
    with pytest.raises(ValueError, match="leave no structure to sample 0"):
        Alignment.monotone(random(1, 2, 3)).marginals


def test_edit_distance():
    """The best alignment of a large scale is the edit distance."""
    a, b = "kitten", "sitting"
    cost = torch.full((1, len(a) + 1, len(b) + 1, 3), -1.0, dtype=D)
    for i, x in enumerate(a, 1):
        for j, y in enumerate(b, 1):
            cost[0, i, j, 0] = 0.0 if x == y else -1.0
    alignment = Alignment(cost)
    assert float(alignment.log_prob(alignment.argmax) + alignment.log_partition) == pytest.approx(-3.0)
    sharp = Alignment(1e4 * cost)
    assert float(sharp.log_partition) == pytest.approx(-3e4, abs=10)


def tree(projective=True):
    return DependencyTree(random(2, 4, 4), projective=projective)


def segments():
    return SemiMarkov(random(1, 4, 2, 2))


@pytest.mark.parametrize(
    "distribution, structure, message",
    [
        (tree(), torch.tensor([[0, 1, 2], [2, 1, 0]]), "sample 1 is not a structure of this DependencyTree"),
        (tree(False), torch.tensor([[0, 1, 2], [2, 1, 0]]), "sample 1 is not a structure of this DependencyTree"),
        (tree(False), torch.tensor([[0, 1, 0], [0, 1, 1]]), "sample 0 is not a structure"),
        (tree(), torch.tensor([[0, 1, 2], [0, 4, 1]]), r"the head at \(1, 1\) is 4; expected 0 for the root to 3"),
        (tree(), torch.zeros(2, 4, dtype=torch.int64), "expected heads of shape"),
        (segments(), torch.zeros(1, 4), "expected a Segmentation"),
        (
            segments(),
            Segmentation(torch.tensor([[0, 0, 0, 1]]), torch.tensor([[True, False, False, True]])),
            "the segment of sample 0 from 0 to 2 is longer than 2",
        ),
        (
            segments(),
            Segmentation(torch.tensor([[0, 0, 0, 1]]), torch.tensor([[False, True, False, True]])),
            "starts at 1 and not at 0",
        ),
        (Constituency(random(1, 3, 3, 2)), torch.full((1, 3, 3), 2), r"the entry \(0, 0, 0\) is 2; expected -1 to 1"),
        (Constituency(random(1, 3, 3, 2)), torch.zeros(1, 3, 3, dtype=torch.int64), "sample 0 is not a structure"),
        (Alignment(random(1, 3, 3, 3)), torch.full((1, 3, 3), -1), "sample 0 is not a structure"),
        (Alignment(random(1, 3, 3, 3)), torch.full((1, 3), -1), "expected the moves into nodes of shape"),
    ],
)
def test_structures_that_are_none(distribution, structure, message):
    with pytest.raises(ValueError, match=message):
        distribution.log_prob(structure)


@pytest.mark.parametrize(
    "build, message",
    [
        (
            lambda: DependencyTree(random(2, 4, 5)),
            r"expected shape \(batch, length \+ 1, length \+ 1\), got \(2, 4, 5\)",
        ),
        (lambda: DependencyTree(random(2, 1, 1)), "expected a root and at least one word"),
        (lambda: SemiMarkov(random(2, 4, 3, 2), random(3, 3)), r"transitions: expected shape \(2, 3, 2, 2\), got"),
        (lambda: Alignment(random(2, 4, 4, 2)), r"expected shape \(batch, n \+ 1, m \+ 1, 3\), got"),
        (lambda: Alignment(random(2, 1, 4, 3)), "expected n and m of at least 1"),
        (lambda: Alignment(random(1, 4, 4, 3), torch.tensor([[4, 3]])), "sample 0 has length 4; expected at least 1"),
        (lambda: tree().kl(tree(False)), "kl: expected another DependencyTree of the same kind"),
        (lambda: tree().kl(segments()), "kl: expected another DependencyTree"),
    ],
)
def test_bad_input(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_masks_that_leave_nothing():
    mask = torch.ones(2, 4, 4, dtype=torch.bool)
    mask[1, :, 2] = False
    for projective in (True, False):
        with pytest.raises(ValueError, match="leave no structure to sample 1"):
            DependencyTree(random(2, 4, 4), mask=mask, projective=projective).log_partition
    with pytest.raises(ValueError, match="leave no structure to sample 0"):
        Constituency(random(1, 3, 3, 1), mask=torch.zeros(1, 1, 1, 1, dtype=torch.bool)).log_partition
