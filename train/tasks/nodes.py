"""The subjects of a graph's nodes, some of which are known."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...solvers import Solution
from ...solvers.options import options
from ..data.planetoid import Nodes
from .classification import is_equilibrium, solve_statistics
from .task import Outcome, Task


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


def _logits(model: Any, graph: Any) -> tuple[Tensor, list[Solution[Any]]]:
    if not is_equilibrium(model):
        return model(graph), []
    solution = model.solve_problem(model.problem(graph))
    return model.forward_head(solution.value), [solution]
