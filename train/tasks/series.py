"""A class of an irregular series with missing values, or an event foretold by it."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...solvers.options import options
from .series_figures import draw_reconstruction, event_figure
from .task import Outcome, Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 100


@options
class SeriesClassification(Task):
    """Cross-entropy of an event's logit or of the classes' logits, and where wished a model's bound on the evidence.

    A model maps (times, values, observed, static), as `restpoint.train.data.Series` has them, to logits: (batch,) for
    an event, (batch, classes) for classes. One that also explains the series offers
    `explain(times, values, observed, static, kl_weight)`, which gives the logits and a lower bound, per series, on the
    log-likelihood of its observations in nats an observed value.

    Attributes:
        positive_weight: of the series where the event came, which are often few.
        evidence: weight of the negative bound beside the cross-entropy; 0 leaves it out.
        jitter: deviation of noise that is added to what was observed, in training, against learning it by heart.
        annealing: so many steps until the bound's divergence from the prior has its whole weight, which rises evenly.

    Source: the bound beside the cross-entropy, and the annealing: Rubanova, Chen and Duvenaud 2019.
    """

    positive_weight: float = 1.0
    evidence: float = 0.0
    annealing: int = 0
    jitter: float = 0.0

    kind = "series-classification"
    metric = "auroc"

    def losses(self, model: nn.Module, batch: tuple[Tensor, ...], step: int) -> Outcome:
        """Cross-entropy in nats a series, and the bound.

        Raises:
            TypeError: `evidence` is positive, and the model does not explain series.
        """
        times, values, observed, static, outcome = batch
        if self.jitter:
            values = values + self.jitter * torch.randn_like(values) * observed
        series = times, values, observed, static
        metrics: dict[str, float] = {}
        bound = None
        if self.evidence:
            if not hasattr(model, "explain"):
                raise TypeError(f"evidence: {type(model).__name__} gives no bound on the likelihood of its series.")
            weight = min(1.0, (step + 1) / self.annealing) if self.annealing else 1.0
            logits, bound = model.explain(*series, kl_weight=weight)  # type: ignore[operator]
        else:
            logits = model(*series)
        loss = self._cross_entropy(logits, outcome)
        metrics |= {"cross_entropy": float(loss.detach()), "accuracy": float(_hits(logits, outcome).mean())}
        if bound is not None:
            metrics["bound"] = float(bound.detach().mean())
            loss = loss - self.evidence * bound.mean()
        return Outcome(loss, metrics)

    def evaluate(self, model: nn.Module, batches: Iterable[tuple[Tensor, ...]]) -> dict[str, float]:
        """How well the class is told.

        Returns:
            accuracy, and cross_entropy in nats a series. For an event also, in front, auroc and auprc, the areas under
            the receiver's operating characteristic and under precision over recall (average precision), and events, the
            share of series with the event, which is what auprc is without any knowledge.
        """
        logits, truth = predictions(model, batches)
        result = {
            "accuracy": float(_hits(logits, truth).mean()),
            "cross_entropy": float(SeriesClassification()._cross_entropy(logits, truth)),
        }
        if logits.ndim == 1:
            result["events"] = float(truth.mean())
            if 0 < result["events"] < 1:  # else the areas do not exist
                from sklearn.metrics import average_precision_score, roc_auc_score

                areas = {"auroc": roc_auc_score, "auprc": average_precision_score}
                result = {name: float(area(truth, logits)) for name, area in areas.items()} | result
        return result

    def draw(self, model: nn.Module, source: Any) -> Figure:
        """For classes the confusion matrix; for an event how well it is told, and a series as the model explains it."""
        from ..figures import confusion_figure

        device = str(next(model.parameters()).device)
        logits, truth = predictions(model, source.test_batches(500, device=device))
        title = f"test set of {source.name}"
        if logits.ndim == 2:
            return confusion_figure(truth, logits.argmax(1), source.classes, title=title)
        paint = None
        if hasattr(model, "decode") and hasattr(model, "posterior"):
            batch = next(iter(source.test_batches(SHOWN, device=device)))
            paint = functools.partial(draw_reconstruction, model=model, batch=batch, names=source.names)
        return event_figure(logits, truth, title, paint)

    def _cross_entropy(self, logits: Tensor, outcome: Tensor) -> Tensor:
        if logits.ndim == 2:
            return F.cross_entropy(logits, outcome)
        weight = logits.new_tensor(self.positive_weight)
        return F.binary_cross_entropy_with_logits(logits, outcome.to(logits), pos_weight=weight)


def predictions(model: nn.Module, batches: Iterable[tuple[Tensor, ...]]) -> tuple[Tensor, Tensor]:
    """The logits and outcomes of all `batches`, logits in float64, with the model in eval mode."""
    was_training = model.training
    model.eval()
    found, truth = [], []
    with torch.no_grad():
        for *series, outcome in batches:
            found.append(model(*series).double().cpu())
            truth.append(outcome.cpu())
    model.train(was_training)
    logits, outcomes = torch.cat(found), torch.cat(truth)
    return logits, outcomes.double() if logits.ndim == 1 else outcomes


def _hits(logits: Tensor, outcome: Tensor) -> Tensor:
    """Whether the most probable outcome came, as numbers."""
    logits = logits.detach()
    right = logits.argmax(1) == outcome if logits.ndim == 2 else (logits > 0) == (outcome > 0.5)
    return right.double()
