"""Structured attention, exponential families and message passing, on the public interface."""

import itertools

import torch

from restpoint.models import StructuredAttention
from restpoint.solvers import UnrollAdjoint, root
from restpoint.solvers.inference import (
    DependencyTree,
    FactorGraph,
    Gamma,
    HiddenMarkov,
    LinearChain,
    belief_propagation,
)
from tests.systems.test_examples import load

D = torch.float64


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


class TestStructuredAttention:
    """Marginals of HMM, linear-chain CRF and trees."""

    def test_chain_against_enumeration(self):
        potentials, unary = random(1, 3, 3, 3), random(1, 4, 3, seed=1)
        paths = torch.tensor(list(itertools.product(range(3), repeat=4)))
        t = torch.arange(3)
        scores = potentials[0, t, paths[:, :-1], paths[:, 1:]].sum(1) + unary[0, torch.arange(4), paths].sum(1)
        expected = (scores.softmax(0)[:, None, None] * torch.nn.functional.one_hot(paths, 3)).sum(0)
        torch.testing.assert_close(LinearChain(potentials, unary).marginals.states[0], expected, rtol=0, atol=1e-12)

    def test_hidden_markov_posterior_against_enumeration(self):
        initial, transition, emission = (
            random(*s, seed=i).log_softmax(-1) for i, s in enumerate([(2,), (2, 2), (2, 3)])
        )
        symbols = torch.tensor([[0, 2, 1]])
        paths = torch.tensor(list(itertools.product(range(2), repeat=3)))
        scores = initial[paths[:, 0]] + transition[paths[:, :-1], paths[:, 1:]].sum(1) + emission[paths, symbols].sum(1)
        model = HiddenMarkov(initial, transition, emission, symbols)
        torch.testing.assert_close(model.log_partition[0], scores.logsumexp(0), rtol=0, atol=1e-12)
        expected = (scores.softmax(0)[:, None, None] * torch.nn.functional.one_hot(paths, 2)).sum(0)
        torch.testing.assert_close(model.marginals.states[0], expected, rtol=0, atol=1e-12)

    def test_tree_against_enumeration(self):
        potentials = random(1, 4, 4)
        for projective in (True, False):
            total = torch.zeros(4, 4, dtype=D)
            for heads in itertools.product(range(4), repeat=3):
                if heads.count(0) != 1 or not _reaches_root(heads) or (projective and _crosses(heads)):
                    continue
                arcs = list(heads), [1, 2, 3]
                total[arcs] += potentials[0][arcs].sum().exp()
            marginals = DependencyTree(potentials, projective=projective).marginals[0]
            torch.testing.assert_close(marginals, total / total[:, 1].sum(), rtol=0, atol=1e-12)

    def test_optimum_over_the_marginal_polytope_is_forward_backward(self):
        """Marginals maximise <theta, mu> + H(mu) over a chain's polytope; the IFT differentiates its KKT system."""
        potentials, unary = random(1, 2, 2, 2).requires_grad_(), random(1, 3, 2, seed=1).requires_grad_()

        def lagrangian(x, potentials, unary):
            pairs, single = x[:, :8].exp().reshape(-1, 2, 2, 2), x[:, 8:14].exp().reshape(-1, 3, 2)
            entropy = -(pairs * pairs.log()).sum((1, 2, 3)) + (single[:, 1] * single[:, 1].log()).sum(1)
            energy = (potentials * pairs).sum((1, 2, 3)) + (unary * single).sum((1, 2))
            broken = torch.cat(
                [
                    (pairs.sum(3) - single[:, :-1]).flatten(1),
                    (pairs.sum(2) - single[:, 1:]).flatten(1),
                    single[:, 0].sum(1, keepdim=True) - 1,
                ],
                1,
            )
            return energy + entropy + (x[:, 14:] * broken).sum(1)

        def stationarity(x, *theta):
            with torch.enable_grad():
                x = x if x.requires_grad else x.detach().requires_grad_()
                slope = torch.autograd.grad(lagrangian(x, *theta).sum(), x, create_graph=True)[0]
                # With respect to the marginals, and not to their logarithms, which would add solutions at zero.
                return torch.cat([slope[:, :14] / x[:, :14].exp(), slope[:, 14:]], 1)

        start = torch.cat([torch.full((1, 8), 0.25).log(), torch.full((1, 6), 0.5).log(), torch.zeros(1, 9)], 1).to(D)
        solution = root(stationarity, start, (potentials, unary), rtol=1e-13, atol=1e-13, max_steps=100, throw=True)
        single = solution.value[:, 8:14].exp().reshape(1, 3, 2)
        exact = LinearChain(potentials, unary).marginals.states
        torch.testing.assert_close(single, exact, rtol=0, atol=1e-11)
        probe = random(1, 3, 2, seed=2)
        ours, theirs = (torch.autograd.grad((m * probe).sum(), (potentials, unary)) for m in (single, exact))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-9)

    def test_a_layer_that_trains(self):
        """Every position is asked for the value of the one before it, to which a tree's arcs have to lead."""
        torch.manual_seed(0)
        attention = StructuredAttention(16, 1, vdim=4, batch_first=True, structure="projective-tree")
        places, head = torch.nn.Parameter(torch.randn(1, 6, 16)), torch.nn.Linear(16, 4)
        optimizer = torch.optim.Adam([*attention.parameters(), places, *head.parameters()], 0.02)
        losses = []
        for _ in range(60):
            labels = torch.randint(4, (16, 6))
            keys = places.expand(16, 6, 16)
            output, weights = attention(keys, keys, torch.nn.functional.one_hot(labels, 4).float())
            loss = torch.nn.functional.cross_entropy(head(output[:, 1:]).flatten(0, 1), labels[:, :-1].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < 0.3 < 1 < losses[0]
        assert weights.detach().mean(0)[1:].argmax(1).tolist() == [0, 1, 2, 3, 4]

    def test_the_example_and_its_picture(self, tmp_path):
        example = load("structured_attention")
        errors = example.errors()
        assert len(errors) == 5
        assert all(error < 1e-12 for error in errors.values()), errors
        example.draw(str(tmp_path / "marginals.png"))
        assert (tmp_path / "marginals.png").stat().st_size > 10_000


class TestExponentialFamilies:
    def test_canonical_to_mean_and_back(self):
        family, theta = Gamma(), torch.tensor([[1.5, -0.7], [-0.3, -2.0]], dtype=D).requires_grad_()
        mean = family.mean(theta)
        (gradient,) = torch.autograd.grad(family.log_partition(theta).sum(), theta)
        torch.testing.assert_close(mean.detach(), gradient, rtol=0, atol=1e-14)
        torch.testing.assert_close(family.canonical(mean), theta, rtol=1e-10, atol=1e-10)
        samples = torch.distributions.Gamma(theta.detach()[:, 0] + 1, -theta.detach()[:, 1]).sample((100_000,))
        statistics = torch.stack([samples.log(), samples], 2)
        for row in range(2):
            torch.testing.assert_close(family.covariance(theta)[row], statistics[:, row].T.cov(), rtol=0.05, atol=0.01)


class TestMessagePassing:
    def test_loopy_belief_propagation_as_long_unrolling(self):
        edges = [(0, 1), (1, 2), (2, 0)]
        unary, potentials = random(1, 3, 2), (0.5 * random(1, 3, 2, 2, seed=1)).requires_grad_()
        graph = FactorGraph.pairwise(unary, edges, potentials)
        implicit = belief_propagation(graph, rtol=1e-13, atol=1e-14)
        unrolled = belief_propagation(graph, adjoint=UnrollAdjoint(), rtol=0.0, atol=0.0, max_steps=100, throw=False)
        first, second = (torch.autograd.grad(b.variables[0, 0, 0], potentials)[0] for b in (implicit, unrolled))
        torch.testing.assert_close(first, second, rtol=0, atol=1e-9)


def _reaches_root(heads):
    for node in range(1, 4):
        for _ in heads:
            node = heads[node - 1] if node else 0
        if node:
            return False
    return True


def _crosses(heads):
    arcs = [sorted((h, m)) for m, h in enumerate(heads, 1)]
    return any(a < c < b < d for a, b in arcs for c, d in arcs)
