"""Belief propagation and mean field against enumeration, closed forms and unrolling."""

import itertools
import math

import pytest
import torch

from restpoint.solvers import Picard, Status, UnrollAdjoint
from restpoint.solvers.inference import FactorGraph, LinearChain, belief_propagation, mean_field
from restpoint.solvers.solution import MaxStepsWarning, SolverError

D = torch.float64
TIGHT = {"rtol": 1e-13, "atol": 1e-14, "max_steps": 500}


def random(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def enumerate_graph(cardinalities, scopes, tables):
    """Log-partition and marginals of the variables."""
    states = list(itertools.product(*[range(c) for c in cardinalities]))
    scores = torch.stack([sum(t[(slice(None), *[x[v] for v in s])] for s, t in zip(scopes, tables)) for x in states], 1)
    p = scores.softmax(1)
    marginals = torch.zeros(len(scores), len(cardinalities), max(cardinalities), dtype=D)
    for i, x in enumerate(states):
        for v, value in enumerate(x):
            marginals[:, v, value] += p[:, i]
    return scores.logsumexp(1), marginals


def tree_of_factors(seed=0):
    """Variables of 2, 3 and 4 states, factors of one to three variables, no loop."""
    cardinalities = (2, 3, 4, 2, 3)
    scopes = [(0,), (0, 1, 2), (2, 3), (4, 3), (1,), (4,)]
    tables = [random(2, *[cardinalities[v] for v in s], seed=seed + i) for i, s in enumerate(scopes)]
    return cardinalities, scopes, tables


def loop(scale=0.5, batch=2, seed=0):
    edges = [(0, 1), (1, 2), (2, 3), (3, 0), (0, 2)]
    return random(batch, 4, 3, seed=seed), edges, random(batch, len(edges), 3, 3, seed=seed + 1, scale=scale)


class TestBeliefPropagation:
    @pytest.mark.parametrize("scale", [1.0, 20.0, 1000.0])
    def test_exact_on_trees(self, scale):
        cardinalities, scopes, tables = tree_of_factors()
        tables = [scale * t for t in tables]
        beliefs = belief_propagation(FactorGraph(cardinalities, scopes, tables), solver=Picard(), **TIGHT)
        value, marginals = enumerate_graph(cardinalities, scopes, tables)
        assert beliefs.converged.all()
        torch.testing.assert_close(beliefs.variables, marginals, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(beliefs.log_partition, value, rtol=1e-12, atol=1e-11)

    def test_exact_where_assignments_are_excluded(self):
        cardinalities, scopes, tables = tree_of_factors()
        tables[1][:, 0, 1] = tables[1][:, 1, :, 2] = tables[2][0, 3, 1] = tables[5][:, 0] = -math.inf
        beliefs = belief_propagation(FactorGraph(cardinalities, scopes, tables), solver=Picard(), **TIGHT)
        value, marginals = enumerate_graph(cardinalities, scopes, tables)
        torch.testing.assert_close(beliefs.variables, marginals, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(beliefs.log_partition, value, rtol=1e-12, atol=1e-11)

    def test_chain_and_its_derivatives(self):
        unary, edges = random(2, 4, 3).requires_grad_(), random(2, 3, 3, 3, seed=1).requires_grad_()
        graph = FactorGraph.pairwise(unary, [(0, 1), (1, 2), (2, 3)], edges)
        beliefs = belief_propagation(graph, **TIGHT)
        exact = LinearChain(edges, unary).marginals
        torch.testing.assert_close(beliefs.variables, exact.states, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(beliefs.factors[0], exact.transitions, rtol=1e-11, atol=1e-11)
        probe = random(2, 4, 3, seed=5)
        ours, theirs = (
            torch.autograd.grad((m * probe).sum(), (unary, edges)) for m in (beliefs.variables, exact.states)
        )
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)

    def test_derivatives_on_a_loopy_graph(self):
        unary, edges, potentials = loop()
        potentials.requires_grad_()
        probe = random(2, 4, 3, seed=5)

        def gradient(**options):
            graph = FactorGraph.pairwise(unary, edges, potentials)
            value = (belief_propagation(graph, **options).variables * probe).sum()
            return torch.autograd.grad(value, potentials)[0]

        unrolled = gradient(adjoint=UnrollAdjoint(), rtol=0.0, atol=0.0, max_steps=80, throw=False)
        torch.testing.assert_close(gradient(**TIGHT), unrolled, rtol=1e-7, atol=1e-9)

    def test_beliefs_are_the_derivative_of_the_log_partition(self):
        unary, edges, potentials = loop()
        unary.requires_grad_(), potentials.requires_grad_()
        beliefs = belief_propagation(FactorGraph.pairwise(unary, edges, potentials), **TIGHT)
        of_unary, of_pairs = torch.autograd.grad(beliefs.log_partition.sum(), (unary, potentials))
        torch.testing.assert_close(of_unary, beliefs.variables.detach(), rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(of_pairs, beliefs.factors[0].detach(), rtol=1e-8, atol=1e-9)

    def test_marginals_of_factors_agree_with_those_of_variables(self):
        unary, edges, potentials = loop()
        beliefs = belief_propagation(FactorGraph.pairwise(unary, edges, potentials), **TIGHT)
        for e, (a, b) in enumerate(edges):
            pair = beliefs.factors[0][:, e]
            torch.testing.assert_close(pair.sum(2), beliefs.variables[:, a], rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(pair.sum(1), beliefs.variables[:, b], rtol=1e-9, atol=1e-9)

    def test_no_convergence_is_said_per_sample(self):
        """A frustrated loop with strong couplings; the other sample is an easy one and stays what it is alone."""
        unary, edges = random(2, 4, 3), list(itertools.combinations(range(4), 2))
        potentials = random(2, 6, 3, 3, seed=2, scale=0.5)
        potentials[0] *= 20
        graph = FactorGraph.pairwise(unary, edges, potentials)
        with pytest.warns(MaxStepsWarning, match=r"1 of 2 samples did not converge\. The worst, sample 0"):
            beliefs = belief_propagation(graph, solver=Picard(), max_steps=40)
        assert beliefs.converged.tolist() == [False, True]
        assert beliefs.solution.stats.status[0] == Status.MAX_STEPS
        assert beliefs.solution.stats.residual[0] > 1e-3
        assert belief_propagation(graph).converged.all(), "damping helps here"
        alone = FactorGraph.pairwise(unary[1:], edges, potentials[1:])
        torch.testing.assert_close(
            belief_propagation(alone, solver=Picard(), max_steps=40).variables, beliefs.variables[1:]
        )
        with pytest.raises(SolverError):
            belief_propagation(graph, solver=Picard(), max_steps=40, throw=True)


class TestMeanField:
    def test_bounds_the_log_partition(self):
        cardinalities, scopes, tables = tree_of_factors()
        value, _ = enumerate_graph(cardinalities, scopes, tables)
        beliefs = mean_field(FactorGraph(cardinalities, scopes, tables), **TIGHT)
        assert (beliefs.log_partition < value).all()
        assert (beliefs.log_partition > value - 3).all()
        torch.testing.assert_close(beliefs.variables.sum(2), torch.ones(2, 5, dtype=D))
        assert (beliefs.variables[:, 0, 2:] == 0).all()

    def test_exact_where_factors_do_not_couple(self):
        unary, edges, _ = loop()
        left, right = random(2, 5, 3, 1, seed=3), random(2, 5, 1, 3, seed=4)
        beliefs = mean_field(FactorGraph.pairwise(unary, edges, left + right), **TIGHT)
        total = unary.clone()
        for e, (a, b) in enumerate(edges):
            total[:, a] += left[:, e, :, 0]
            total[:, b] += right[:, e, 0]
        torch.testing.assert_close(beliefs.variables, total.softmax(2), rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(beliefs.log_partition, total.logsumexp(2).sum(1), rtol=1e-11, atol=1e-12)

    def test_derivative_of_the_bound(self):
        """At an optimum of the bound its derivative is the beliefs; and derivatives of beliefs agree with unrolling."""
        unary, edges, potentials = loop()
        unary[0, 0, 1] = -math.inf
        potentials.requires_grad_()
        graph = FactorGraph.pairwise(unary, edges, potentials)
        beliefs = mean_field(graph, **TIGHT)
        (gradient,) = torch.autograd.grad(beliefs.log_partition.sum(), potentials, retain_graph=True)
        torch.testing.assert_close(gradient, beliefs.factors[0].detach(), rtol=1e-8, atol=1e-9)
        probe = random(2, 4, 3, seed=5)
        unrolled = mean_field(graph, adjoint=UnrollAdjoint(), rtol=0.0, atol=0.0, max_steps=100, throw=False)
        first, second = (torch.autograd.grad((b.variables * probe).sum(), potentials)[0] for b in (beliefs, unrolled))
        torch.testing.assert_close(first, second, rtol=1e-7, atol=1e-9)

    def test_excluded_combinations(self):
        unary, edges, potentials = loop()
        potentials[0, 0, 0, 0] = -math.inf
        with pytest.raises(ValueError, match="excludes combinations by minus infinity"):
            mean_field(FactorGraph.pairwise(unary, edges, potentials))


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: FactorGraph((2, 2), [(0, 2)], [random(1, 2, 2)]), r"scopes\[0\]: expected variables from 0 to 1"),
        (lambda: FactorGraph((2, 2), [(1, 1)], [random(1, 2, 2)]), r"scopes\[0\]: expected different variables"),
        (lambda: FactorGraph((2, 2), [()], [random(1)]), r"scopes\[0\]: expected different variables"),
        (lambda: FactorGraph((2, 3), [(0, 1)], [random(1, 3, 2)]), r"tables\[0\]: expected shape \(batch, 2, 3\), got"),
        (lambda: FactorGraph((2, 3), [(0, 1)], []), "expected a table for every scope, and at least one; got 0 for 1"),
        (lambda: FactorGraph((2, 0), [(0,)], [random(1, 2)]), r"cardinalities\[1\] must be an integer of at least 1"),
        (
            lambda: FactorGraph((2, 2), [(0,), (0, 1)], [random(1, 2), random(2, 2, 2)]),
            r"tables\[1\]: expected shape \(1, 2, 2\), got \(2, 2, 2\)",
        ),
        (
            lambda: FactorGraph((2, 2), [(0,), (0, 1)], [random(1, 2), random(1, 2, 2).float()]),
            r"tables\[1\]: expected torch.float64",
        ),
        (lambda: FactorGraph((2, 2), [(0, 1)], [torch.full((1, 2, 2), math.nan)]), r"tables\[0\]: the entry"),
        (lambda: FactorGraph.pairwise(random(1, 2, 2), [(0, 1, 0)], random(1, 1, 2, 2)), "expected different"),
        (lambda: FactorGraph.pairwise(random(1, 2, 2), [(0,)], random(1, 1, 2, 2)), "expected two variables"),
        (lambda: belief_propagation(FactorGraph((2,), [(0,)], [random(1, 2)])), "no factor of two variables"),
        (
            lambda: FactorGraph((2, 2), [(0, 1), (0,)], [torch.eye(2).log()[None], torch.full((1, 2), -math.inf)]),
            "leave no state to variable 0 of sample 0",
        ),
    ],
)
def test_bad_graphs(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_edges_and_scopes_as_tensors():
    unary, edges, potentials = loop()
    as_lists, as_tensor = (FactorGraph.pairwise(unary, e, potentials) for e in (edges, torch.tensor(edges)))
    assert torch.equal(as_lists.groups[0].scopes, as_tensor.groups[0].scopes)
    tables = [unary[:, 0], potentials[:, 0]]
    as_lists, as_tensors = (
        FactorGraph((3, 3), s, tables) for s in ([(0,), (0, 1)], [torch.tensor([0]), torch.arange(2)])
    )
    assert torch.equal(as_lists.groups[0].scopes, as_tensors.groups[0].scopes)


def test_states_that_exclude_one_another():
    """x = y and y = z leave nothing if x is 0 and z is 1: found before any message is sent."""
    same = torch.eye(2, dtype=D).log()[None]
    first, last = torch.tensor([[0.0, -math.inf]], dtype=D), torch.tensor([[-math.inf, 0.0]], dtype=D)
    with pytest.raises(ValueError, match="leave no state to variable"):
        FactorGraph((2, 2, 2), [(0, 1), (1, 2), (0,), (2,)], [same, same, first, last])
