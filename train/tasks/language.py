"""The next character, or token, of a text."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ...solvers import Solution
from ...solvers.options import options
from ..data.text import Texts
from .classification import is_equilibrium, solve_statistics
from .task import Outcome, Task


@options
class LanguageModelling(Task):
    """Cross-entropy of every next token, given those before it.

    A model maps tokens (batch, length) to logits (batch, length, vocabulary), each from the tokens up to its own. One
    that also offers `problem`, `solve_problem` and `forward_head` is an equilibrium model, whose solves are reported.

    Attributes:
        label_smoothing: share of the target that is spread over all tokens.
    """

    label_smoothing: float = 0.0

    kind = "language-modelling"
    metric = "log_likelihood"

    def losses(self, model: nn.Module, batch: Texts, step: int) -> Outcome:
        """Cross-entropy in nats a token."""
        tokens, following = batch
        logits, solutions = _logits(model, tokens)
        loss = F.cross_entropy(logits.flatten(0, 1), following.flatten(), label_smoothing=self.label_smoothing)
        accuracy = float((logits.detach().argmax(2) == following).double().mean())
        return Outcome(loss, {"accuracy": accuracy}, solutions)

    def evaluate(self, model: nn.Module, batches: Iterable[Texts]) -> dict[str, float]:
        """How well the model continues texts.

        Returns:
            log_likelihood in nats a token; bits, its negative in bits a token; perplexity, exp of its negative;
            accuracy, the share of tokens that are the most probable; for equilibrium models also how the solves went.
        """
        was_training = model.training
        model.eval()
        total, hits, count = 0.0, 0, 0
        solutions: list[Solution[Any]] = []
        with torch.no_grad():
            for tokens, following in batches:
                logits, solved = _logits(model, tokens)
                total -= float(F.cross_entropy(logits.flatten(0, 1).float(), following.flatten(), reduction="sum"))
                hits += int((logits.argmax(2) == following).sum())
                count += following.numel()
                for solution in solved:
                    solution.value = None
                solutions += solved
        model.train(was_training)
        mean = total / count
        result = {
            "log_likelihood": mean, "bits": -mean / math.log(2), "perplexity": math.exp(-mean),
            "accuracy": hits / count,
        }  # fmt: skip
        return {**result, **solve_statistics(solutions)} if solutions else result


def _logits(
    model: Any, tokens: Int[Tensor, "batch length"]
) -> tuple[Float[Tensor, "batch length vocabulary"], list[Solution[Any]]]:
    if not is_equilibrium(model):
        return model(tokens), []
    solution = model.solve_problem(model.problem(tokens))
    return model.forward_head(solution.value), [solution]
