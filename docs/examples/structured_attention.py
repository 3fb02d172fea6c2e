# ruff: noqa: T201
"""Marginals as attention: of chains and trees, checked against all structures, and drawn over a sentence.

usage: python docs/examples/structured_attention.py [--output FILE.png]

Printed is how far the marginals of a hidden Markov model, of a conditional random field and of trees with and without
crossing arcs are from those that adding up all structures gives, and how far the gradient of a chain's marginals is
from the implicit function theorem's on its optimality conditions: the covariance of the indicators.

Drawn is what the part-of-speech tagger of this package thinks of a sentence that can be read in several ways: the
attention of every word to every tag, by a softmax at each word alone and by the marginals of the whole chain; and the
attention of words to their heads, by a softmax over each word's scores and by the marginals of trees.
"""

from __future__ import annotations

import argparse
import itertools
import math

import torch
from torch import Tensor

from restpoint.solvers.inference import DependencyTree, HiddenMarkov, LinearChain

SENTENCE = "Time flies like an arrow."
D = torch.float64


def expected(weights: dict[tuple[int, ...], Tensor], states: int) -> Tensor:
    """The share of every state at every place, of the log-weights of all structures."""
    total = torch.stack(list(weights.values())).logsumexp(0)
    shares = torch.zeros(len(next(iter(weights))), states, dtype=D)
    for structure, weight in weights.items():
        for place, state in enumerate(structure):
            shares[place, state] += (weight - total).exp()
    return shares


def is_tree(heads: tuple[int, ...], projective: bool) -> bool:
    """Whether all words lead to one that hangs from the root, without crossing arcs if that is asked for."""
    for node in range(1, len(heads) + 1):
        for _ in heads:
            node = heads[node - 1] if node else 0
        if node:
            return False
    arcs = [sorted(arc) for arc in enumerate(heads, 1)]
    crossing = any(a < c < b < d for (a, b), (c, d) in itertools.permutations(arcs, 2))
    return heads.count(0) == 1 and not (projective and crossing)


def errors() -> dict[str, float]:
    """Largest differences from what all structures give."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=D)

    found = {}
    initial, transition, emission = (random(*s).log_softmax(-1) for s in ((3,), (3, 3), (5, 3)))
    paths = list(itertools.product(range(3), repeat=5))
    weights = {
        p: initial[p[0]] + sum(transition[a, b] for a, b in itertools.pairwise(p)) + emission[range(5), p].sum()
        for p in paths
    }
    posterior = HiddenMarkov(initial, transition, emission.unsqueeze(0)).marginals.states[0]
    found["hidden Markov model"] = float((posterior - expected(weights, 3)).abs().max())

    potentials, unary = 3 * random(4, 3, 3), 3 * random(5, 3)
    weights = {
        p: sum(potentials[t, a, b] for t, (a, b) in enumerate(itertools.pairwise(p))) + unary[range(5), p].sum()
        for p in paths
    }
    chain = LinearChain(potentials.unsqueeze(0), unary.unsqueeze(0))
    found["conditional random field"] = float((chain.marginals.states[0] - expected(weights, 3)).abs().max())

    arcs = 3 * random(5, 5)
    for projective, name in ((True, "trees without crossing arcs"), (False, "trees that may cross")):
        trees = (h for h in itertools.product(range(5), repeat=4) if is_tree(h, projective))
        weights = {heads: arcs[list(heads), [1, 2, 3, 4]].sum() for heads in trees}
        marginals = DependencyTree(arcs.unsqueeze(0), projective=projective).marginals[0, :, 1:].T
        found[name] = float((marginals - expected(weights, 5)).abs().max())

    def states(unary: Tensor) -> Tensor:
        return LinearChain(potentials.unsqueeze(0), unary.unsqueeze(0)).marginals.states[0].flatten()

    # At the optimum over the marginal polytope the theorem gives the inverse of the entropy's Hessian on it.
    weighed = {
        p: sum(potentials[t, a, b] for t, (a, b) in enumerate(itertools.pairwise(p))) + unary[range(5), p].sum()
        for p in paths
    }
    shares = torch.stack(list(weighed.values())).softmax(0)
    indicators = torch.nn.functional.one_hot(torch.tensor(paths), 3).flatten(1).to(D)
    centred = indicators - shares @ indicators
    covariance = centred.T @ (shares.unsqueeze(1) * centred)
    jacobian = torch.autograd.functional.jacobian(states, unary).flatten(1)
    found["gradient of the field's marginals"] = float((jacobian - covariance).abs().max())
    return found


def draw(path: str) -> None:
    """The picture."""
    from matplotlib.figure import Figure

    from restpoint import create_model
    from restpoint.models.tagging import encode_words, tokenize

    words = tokenize(SENTENCE)
    tagger = create_model("bilstm_crf_small.ewt", pretrained=True).eval()
    labels = tagger.blueprint.card.labels
    with torch.no_grad():
        encoded = encode_words([words])
        alone = tagger(encoded)[0].softmax(1)
        chain = tagger.distribution(encoded).marginals.states[0]
        # Similar words attract each other: what a head would score before anything has been learnt of trees.
        vectors = tagger.encode(encoded)[0].double()
        scores = 2 * (vectors @ vectors.T) / math.sqrt(vectors.shape[1])
        arcs = torch.nn.functional.pad(scores, (1, 0, 1, 0))
        softmax = scores.masked_fill(torch.eye(len(words), dtype=torch.bool), -torch.inf).softmax(0)
        trees = DependencyTree(arcs.unsqueeze(0)).marginals[0, :, 1:]
    figure = Figure(figsize=(11, 8), layout="constrained", facecolor="white")
    kept = sorted(set((torch.cat([alone, chain]) > 0.02).any(0).nonzero().flatten().tolist()))
    panels = (
        (alone[:, kept].T, [labels[t] for t in kept], "tags: a softmax at each word"),
        (chain[:, kept].T, [labels[t] for t in kept], "tags: marginals of the chain"),
        (torch.cat([torch.zeros(1, len(words)), softmax]), ["root", *words], "heads: a softmax for each word"),
        (trees, ["root", *words], "heads: marginals of projective trees"),
    )
    for axis, (shares, rows, title) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        picture = axis.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axis.set_xticks(range(len(words)), words)
        axis.set_yticks(range(len(rows)), rows)
        axis.set_title(title, size=11)
        figure.colorbar(picture, ax=axis)
    figure.savefig(path, dpi=90)


def main() -> None:
    """Print, and draw where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output")
    options = parser.parse_args()
    for name, error in errors().items():
        print(f"{name:36} {error:.1e}")
    if options.output:
        draw(options.output)


if __name__ == "__main__":
    main()
