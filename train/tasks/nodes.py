"""The subjects of a graph's nodes, some of which are known."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...solvers import Solution
from ...solvers.options import options
from ..data.planetoid import Nodes
from .classification import is_equilibrium, solve_statistics
from .task import Outcome, Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@options
class NodeClassification(Task):
    """Cross-entropy of the nodes that count; a model sees the whole graph, with the words of the others, too.

    A model maps a graph to logits (nodes, classes). One that also offers `problem`, `solve_problem` and `forward_head`
    is an equilibrium model, whose solves are reported.

    Attributes:
        label_smoothing: share of the target that is spread over all classes.
    """

    label_smoothing: float = 0.0

    kind = "node-classification"
    metric = "accuracy"

    def losses(self, model: nn.Module, batch: Nodes, step: int) -> Outcome:
        """Cross-entropy in nats a node."""
        graph, labels, mask = batch
        logits, solutions = _logits(model, graph)
        loss = F.cross_entropy(logits[mask], labels[mask], label_smoothing=self.label_smoothing)
        accuracy = float((logits.detach()[mask].argmax(1) == labels[mask]).double().mean())
        return Outcome(loss, {"accuracy": accuracy}, solutions)

    def evaluate(self, model: nn.Module, batches: Iterable[Nodes]) -> dict[str, float]:
        """How many of the nodes that count are classified rightly.

        Returns:
            accuracy and cross_entropy (nats a node); for equilibrium models also how the solve went.
        """
        was_training = model.training
        model.eval()
        hits = count = 0
        entropy = 0.0
        solutions: list[Solution[Any]] = []
        with torch.no_grad():
            for graph, labels, mask in batches:
                logits, solved = _logits(model, graph)
                entropy += float(F.cross_entropy(logits[mask], labels[mask], reduction="sum"))
                hits += int((logits[mask].argmax(1) == labels[mask]).sum())
                count += int(mask.sum())
                solutions += solved
        model.train(was_training)
        result = {"accuracy": hits / count, "cross_entropy": entropy / count}
        return {**result, **solve_statistics(solutions)} if solutions else result

    def use(self, model: nn.Module, batch: Nodes) -> Tensor:
        """Logits of all nodes."""
        return model(batch[0])

    def draw(self, model: nn.Module, source: Any) -> Figure:
        """The test nodes, where what the model makes of them puts them (t-SNE), and their confusion matrix."""
        from matplotlib import colormaps
        from matplotlib.figure import Figure
        from sklearn.manifold import TSNE

        graph, labels, mask = next(iter(source.test_batches(1)))
        features, truth = model.forward_features(graph), labels[mask]  # type: ignore[operator]
        said = model.forward_head(features)[mask].argmax(1)  # type: ignore[operator]
        nearby = min(30.0, len(truth) / 4)
        plane = TSNE(init="pca", perplexity=nearby, random_state=0).fit_transform(features[mask].numpy())
        figure = Figure(figsize=(11, 4.6), layout="constrained")
        axes: Any = figure.subplots(1, 2, width_ratios=[1.25, 1])
        left, right = axes
        names, wrong = source.classes, (said != truth).numpy()
        for index, name in enumerate(names):
            of, colour = (truth == index).numpy(), colormaps["tab10"](index)
            left.scatter(*plane[of & ~wrong].T, s=7, color=colour, label=name)
            left.scatter(*plane[of & wrong].T, s=16, color=colour, marker="x", linewidths=1)
        left.set(xticks=[], yticks=[], title=f"{len(truth):,} test nodes by subject; crosses are misread")
        left.legend(fontsize=7, markerscale=2, frameon=False)
        counts = torch.bincount(truth * len(names) + said, minlength=len(names) ** 2).view(len(names), -1)
        right.imshow(counts.double().sqrt().numpy(), cmap="Blues")
        for row, column in torch.cartesian_prod(torch.arange(len(names)), torch.arange(len(names))).tolist():
            count = int(counts[row, column])
            shade = "white" if count > counts.max() / 3 else "0.3"
            right.text(column, row, str(count), ha="center", va="center", fontsize=8, color=shade)
        right.set_xticks(range(len(names)), names, rotation=35, ha="right", fontsize=7)
        right.set_yticks(range(len(names)), names, fontsize=7)
        share = 100 * float((said == truth).double().mean())
        right.set(xlabel="read as", ylabel="subject", title=f"{share:.1f} % are read rightly")
        return figure


def _logits(model: Any, graph: Any) -> tuple[Tensor, list[Solution[Any]]]:
    if not is_equilibrium(model):
        return model(graph), []
    solution = model.solve_problem(model.problem(graph))
    return model.forward_head(solution.value), [solution]
