"""What linear chains and hidden Markov models have beside what all distributions have."""

import math

import pytest
import torch

from restpoint.solvers.inference import HiddenMarkov, LinearChain
from restpoint.solvers.inference.chain_kernel import MODERATE

D = torch.float64


def random(*shape, seed=0, scale=1.0, dtype=D):
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)).to(dtype)


def recorded(potentials):
    """Log-partition and marginals by the recursion that autograd follows."""
    potentials = potentials.detach().double().requires_grad_()
    scores = potentials.new_zeros(potentials.shape[0], potentials.shape[2])
    for step in potentials.unbind(1):
        scores = torch.logsumexp(scores.unsqueeze(2) + step, 1)
    value = torch.logsumexp(scores, 1)
    return value.detach(), torch.autograd.grad(value.sum(), potentials)[0]


@pytest.mark.parametrize("scale", [1.0, 20.0, 1000.0])
def test_long_chains_lose_no_digits_in_float32(scale):
    potentials = random(3, 500, 8, 8, scale=scale, dtype=torch.float32).requires_grad_()
    value, marginals = recorded(potentials)
    chain = LinearChain(potentials)
    torch.testing.assert_close(chain.log_partition.double(), value, rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(chain.log_partition.sum(), potentials)
    bound = 1e-6 if scale == 1 else 5e-5
    assert (gradient.double() - marginals).abs().max() < bound
    assert (chain.marginals.transitions.double() - marginals).abs().max() < bound


def test_with_and_without_logarithms():
    """Both forward passes on either side of where one gives way to the other."""
    lengths = torch.tensor([6, 4, 1])
    for factor in (0.999, 1.001):
        potentials, unary = random(3, 5, 4, 4), random(3, 6, 4, seed=1)
        potentials = (potentials * (factor * MODERATE / potentials.abs().max())).requires_grad_()
        chain = LinearChain(potentials, unary, lengths)
        scan = LinearChain(potentials, unary, lengths, parallel=True)
        torch.testing.assert_close(chain.log_partition, scan.log_partition, rtol=1e-13, atol=1e-13)
        for a, b in zip(chain.marginals, scan.marginals, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
        first, second = (torch.autograd.grad(c.log_partition.sum(), potentials)[0] for c in (chain, scan))
        torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-13)


def test_scan_answers_as_the_loop_does():
    parts = random(4, 6, 3, 3), random(4, 7, 3, seed=1)
    lengths = torch.tensor([7, 1, 4, 2])
    loop, scan = (LinearChain(*parts, lengths, parallel=p) for p in (False, True))
    for a, b in zip(loop.marginals, scan.marginals, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(loop.entropy, scan.entropy, rtol=1e-12, atol=1e-12)
    assert torch.equal(loop.argmax, scan.argmax)
    for a, b in zip(loop.kbest(3), scan.kbest(3), strict=True):
        keep = slice(None) if a.is_floating_point() else loop.kbest(3)[1] > -math.inf
        torch.testing.assert_close(a[keep], b[keep])


def test_derivative_twice_through_a_backward_pass_that_keeps_its_graph():
    """The weights may only give way to the marginals where nobody needs them again."""
    potentials = random(2, 5, 3, 3).requires_grad_()
    value = LinearChain(potentials).log_partition.sum()
    first = torch.autograd.grad(value, potentials, retain_graph=True)[0]
    second = torch.autograd.grad(3 * value, potentials)[0]
    torch.testing.assert_close(second, 3 * first, rtol=1e-13, atol=0)


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_many_gradients_at_once(scale):
    """vmap over the backward pass."""
    potentials = random(2, 3, 2, 2, scale=scale).requires_grad_()

    def f(potentials):
        chain = LinearChain(potentials, lengths=torch.tensor([4, 2]))
        return torch.cat([chain.log_partition, chain.marginals.states.flatten()])

    one, all_at_once = (torch.autograd.functional.jacobian(f, potentials, vectorize=v) for v in (False, True))
    torch.testing.assert_close(one, all_at_once, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("shape", [(3, 3), (2, 3, 3)])
def test_transitions_that_stay_the_same(shape):
    transition, unary = random(*shape).requires_grad_(), random(2, 5, 3, seed=1)
    full = (transition if len(shape) == 2 else transition.unsqueeze(1)).expand(2, 4, 3, 3)
    values = [LinearChain(t, unary).log_partition for t in (transition, full)]
    assert torch.equal(*values)
    grads = [torch.autograd.grad(v.sum(), transition)[0] for v in values]
    torch.testing.assert_close(*grads, rtol=1e-13, atol=1e-13)


def test_states_alone_are_independent():
    unary = random(2, 5, 3)
    chain = LinearChain(unary=unary)
    torch.testing.assert_close(chain.marginals.states, unary.softmax(2), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(chain.log_partition, unary.logsumexp(2).sum(1), rtol=1e-13, atol=1e-13)


def test_mask():
    unary = random(2, 4, 3)
    mask = torch.ones(2, 4, 3, dtype=torch.bool)
    mask[0, 1, 2] = mask[1, 3, :2] = False
    chain = LinearChain(random(2, 3, 3, 3), unary, mask=mask)
    assert (chain.marginals.states[~mask] == 0).all()
    assert chain.argmax[1, 3] == 2
    mask[1, 2] = False
    chain = LinearChain(random(2, 3, 3, 3), unary, mask=mask)
    with pytest.raises(ValueError, match="the mask and the potentials leave no structure to sample 1"):
        chain.log_partition
    with pytest.raises(ValueError, match=r"mask: expected the shape of the states, \(2, 4, 3\), got \(2, 3\)"):
        LinearChain(unary=unary, mask=torch.ones(2, 3, dtype=torch.bool))


def test_hidden_markov_against_the_forward_algorithm():
    initial, transition, emission = (random(*s, seed=i).softmax(-1) for i, s in enumerate([(3,), (3, 3), (3, 4)]))
    symbols = torch.tensor([[0, 3, 2, 1], [1, 1, 0, 0]])
    lengths = torch.tensor([4, 2])
    model = HiddenMarkov(initial.log(), transition.log(), emission.log(), symbols, lengths)
    for b in range(2):
        forward = initial * emission[:, symbols[b, 0]]
        for t in range(1, int(lengths[b])):
            forward = (forward @ transition) * emission[:, symbols[b, t]]
        torch.testing.assert_close(model.log_partition[b], forward.sum().log(), rtol=1e-13, atol=0)
    direct = HiddenMarkov(initial.log().expand(2, 3), transition.log(), emission.log().T[symbols], lengths=lengths)
    torch.testing.assert_close(direct.log_partition, model.log_partition, rtol=1e-13, atol=0)


def test_likelihoods_of_all_observations_sum_to_one():
    initial, transition, emission = (random(*s, seed=i).log_softmax(-1) for i, s in enumerate([(2,), (2, 2), (2, 3)]))
    symbols = torch.cartesian_prod(*[torch.arange(3)] * 3)
    likelihood = HiddenMarkov(initial, transition, emission, symbols).log_partition.exp()
    torch.testing.assert_close(likelihood.sum(), torch.ones((), dtype=D), rtol=1e-13, atol=0)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: LinearChain(), "expected potentials, unary or both; got neither"),
        (lambda: LinearChain(random(2, 3, 3, 4)), r"potentials: expected shape \(batch, length - 1, states, states\)"),
        (lambda: LinearChain(random(2, 3, 3, 3), random(2, 3, 3)), r"potentials: expected shape \(2, 2, 3, 3\), got"),
        (lambda: LinearChain(random(2, 3, 3, 3).float(), random(2, 4, 3)), "potentials: expected torch.float64"),
        (lambda: LinearChain(unary=random(2, 0, 3)), "the dimension 'length' of .* is empty"),
        (lambda: HiddenMarkov(random(4), random(3, 3), random(2, 5, 3)), r"initial: expected shape \(3\), got \(4,\)"),
        (
            lambda: HiddenMarkov(random(2), random(2, 2), random(2, 3), torch.tensor([[0, 3]]), torch.tensor([1, 2])),
            r"lengths: expected shape \(batch,\) = \(1,\), got \(2,\)",
        ),
        (
            lambda: HiddenMarkov(random(2), random(2, 2), random(2, 3), torch.tensor([[0, 3]])),
            r"observations: the symbol at \(0, 1\) is 3; expected 0 to 2",
        ),
        (lambda: LinearChain(unary=random(2, 4, 3)).log_prob(torch.zeros(2, 3, dtype=torch.int64)), "expected states"),
        (
            lambda: LinearChain(unary=random(2, 4, 3)).log_prob(torch.full((2, 4), 3)),
            r"the state at \(0, 0\) is 3; expected 0 to 2",
        ),
    ],
)
def test_bad_input(build, message):
    with pytest.raises(ValueError, match=message):
        build()
