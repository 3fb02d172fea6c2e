"""Attention that must find matching brackets: by a softmax, and by trees that cannot cross.

usage: python benchmarks/structured_attention.py [--only NAME ...] [--seeds N] [--steps N] [--plot FILE]

Every opening bracket has a colour, and every closing one is asked for the colour of its partner. An LSTM reads the
brackets without their colours and makes queries and keys; the values are the colours: nothing but one head's weights
can lead a colour to where it is asked for. Partners are never told. Arcs from brackets to their partners do not cross,
which projective trees know and a softmax has to learn. Training is on ten brackets; measured is on new strings of ten
and of twenty. Printed is how many closing brackets get the right colour: the mean over seeds of the weights, and the
range.

With --plot the weights of both models and the best tree of one string are drawn; matplotlib is needed.
"""

from __future__ import annotations

import argparse
import random
import time

import torch
from torch import Tensor, nn

from restpoint.models import SparseAttention, StructuredAttention

COLOURS, DIM = 8, 32
ATTENTIONS = {
    "softmax": lambda: SparseAttention(DIM, 1, vdim=COLOURS, batch_first=True, normalizer="softmax"),
    "sparsemax": lambda: SparseAttention(DIM, 1, vdim=COLOURS, batch_first=True, normalizer="sparsemax"),
    "tree": lambda: StructuredAttention(DIM, 1, vdim=COLOURS, batch_first=True, structure="tree"),
    "projective-tree": lambda: StructuredAttention(DIM, 1, vdim=COLOURS, batch_first=True, structure="projective-tree"),
}


def brackets(pairs: int, rng: random.Random) -> tuple[list[int], list[int]]:
    """A random balanced string, 1 for opening, and for each closing bracket its partner's place, else -1."""
    string: list[int] = []
    partner: list[int] = []
    stack: list[int] = []
    opened = 0
    while len(string) < 2 * pairs:
        can_open, can_close = opened < pairs, bool(stack)
        if can_open and (not can_close or rng.random() < 0.5):
            stack.append(len(string))
            opened += 1
            string.append(1)
            partner.append(-1)
        else:
            string.append(0)
            partner.append(stack.pop())
    return string, partner


def batch(count: int, pairs: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Strings, colours as one-hot vectors (zero for closing brackets), partners, and the colours that are asked for."""
    rng = random.Random(seed)
    strings, partners = (torch.tensor(t) for t in zip(*[brackets(pairs, rng) for _ in range(count)], strict=True))
    colours = torch.randint(COLOURS, strings.shape, generator=torch.Generator().manual_seed(seed))
    values = nn.functional.one_hot(colours, COLOURS).float() * strings.unsqueeze(2)
    return strings, values, partners, colours.gather(1, partners.clamp(min=0))


class Reader(nn.Module):
    """From brackets and colours to the colour that every position is asked for."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Embedding(2, DIM)
        self.lstm = nn.LSTM(DIM, DIM // 2, batch_first=True, bidirectional=True)
        self.attention = attention
        self.head = nn.Linear(DIM, COLOURS)

    def forward(self, strings: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and weights."""
        read = self.lstm(self.embedding(strings))[0]
        mixed, weights = self.attention(read, read, values)
        return self.head(mixed), weights


def accuracy(model: Reader, pairs: int) -> float:
    """Share of closing brackets that get the right colour."""
    strings, values, partners, wanted = batch(200, pairs, 10**6)
    with torch.no_grad():
        logits, _ = model(strings, values)
    return float((logits.argmax(2) == wanted)[partners >= 0].double().mean())


def train(name: str, steps: int, seed: int) -> Reader:
    """A trained model."""
    torch.manual_seed(seed)
    model = Reader(ATTENTIONS[name]())
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for step in range(steps):
        strings, values, partners, wanted = batch(32, 5, seed * steps + step)
        logits, _ = model(strings, values)
        asked = partners >= 0
        loss = nn.functional.cross_entropy(logits[asked], wanted[asked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def draw(models: dict[str, Reader], path: str) -> None:
    """The weights of the models for one string, with the true partners, and the tree of the last one."""
    import matplotlib.pyplot as plt

    from restpoint.solvers.inference import DependencyTree

    strings, values, partners, _ = batch(1, 7, 123)
    text = ["(" if s else ")" for s in strings[0].tolist()]
    n = len(text)
    figure, axes = plt.subplots(1, len(models) + 1, figsize=(4 * len(models) + 4.4, 4.2), layout="constrained")
    weights = torch.zeros(1, n, n)
    for axis, (name, model) in zip(axes, models.items(), strict=False):
        with torch.no_grad():
            weights = model(strings, values)[1]
        axis.imshow(weights[0], cmap="Blues", vmin=0, vmax=1)
        for place, partner in enumerate(partners[0].tolist()):
            if partner >= 0:
                axis.plot(partner, place, "o", mfc="none", mec="tab:red", ms=9)
        axis.set_xticks(range(n), text)
        axis.set_yticks(range(n), text)
        axis.set_title(f"{name}: weights (partners in red)")
        axis.set_xlabel("attended bracket")
        axis.set_ylabel("asking bracket")
    # Of the marginals of a tree distribution the best tree is the one with the most expected arcs right.
    arcs = torch.zeros(1, n + 1, n + 1)
    arcs[0, 1:, 1:] = weights[0].T
    arcs[0, 0, 1:] = 1 - weights[0].sum(1)
    heads = DependencyTree(arcs).argmax[0].tolist()
    axis = axes[-1]
    for word, head in enumerate(heads):
        if head == 0:
            axis.annotate("", (word, 0), (word, 2.9), arrowprops={"arrowstyle": "->", "color": "tab:gray"})
            axis.text(word, 3.0, "root", ha="center", color="tab:gray")
            continue
        right = int(partners[0, word]) == head - 1
        style = {
            "arrowstyle": "->", "connectionstyle": f"arc3,rad={0.5 if head - 1 > word else -0.5}", "shrinkA": 1,
            "color": "tab:blue" if right else "lightgray",
        }  # fmt: skip
        axis.annotate("", (word, 0), (head - 1, 0), arrowprops=style)
    for place, bracket in enumerate(text):
        axis.text(place, -0.6, bracket, ha="center", va="center", fontsize=13)
    axis.set(xlim=(-0.7, n - 0.3), ylim=(-1.2, 3.6), title="the best tree; arcs to partners in blue")
    axis.axis("off")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Train, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=ATTENTIONS, default=list(ATTENTIONS))
    parser.add_argument("--plot")
    options = parser.parse_args()
    torch.set_num_threads(1)
    models = {}
    print(f"right colours after {options.steps} steps, {options.seeds} seeds; seconds a run")
    print(f"{'attention':16} {'10 brackets':>24} {'20 brackets':>24} {'seconds':>8}")
    for name in options.only:
        began = time.process_time()
        trained = [train(name, options.steps, seed) for seed in range(options.seeds)]
        seconds = (time.process_time() - began) / options.seeds
        shares = [[accuracy(model, pairs) for model in trained] for pairs in (5, 10)]
        columns = [f"{sum(s) / len(s):.1%} ({min(s):.1%} to {max(s):.1%})" for s in shares]
        print(f"{name:16} {columns[0]:>24} {columns[1]:>24} {seconds:8.1f}")
        models[name] = trained[0]
    if options.plot:
        draw(models, options.plot)


if __name__ == "__main__":
    main()
