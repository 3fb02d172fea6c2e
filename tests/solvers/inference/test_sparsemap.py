"""SparseMAP against the quadratic programme over all structures, and its derivatives."""

import itertools
import math
import warnings

import pytest
import torch
from scipy import stats
from torch.autograd import gradcheck, gradgradcheck

from restpoint.solvers import SolverError, quadratic_program, sparsemax
from restpoint.solvers.inference import (
    Assignments,
    DependencyTree,
    FactorGraph,
    LinearChain,
    belief_propagation,
    sparse_map,
)
from restpoint.solvers.solution import MaxStepsWarning
from tests.solvers.inference.enumeration import CASES, D

cases = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
CUBE = list(itertools.product(range(2), repeat=4))


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def optimum(matrix, squared, scores):
    """Marginals of the best mixture of the rows of `matrix`, from a quadratic programme in all of their weights."""
    rows, count = matrix * squared, len(scores)
    solution = quadratic_program(
        rows @ rows.T, -scores, -torch.eye(count, dtype=D), torch.zeros(count, dtype=D),
        torch.ones(1, count, dtype=D), torch.ones(1, dtype=D), throw=True,
    )  # fmt: skip
    return solution.value[0] @ matrix


@cases
@pytest.mark.parametrize("scale", [0.2, 1.0, 100.0])
def test_against_a_quadratic_programme_over_all_structures(case, scale):
    parts = case.parts(scale)
    d = case.distribution(parts)
    found = sparse_map(d, throw=True)
    flat = case.flat(found.marginals)
    squared = torch.cat([torch.full((p[0].numel(),), float(k in d._squared), dtype=D) for k, p in enumerate(parts)])
    for b in range(case.batch):
        matrix = case.matrix(b)
        if len(matrix) < 150:
            expected = optimum(matrix, squared, case.scores(parts, b))
            torch.testing.assert_close(flat[b], expected, rtol=0, atol=1e-11)
        # No structure would be worth more than the mixture, by the derivative of the objective.
        slope = case.flat(parts)[b] - squared * flat[b]
        assert float((matrix @ slope).max() - flat[b] @ slope) <= 1e-13 * (1 + scale)
        # The mixture is what it says.
        mixed = sum(
            found.weights[k, b] * case.row(_one(found.structures, k, b), b)
            for k in range(len(found.weights))
            if found.weights[k, b] > 0
        )
        torch.testing.assert_close(flat[b], mixed, rtol=0, atol=1e-14)
    torch.testing.assert_close(found.weights.sum(0), torch.ones(case.batch, dtype=D))


def _one(structures, k, b):
    if isinstance(structures, torch.Tensor):
        return structures[k, b]
    return type(structures)(*[s[k, b] for s in structures])


@cases
def test_derivatives_to_second_order(case):
    parts = tuple(p.requires_grad_() for p in case.parts(0.5, seed=3))

    def marginals(*parts):
        return case.flat(sparse_map(case.distribution(parts)).marginals).square()

    def objective(*parts):
        return sparse_map(case.distribution(parts)).objective

    assert gradcheck(marginals, parts, fast_mode=True)
    assert gradgradcheck(marginals, parts, fast_mode=True)
    assert gradcheck(objective, parts, fast_mode=True)
    found = sparse_map(case.distribution(parts))
    slope = torch.autograd.grad(found.objective.sum(), parts, materialize_grads=True)
    torch.testing.assert_close(case.flat(slope), case.flat(found.marginals))


@cases
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")
def test_transforms(case):
    parts, tangents = case.parts(0.5, seed=3), case.parts(seed=4)

    def total(*parts):
        return case.flat(sparse_map(case.distribution(parts)).marginals).pow(3).sum()

    points = tuple(p.clone().requires_grad_() for p in parts)
    expected = torch.autograd.grad(total(*points), points, materialize_grads=True)
    order = tuple(range(len(parts)))
    found = torch.func.grad(total, argnums=order)(*parts)
    torch.testing.assert_close(found, expected)
    _, along = torch.func.jvp(total, parts, tangents)
    torch.testing.assert_close(along, sum((g * t).sum() for g, t in zip(expected, tangents, strict=True)))


def test_vmap_is_a_loop_over_examples():
    transitions, lengths = random(3, 3, seed=1), torch.tensor([4, 2])

    def chain(unary):
        return sparse_map(LinearChain(transitions, unary, lengths), throw=True).marginals.states

    def tree(arcs):
        return sparse_map(DependencyTree(arcs, lengths, projective=False)).marginals

    def graph(tables):
        return sparse_map(FactorGraph([2] * 3, [(0, 1), (1, 2), (0, 2)], list(tables))).marginals.variables

    for function, given in ((chain, random(3, 2, 4, 3)), (tree, random(3, 2, 5, 5)), (graph, random(4, 3, 2, 2, 2))):
        together = torch.func.vmap(function)(given)
        torch.testing.assert_close(together, torch.stack([function(x) for x in given]), rtol=0, atol=1e-14)
    with pytest.warns(MaxStepsWarning, match="6 of 6"):
        torch.func.vmap(lambda x: sparse_map(LinearChain(unary=x), max_steps=1).objective)(random(3, 2, 4, 3))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")
def test_jacobians_and_hessians():
    transitions, given = random(3, 3, seed=1), random(2, 4, 3)

    def marginals(unary):
        return sparse_map(LinearChain(transitions, unary.unsqueeze(0))).marginals.states[0]

    def objective(unary):
        return sparse_map(LinearChain(transitions, unary.unsqueeze(0))).objective[0]

    expected = torch.stack([torch.autograd.functional.jacobian(marginals, x) for x in given])
    for transform in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(torch.func.vmap(transform(marginals))(given), expected, rtol=0, atol=1e-14)
    # The objective's gradient is the marginals.
    torch.testing.assert_close(torch.func.vmap(torch.func.hessian(objective))(given), expected, rtol=0, atol=1e-14)


def test_a_chain_of_one_position_is_sparsemax():
    scores = random(6, 1, 9)
    found = sparse_map(LinearChain(unary=scores))
    torch.testing.assert_close(found.marginals.states[:, 0], sparsemax(scores[:, 0]), rtol=0, atol=1e-14)


def test_excluded_parts_stay_out():
    unary = random(2, 5, 4)
    unary[:, 2, 1:] = -math.inf
    potentials = 0.2 * random(2, 4, 4, 4)
    potentials[:, :, 0, 0] = -math.inf
    unary.requires_grad_()
    found = sparse_map(LinearChain(potentials, unary), throw=True)
    assert (found.marginals.states[:, 2, 1:] == 0).all()
    assert (found.marginals.transitions[:, :, 0, 0] == 0).all()
    (slope,) = torch.autograd.grad(found.marginals.states.square().sum(), unary)
    assert slope.isfinite().all()
    with pytest.raises(ValueError, match="no structure to sample 1"):
        sparse_map(LinearChain(unary=torch.tensor([[[0.0]], [[-math.inf]]])))


@pytest.mark.parametrize("scale", [0.3, 1.0, 1000.0])
def test_long_chains_in_float32(scale):
    potentials, unary = (scale * random(*s).float() for s in [(3, 39, 6, 6), (3, 40, 6)])
    found = sparse_map(LinearChain(potentials, unary, torch.tensor([40, 1, 23])), throw=True)
    wide = sparse_map(LinearChain(potentials.double(), unary.double(), torch.tensor([40, 1, 23])), throw=True)
    assert found.marginals.states.dtype == torch.float32
    torch.testing.assert_close(found.marginals.states.double(), wide.marginals.states, rtol=0, atol=2e-3)
    torch.testing.assert_close(wide.marginals.states.sum(2)[0], torch.ones(40, dtype=D), rtol=0, atol=1e-12)


def test_samples_do_not_see_one_another():
    arcs = random(4, 7, 7)
    together = sparse_map(DependencyTree(arcs, projective=False))
    for b in range(4):
        alone = sparse_map(DependencyTree(arcs[b : b + 1], projective=False))
        torch.testing.assert_close(together.marginals[b], alone.marginals[0], rtol=0, atol=1e-13)
        assert together.solution.stats.steps[b] == alone.solution.stats.steps[0]


def test_too_few_steps_are_told():
    chain = LinearChain(unary=0.1 * random(3, 6, 5))
    with pytest.warns(MaxStepsWarning, match="sparse_map"):
        found = sparse_map(chain, max_steps=3)
    assert not found.converged.any()
    with pytest.raises(SolverError):
        sparse_map(chain, max_steps=3, throw=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparse_map(chain, max_steps=3, throw=False)


class TestFactorGraphs:
    """A cycle of four variables with a factor of three."""

    @staticmethod
    def graph(scale=1.0, seed=0):
        scopes = [(0,), (1,), (2,), (3,), (0, 1), (1, 2), (2, 3), (3, 0), (0, 1, 3)]
        tables = [scale * random(2, *(2,) * len(s), seed=seed + i) for i, s in enumerate(scopes)]
        return scopes, tables

    @pytest.mark.parametrize("scale", [0.1, 0.5, 2.0])
    def test_against_a_quadratic_programme(self, scale):
        scopes, tables = self.graph(scale)
        found = sparse_map(FactorGraph([2] * 4, scopes, tables), throw=True)
        matrix = torch.tensor([[float(x[v] == s) for v in range(4) for s in range(2)] for x in CUBE], dtype=D)
        for b in range(2):
            scores = torch.stack([sum(t[b][tuple(x[v] for v in s)] for s, t in zip(scopes, tables)) for x in CUBE])
            expected = optimum(matrix, 1.0, scores)
            torch.testing.assert_close(found.marginals.variables[b].flatten(), expected, rtol=0, atol=1e-11)

    def test_structures_beyond_the_affine_hull(self):
        # Only factors tell apart what a square over variables cannot: sixteen corners of a four-dimensional cube.
        scopes, tables = self.graph(0.02, seed=7)
        for table in tables[:4]:
            table.zero_()
        found = sparse_map(FactorGraph([2] * 4, scopes, tables), throw=True)
        assert ((found.weights > 0).sum(0) <= 5).all()

    def test_derivatives(self):
        scopes, tables = self.graph(0.3)
        tables = [t.requires_grad_() for t in tables]

        def marginals(*tables):
            return sparse_map(FactorGraph([2] * 4, scopes, tables)).marginals.variables

        assert gradcheck(marginals, tables, fast_mode=True)

    def test_exact_inference(self):
        scopes, tables = self.graph()
        exact = Assignments(FactorGraph([2] * 4, scopes, tables))
        for b in range(2):
            scores = torch.stack([sum(t[b][tuple(x[v] for v in s)] for s, t in zip(scopes, tables)) for x in CUBE])
            p = scores.softmax(0)
            torch.testing.assert_close(exact.log_partition[b], scores.logsumexp(0), rtol=1e-13, atol=0)
            torch.testing.assert_close(exact.entropy[b], -(p * p.log()).sum(), rtol=1e-12, atol=0)
            assert exact.argmax[b].tolist() == list(CUBE[int(scores.argmax())])
            best = scores.topk(5)
            structures, log_prob = exact.kbest(5)
            assert structures[:, b].tolist() == [list(CUBE[i]) for i in best.indices]
            torch.testing.assert_close(log_prob[:, b], best.values - scores.logsumexp(0))
            for v, s in itertools.product(range(4), range(2)):
                expected = sum(q for q, x in zip(p, CUBE) if x[v] == s)
                torch.testing.assert_close(exact.marginals.variables[b, v, s], expected)
            torch.testing.assert_close(exact.log_prob(torch.tensor([CUBE[3]] * 2))[b], p[3].log())
        torch.testing.assert_close(exact.marginals.factors[1].flatten(2).sum(2), torch.ones(2, 1, dtype=D))

    def test_samples_and_divergence(self):
        scopes, tables = self.graph()
        exact = Assignments(FactorGraph([2] * 4, scopes, tables))
        other = [random(*t.shape, seed=9 + i) for i, t in enumerate(tables)]
        divergence = exact.kl(Assignments(FactorGraph([2] * 4, scopes, other)))
        samples = exact.sample(4000, torch.Generator().manual_seed(0))
        for b in range(2):
            p, q = (
                torch.stack([sum(t[b][tuple(x[v] for v in s)] for s, t in zip(scopes, ts)) for x in CUBE]).log_softmax(
                    0
                )
                for ts in (tables, other)
            )
            torch.testing.assert_close(divergence[b], (p.exp() * (p - q)).sum(), rtol=1e-12, atol=1e-13)
            drawn = torch.tensor([CUBE.index(tuple(row)) for row in samples[:, b].tolist()])
            observed, expected = torch.bincount(drawn, minlength=len(CUBE)).double(), 4000 * p.exp()
            rare = expected < 5
            observed, expected = (torch.cat([x[~rare], x[rare].sum().reshape(1)]) for x in (observed, expected))
            keep = expected > 0
            assert stats.chisquare(observed[keep], expected[keep]).pvalue > 1e-3

    def test_trees_agree_with_belief_propagation(self):
        edges = [(0, 1), (1, 2), (1, 3), (3, 4)]
        graph = FactorGraph.pairwise(random(3, 5, 3), edges, random(3, 4, 3, 3, seed=1))
        exact, beliefs = Assignments(graph), belief_propagation(graph, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(beliefs.variables, exact.marginals.variables, rtol=0, atol=1e-9)
        torch.testing.assert_close(beliefs.factors[0], exact.marginals.factors[0], rtol=0, atol=1e-9)
        torch.testing.assert_close(beliefs.log_partition, exact.log_partition, rtol=0, atol=1e-9)

    def test_bad_input(self):
        pairs = list(itertools.combinations(range(9), 2))
        dense = FactorGraph.pairwise(random(1, 9, 6), pairs, random(1, len(pairs), 6, 6))
        with pytest.raises(ValueError, match="joins 9 variables of 6 states"):
            sparse_map(dense)
        small = Assignments(FactorGraph([2, 3], [(0, 1)], [random(1, 2, 3)]))
        with pytest.raises(ValueError, match="expected 0 to 1"):
            small.log_prob(torch.tensor([[2, 0]]))
        with pytest.raises(ValueError, match=r"shape \(1, 2\)"):
            small.log_prob(torch.tensor([[0, 0, 0]]))
