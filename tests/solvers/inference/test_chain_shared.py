"""Chains with the same transitions at every step, beside those with transitions of their own."""

import itertools
import math

import pytest
import torch

from restpoint.solvers.inference import HiddenMarkov, LinearChain
from restpoint.solvers.inference.chain_shared import SharedLogPartition

D = torch.float64


def random(*shape, seed=0, scale=1.0, dtype=D):
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)).to(dtype)


def spelt_out(shared, unary):
    """Transitions for every step, in memory of their own."""
    batch, length, states = unary.shape
    return shared.reshape(-1, 1, states, states).expand(batch, length - 1, states, states).contiguous()


def excluded(shared, unary, how):
    shared, unary = shared.clone(), unary.clone()
    if how == "some":
        shared[..., 0, 1] = shared[..., 2, 2] = -math.inf
        unary[:, 2, 3] = -math.inf
    if how == "unreachable":  # a state that nothing leads to
        shared[..., 1] = -math.inf
    return shared.requires_grad_(), unary.requires_grad_()


@pytest.mark.parametrize("how", ["none", "some", "unreachable"])
@pytest.mark.parametrize("scale", [1.0, 30.0, 1000.0])
@pytest.mark.parametrize("shape", [(4, 4), (3, 4, 4)])
@pytest.mark.parametrize("lengths", [None, torch.tensor([7, 1, 4])])
def test_values_and_derivatives(how, scale, shape, lengths):
    shared, unary = excluded(random(*shape, scale=scale), random(3, 7, 4, seed=1, scale=scale), how)
    chain, other = LinearChain(shared, unary, lengths), LinearChain(spelt_out(shared, unary), unary, lengths)
    assert type(chain.log_partition.grad_fn).__name__ == "SharedLogPartitionBackward"
    torch.testing.assert_close(chain.log_partition, other.log_partition, rtol=1e-13, atol=1e-13)
    probe = torch.tensor([1.0, -2.0, 0.5], dtype=D)
    values = [(d.log_partition * probe).sum() for d in (chain, other)]
    for value in (v * 1 for v in values):  # the graph is kept, and used again
        value.backward(retain_graph=True)
    first = [torch.autograd.grad(v, (shared, unary), retain_graph=True) for v in values]
    for a, b in zip(*first, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    recorded = [torch.autograd.grad(v, (shared, unary), create_graph=True) for v in values]
    second = [torch.autograd.grad(sum((g**2).sum() for g in gs), (shared, unary)) for gs in recorded]
    for a, b in zip(*second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_a_state_that_hangs_on_an_improbable_one_in_float32():
    """State 2 follows state 1 alone, which 60 nats speak against at first, and for state 2 in the end."""
    shared = torch.zeros(3, 3)
    shared[[0, 2], 2] = -math.inf
    unary = torch.zeros(1, 8, 3)
    unary[0, :3, 1], unary[0, 3:, 2] = -20.0, 20.0
    shared, unary = shared.requires_grad_(), unary.requires_grad_()
    chain, exact = LinearChain(shared, unary), LinearChain(shared.double(), unary.double())
    torch.testing.assert_close(chain.log_partition.double(), exact.log_partition, rtol=1e-6, atol=0)
    ours, theirs = (torch.autograd.grad(d.log_partition.sum(), (shared, unary)) for d in (chain, exact))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("at", [0, 2, 5])
def test_a_sample_without_structure_leaves_the_others_alone(at):
    shared, unary = random(4, 4).requires_grad_(), random(2, 6, 4, seed=1)
    unary[1, at] = -math.inf
    unary.requires_grad_()
    value = LinearChain(shared, unary).log_partition
    assert value[1] == -math.inf
    alone = LinearChain(shared, unary[:1]).log_partition
    torch.testing.assert_close(value[0], alone[0], rtol=1e-13, atol=0)
    for a, b in zip(*(torch.autograd.grad(v[0], (shared, unary)) for v in (value, alone)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_many_gradients_at_once(scale):
    """vmap over the backward pass."""
    shared, unary = random(3, 3, scale=scale), random(2, 4, 3, seed=1, scale=scale)

    def f(shared, unary):
        return LinearChain(shared, unary, torch.tensor([4, 2])).log_partition

    one, together = (torch.autograd.functional.jacobian(f, (shared, unary), vectorize=v) for v in (False, True))
    for a, b in zip(one, together, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    for a, b in zip(torch.func.jacrev(f, (0, 1))(shared, unary), one, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("scale", [1.0, 20.0, 1000.0])
def test_long_chains_lose_no_digits_in_float32(scale):
    shared = random(8, 8, scale=scale, dtype=torch.float32).requires_grad_()
    unary = random(3, 500, 8, seed=1, scale=scale, dtype=torch.float32).requires_grad_()
    value = LinearChain(shared, unary).log_partition
    exact = LinearChain(shared.double(), unary.double()).log_partition
    torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=0)
    general = LinearChain(spelt_out(shared, unary), unary).log_partition
    ours, others, theirs = (torch.autograd.grad(v.sum(), (shared, unary)) for v in (value, general, exact))
    # What the transitions get is a sum over 1497 steps. Large potentials are rounded before anybody sees them.
    for a, b, c, terms in zip(ours, others, theirs, (1497, 1), strict=True):
        bound = 1e-6 * terms if scale == 1 else 2 * (b - c).abs().max()
        assert (a - c).abs().max() < bound


def test_what_is_kept_grows_as_length_times_states():
    kept = {}
    for length, states, scale in itertools.product((50, 100), (8, 16), (1.0, 100.0)):
        saved = []
        shared, unary = random(states, states).requires_grad_(), random(2, length, states, scale=scale)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):  # noqa: B023
            LinearChain(shared, unary).log_partition
        kept[length, states, scale] = sum(saved)
        assert sum(saved) < 3.2 * unary.numel() + 2 * shared.numel()
    assert kept[100, 16, 1.0] < 4.2 * kept[50, 8, 1.0]


def test_halves_and_autocast():
    shared, unary = random(4, 4, dtype=torch.bfloat16).requires_grad_(), random(2, 5, 4, seed=1, dtype=torch.bfloat16)
    exact = LinearChain(shared.double(), unary.double()).log_partition
    with torch.autocast("cpu", torch.bfloat16):
        value = LinearChain(shared, unary).log_partition
        (slope,) = torch.autograd.grad(value.sum(), shared)
    assert (value.dtype, slope.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(slope, torch.autograd.grad(exact.sum(), shared)[0], rtol=1e-2, atol=1e-3)


def test_states_without_transitions_and_hidden_markov_models():
    unary = random(2, 5, 3).requires_grad_()
    chain = LinearChain(unary=unary)
    (slope,) = torch.autograd.grad(chain.log_partition.sum(), unary)
    torch.testing.assert_close(slope, unary.softmax(2), rtol=1e-13, atol=1e-13)
    initial, transition, emission = (random(*s, seed=i).log_softmax(-1) for i, s in enumerate([(3,), (3, 3), (3, 4)]))
    transition.requires_grad_()
    model = HiddenMarkov(
        initial, transition, emission, torch.tensor([[0, 3, 2, 1], [1, 1, 0, 0]]), torch.tensor([4, 2])
    )
    (slope,) = torch.autograd.grad(model.log_partition.sum(), transition)
    torch.testing.assert_close(slope, model.marginals.transitions.sum((0, 1)), rtol=1e-12, atol=1e-13)


def test_transitions_that_need_no_derivative():
    shared, unary = random(4, 4), random(2, 5, 4, seed=1).requires_grad_()
    for scale in (1.0, 100.0):
        chain = LinearChain(scale * shared, unary, torch.tensor([5, 3]))
        (slope,) = torch.autograd.grad(chain.log_partition.sum(), unary)
        torch.testing.assert_close(slope, chain.marginals.states, rtol=1e-12, atol=1e-13)


def test_gradcheck():
    shared, unary = random(3, 3).requires_grad_(), random(2, 4, 3, seed=1).requires_grad_()

    def f(shared, unary):
        return SharedLogPartition.apply(shared, unary, None, True, LinearChain(shared, unary)._weigh)

    assert torch.autograd.gradcheck(f, (shared, unary))
    assert torch.autograd.gradgradcheck(f, (shared, unary))
