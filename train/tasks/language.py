"""The next character, or token, of a text."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ...models.deq import Problem
from ...solvers import Solution
from ...solvers.options import options
from ..data.text import Texts
from ..regularise import growth_penalty
from .classification import is_equilibrium, solve_statistics
from .task import Outcome, Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Of the picture: characters of the test text that are given, those that the model adds, and how they are laid out.
GIVEN, WRITTEN, WIDE, LINES = 120, 600, 58, 24
TEMPERATURE = 0.8


@options
class LanguageModelling(Task):
    """Cross-entropy of every next token, given those before it.

    A model maps tokens (batch, length) to logits (batch, length, vocabulary), each from the tokens up to its own. One
    that also offers `problem`, `solve_problem` and `forward_head` is an equilibrium model, whose solves are reported.

    Attributes:
        label_smoothing: share of the target that is spread over all tokens.
        growth_weight, growth_limit, growth_powers, growth_every: the penalty on the growth of an equilibrium model's
            Jacobian, as of `ImageClassification`.
    """

    label_smoothing: float = 0.0
    growth_weight: float = 0.0
    growth_limit: float = 0.3
    growth_powers: int = 3
    growth_every: int = 1

    kind = "language-modelling"
    metric = "log_likelihood"

    @property
    def twice(self) -> bool:  # type: ignore[override]
        """The penalty is a derivative."""
        return self.growth_weight > 0

    def losses(self, model: nn.Module, batch: Texts, step: int) -> Outcome:
        """Cross-entropy in nats a token, and the penalty."""
        tokens, following = batch
        logits, solved = _logits(model, tokens)
        loss = F.cross_entropy(logits.flatten(0, 1), following.flatten(), label_smoothing=self.label_smoothing)
        metrics = {"accuracy": float((logits.detach().argmax(2) == following).double().mean())}
        if solved is None:
            return Outcome(loss, metrics)
        problem, solution = solved
        if self.growth_weight and step % self.growth_every == 0:
            metrics["cross_entropy"] = float(loss.detach())
            penalty, metrics["growth"] = growth_penalty(problem, solution.value, self.growth_limit, self.growth_powers)
            loss = loss + self.growth_weight * self.growth_every * penalty
        return Outcome(loss, metrics, [solution])

    def evaluate(self, model: nn.Module, batches: Iterable[Texts]) -> dict[str, float]:
        """How well the model continues texts.

        Returns:
            log_likelihood in nats a token; bits, its negative in bits a token; perplexity, exp of its negative;
            accuracy, the share of tokens that are the most probable; for equilibrium models also how the solves went,
            and place_residual_max, the largest relative residual of a single place in a text.
        """
        was_training = model.training
        model.eval()
        total, hits, count, worst = 0.0, 0, 0, 0.0
        solutions: list[Solution[Any]] = []
        with torch.no_grad():
            for tokens, following in batches:
                logits, solved = _logits(model, tokens)
                total -= float(F.cross_entropy(logits.flatten(0, 1).float(), following.flatten(), reduction="sum"))
                hits += int((logits.argmax(2) == following).sum())
                count += following.numel()
                if solved is not None:
                    problem, solution = solved
                    worst = max(worst, _place_residual(problem, solution.value))
                    solution.value = None
                    solutions.append(solution)
        model.train(was_training)
        mean = total / count
        result = {
            "log_likelihood": mean, "bits": -mean / math.log(2), "perplexity": math.exp(-mean),
            "accuracy": hits / count,
        }  # fmt: skip
        return {**result, **solve_statistics(solutions), "place_residual_max": worst} if solutions else result

    def draw(self, model: nn.Module, source: Any) -> Figure | None:
        """Two places of the test text, continued by a model that can `generate`."""
        if not hasattr(model, "generate"):
            return None
        writer: Any = model
        device = next(model.parameters()).device
        given = torch.stack([source.test[start : start + GIVEN].long() for start in (0, len(source.test) // 2)])
        texts = writer.generate(given.to(device), WRITTEN, temperature=TEMPERATURE)
        pairs = [(source.decode(text[:GIVEN]), source.decode(text[GIVEN:])) for text in texts]
        return draw_texts(pairs, f"{source.name}: grey is given, black is written, at temperature {TEMPERATURE}")


def draw_texts(texts: list[tuple[str, str]], title: str) -> Figure:
    """Texts side by side, what was given in grey and what a model wrote in black.

    Args:
        texts: of each what was given, and how it was continued.
        title: above all.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.7 * len(texts), 4.8), facecolor="white")
    figure.suptitle(title, fontsize=11)
    for column, (given, written) in enumerate(texts):
        place, left = 0, 0.03 + column * 0.96 / len(texts)
        for row, line in enumerate(wrapped(given + written)[:LINES]):
            grey = line[: max(len(given) - place, 0)]
            # The black part stands where it does in its line: spaces take the place of the grey one.
            for part, colour in ((grey, "0.6"), (" " * len(grey) + line[len(grey) :], "k")):
                figure.text(
                    left, 0.9 - 0.035 * row, part.rstrip("\n"), family="monospace", fontsize=7.5, color=colour,
                    parse_math=False,
                )  # fmt: skip
            place += len(line)
    return figure


def wrapped(text: str) -> list[str]:
    """The lines of a text with their ends, those that are too long broken behind a space; joined they are the text."""
    lines: list[str] = []
    for line in text.splitlines(keepends=True):
        while len(line.rstrip("\n")) > WIDE:
            end = line.rfind(" ", 0, WIDE) + 1 or WIDE
            lines.append(line[:end])
            line = line[end:]
        lines.append(line)
    return lines


def _place_residual(problem: Problem, z: Float[Tensor, "batch length channels"]) -> float:
    image = problem.f(z, *problem.args)
    return float(((image - z).norm(dim=2) / image.norm(dim=2)).max())


def _logits(
    model: Any, tokens: Int[Tensor, "batch length"]
) -> tuple[Float[Tensor, "batch length vocabulary"], tuple[Problem, Solution[Any]] | None]:
    if not is_equilibrium(model):
        return model(tokens), None
    problem = model.problem(tokens)
    solution = model.solve_problem(problem)
    return model.forward_head(solution.value), (problem, solution)
