"""Recursions that keep few of their steps give the same results, to the last bit."""

import math

import pytest
import torch

from restpoint.solvers.inference import Alignment, Constituency, DependencyTree, LinearChain, SemiMarkov
from restpoint.solvers.inference.sparing import walk
from tests.solvers.inference.enumeration import CASES, D


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


LONG = {
    "chain": (lambda *p: LinearChain(*p, torch.tensor([12, 9])), ((2, 11, 3, 3), (2, 12, 3))),
    "shared chain": (lambda *p: LinearChain(*p), ((3, 3), (2, 12, 3))),
    "semi-Markov": (lambda *p: SemiMarkov(*p, torch.tensor([12, 9])), ((2, 12, 4, 2), (2, 2))),
    "constituency": (lambda *p: Constituency(*p, torch.tensor([9, 7])), ((2, 9, 9, 2),)),
    "alignment": (lambda *p: Alignment(*p, torch.tensor([[6, 5], [4, 5]])), ((2, 7, 6, 3),)),
    "projective": (lambda *p: DependencyTree(*p, torch.tensor([8, 6])), ((2, 9, 9),)),
    "projective multi": (lambda *p: DependencyTree(*p, single_root=False), ((2, 9, 9),)),
    "spanning": (lambda *p: DependencyTree(*p, torch.tensor([8, 6]), projective=False), ((2, 9, 9),)),
    "spanning multi": (lambda *p: DependencyTree(*p, projective=False, single_root=False), ((2, 9, 9),)),
}


def squares(marginals):
    return sum((m**2).sum() for m in (marginals if isinstance(marginals, tuple) else (marginals,)))


QUERIES = {
    "log_partition": lambda d, other: d.log_partition.sum(),
    "entropy": lambda d, other: d.entropy.sum(),
    "kl": lambda d, other: d.kl(other).sum(),
    "marginals": lambda d, other: squares(d.marginals),
}


@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize("name", LONG)
def test_derivatives_are_the_same_numbers(name, query):
    build, shapes = LONG[name]
    parts = tuple(random(*s, seed=i).requires_grad_() for i, s in enumerate(shapes))
    other = build(*(random(*s, seed=9 + i) for i, s in enumerate(shapes)))
    found = []
    for distribution in (build(*parts), build(*parts).checkpointed()):
        value = QUERIES[query](distribution, other)
        first = torch.autograd.grad(value, parts, create_graph=True, materialize_grads=True)
        second = torch.autograd.grad(sum((g**2).sum() for g in first), parts, allow_unused=True)
        found.append((value, *first, *second))
    for a, b in zip(*found, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_choices_are_the_same(case):
    parts = tuple(p.requires_grad_() for p in case.parts())
    plain = case.distribution(parts)
    sparing = plain.checkpointed()
    for query in (
        lambda d: d.argmax,
        lambda d: d.kbest(3)[1],
        lambda d: d.sample(5, torch.Generator().manual_seed(3)),
    ):
        a, b = query(plain), query(sparing)
        for x, y in zip(a if isinstance(a, tuple) else (a,), b if isinstance(b, tuple) else (b,), strict=True):
            assert torch.equal(x, y)


def test_transforms_ignore_it():
    potentials = random(2, 9, 9)

    def f(p, sparing):
        tree = DependencyTree(p)
        return (tree.checkpointed() if sparing else tree).entropy.sum()

    assert torch.equal(*(torch.func.grad(f)(potentials, sparing) for sparing in (False, True)))


def test_what_was_computed_is_not_handed_over():
    tree = DependencyTree(random(1, 5, 5).requires_grad_())
    before = tree.log_partition
    sparing = tree.checkpointed()
    assert sparing.log_partition is not before
    assert not tree._sparing


def highest(run):
    """Bytes that are allocated at the highest point of a run, above those before it."""
    held = most = 0
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


@pytest.mark.parametrize(
    "build, shape, share",
    [
        # A chain's potentials are copied once for each component of the semiring's values, steps kept or not.
        (lambda p: LinearChain(p), (2, 143, 12, 12), 0.75),
        (lambda p: DependencyTree(p), (2, 37, 37), 0.5),
        (lambda p: DependencyTree(p, projective=False), (2, 37, 37), 0.6),
        (lambda p: Constituency(p), (2, 50, 50, 1), 0.6),
    ],
    ids=["chain", "projective", "spanning", "constituency"],
)
def test_memory(build, shape, share):
    potentials = random(*shape).requires_grad_()

    def run(sparing):
        distribution = build(potentials)
        (distribution.checkpointed() if sparing else distribution).entropy.sum().backward()

    run(False)  # The gradient is there from now on.
    assert highest(lambda: run(True)) < share * highest(lambda: run(False))


def test_steps_are_taken_twice_and_no_more():
    taken = []

    def step(carry, place):
        taken.append(place)
        return (carry[0] * carry[1].cos(), carry[1]), carry[0].sum()

    x, angle = random(3).requires_grad_(), random(3, seed=1).requires_grad_()
    (end, _), noted = walk(step, (x, angle), range(10), True)
    assert taken == list(range(10))
    (end.sum() + sum(noted)).backward()
    assert sorted(taken) == sorted(2 * list(range(10)))
    assert len(noted) == 10
    expected = sum(float((x.detach() * angle.detach().cos() ** k).sum()) for k in range(11))
    assert math.isclose(float(end.detach().sum() + sum(n.detach() for n in noted)), expected, rel_tol=1e-12)
