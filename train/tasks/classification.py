"""Image classification."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...solvers import Solution
from ...solvers.diagnose import jacobian_penalty, spectral_radius
from ...solvers.options import options
from ...zoo.watch import effort, watched
from ..data.batches import Batch, Mixed
from ..data.measured import measured_batches
from ..figures import SHOWN, confusion_figure
from ..regularise import growth_penalty
from .task import Outcome, Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Images and products that a look at the spectral radius is worth.
LOOKED_AT, POWERS = 8, 40


@options
class ImageClassification(Task):
    """Cross-entropy, and for equilibrium models what keeps them well-posed.

    A model that offers `problem`, `solve_problem` and `forward_head` is trained as an equilibrium model: its solves
    are reported, and the penalties below apply. Of any other only the logits are used.

    Attributes:
        label_smoothing: share of the target that is spread over all classes.
        growth_weight: weight of the penalty on the Jacobian's growth; 0 for none.
        growth_limit: growth a step, below which nothing is penalised.
        growth_powers: products with the transposed Jacobian before the growth is measured.
        growth_every: the penalties are applied at every so many steps, with so many times their weight.
        jacobian_weight: weight of the estimated mean squared entry |J|_F^2 / n of the Jacobian at the rest point, which
            bounds no single direction but all together, as Bai et al. regularise; 0 for none.
        correction: weight of the cross-entropy of each intermediate state that the model's `supervise` returns.
    """

    label_smoothing: float = 0.0
    growth_weight: float = 0.0
    growth_limit: float = 0.3
    growth_powers: int = 3
    growth_every: int = 1
    jacobian_weight: float = 0.0
    correction: float = 0.0

    kind = "image-classification"
    metric = "accuracy"

    @property
    def twice(self) -> bool:  # type: ignore[override]
        """The penalties are derivatives."""
        return self.growth_weight > 0 or self.jacobian_weight > 0

    def losses(self, model: nn.Module, batch: Batch | Mixed, step: int) -> Outcome:
        """Cross-entropy and penalties of a batch."""
        images, labels = batch
        if not is_equilibrium(model):
            logits = model(images)
            loss = self._cross_entropy(logits, labels)
            return Outcome(loss, {"accuracy": _accuracy(logits, labels)})
        equilibrium: Any = model
        problem = equilibrium.problem(images)
        solution = equilibrium.solve_problem(problem)
        logits = equilibrium.forward_head(solution.value)
        loss = self._cross_entropy(logits, labels)
        metrics = {"accuracy": _accuracy(logits, labels), "cross_entropy": float(loss.detach())}
        if self.correction and solution.trajectory is not None:
            for state in solution.trajectory:
                loss = loss + self.correction * self._cross_entropy(equilibrium.forward_head(state), labels)
        if self.growth_weight and step % self.growth_every == 0:
            penalty, growth = growth_penalty(problem, solution.value, self.growth_limit, self.growth_powers)
            loss = loss + self.growth_weight * self.growth_every * penalty
            metrics["growth"] = growth
        if self.jacobian_weight and step % self.growth_every == 0:
            squares = jacobian_penalty(problem.f, solution.value.detach(), problem.args).mean()
            loss = loss + self.jacobian_weight * self.growth_every * squares
            metrics["jacobian"] = float(squares.detach())
        return Outcome(loss, metrics, [solution])

    def evaluate(self, model: nn.Module, batches: Iterable[Batch]) -> dict[str, float]:
        """Accuracy, cross-entropy, and for equilibrium models how the solves went.

        Returns:
            accuracy and cross_entropy; for models with solves also evaluations (of all solves together, the mean over
            the samples), evaluations_max and converged (the share of samples), and for equilibrium models residual_max.
        """
        was_training = model.training
        model.eval()
        hits = count = 0
        entropy = 0.0
        solutions: list[Solution[Any]] = []
        efforts: list[tuple[Tensor, Tensor]] = []
        with torch.no_grad():
            for images, labels in batches:
                if is_equilibrium(model):
                    solution = model.solve_problem(model.problem(images))  # type: ignore[operator]
                    logits = model.forward_head(solution.value)  # type: ignore[operator]
                    solution.value = None
                    solutions.append(solution)
                else:
                    with watched(model) as solves:
                        logits = model(images)
                    efforts += [effort(solves)] if solves else []
                hits += int((logits.argmax(dim=1) == labels).sum())
                entropy += float(F.cross_entropy(logits, labels, reduction="sum"))
                count += len(labels)
        model.train(was_training)
        result = {"accuracy": hits / count, "cross_entropy": entropy / count}
        if efforts:
            evaluations, converged = (torch.cat(parts).double() for parts in zip(*efforts, strict=True))
            result |= {"evaluations": float(evaluations.mean()), "evaluations_max": float(evaluations.max())}
            result["converged"] = float(converged.mean())
        return {**result, **solve_statistics(solutions)} if solutions else result

    def diagnose(self, model: nn.Module, batch: Batch | Mixed) -> dict[str, float]:
        """For equilibrium models the spectral radius of the cell at the rest points of the batch's first images.

        Returns:
            spectral_radius and spectral_radius_max: its mean and largest value. Below 1 a rest point attracts.
        """
        if not is_equilibrium(model):
            return {}
        was_training = model.training
        model.eval()  # dropout would draw
        with torch.no_grad():
            problem = model.problem(batch[0][:LOOKED_AT])  # type: ignore[operator]
            state = model.solve_problem(problem).value  # type: ignore[operator]
        generator = torch.Generator(batch[0].device).manual_seed(0)
        radius = spectral_radius(problem.f, state, problem.args, steps=POWERS, generator=generator)
        model.train(was_training)
        return {"spectral_radius": float(radius.mean()), "spectral_radius_max": float(radius.max())}

    def draw(self, model: nn.Module, source: Any) -> Figure:
        """The confusion matrix of the test set, and some of the images that the model takes for another class."""
        blueprint = getattr(model, "blueprint", None)
        card = blueprint.card if blueprint is not None else None
        how = card.input if card is not None else None
        truth, predicted = [], []
        mistakes: list[tuple[Tensor, int, int]] = []
        device = str(next(model.parameters()).device)
        for images, labels in measured_batches(source, 500, device=device, how=how):
            said = model(images).argmax(dim=1)
            truth.append(labels)
            predicted.append(said)
            wrong = (said != labels).nonzero().flatten()[: SHOWN - len(mistakes)]
            mistakes += [(images[i], int(labels[i]), int(said[i])) for i in wrong.tolist()]
        return confusion_figure(
            torch.cat(truth), torch.cat(predicted), source.classes, mistakes, f"test set of {source.name}"
        )

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)


def is_equilibrium(model: nn.Module) -> bool:
    """Whether the model's solves can be asked for."""
    return all(hasattr(model, name) for name in ("problem", "solve_problem", "forward_head"))


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    labels = labels.argmax(dim=1) if labels.ndim == 2 else labels  # mixed images have shares of classes
    return float((logits.detach().argmax(dim=1) == labels).float().mean())


def solve_statistics(solutions: list[Solution[Any]]) -> dict[str, float]:
    """Mean and largest evaluations, the largest residual, and the share of samples that converged."""
    evaluations = torch.cat([s.stats.evaluations for s in solutions]).double()
    residual = torch.cat([s.stats.residual for s in solutions])
    converged = torch.cat([s.converged for s in solutions]).double()
    return {
        "evaluations": float(evaluations.mean()),
        "evaluations_max": float(evaluations.max()),
        "residual_max": float(residual.max()),
        "converged": float(converged.mean()),
    }
