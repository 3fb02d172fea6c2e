"""An event, foretold by an irregular series with missing values."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...solvers.options import options
from .task import Outcome, Task


@options
class SeriesClassification(Task):
    """Binary cross-entropy of an event's logit.

    A model maps (times, values, observed, static), as `restpoint.train.data.Series` has them, to logits (batch,).

    Attributes:
        positive_weight: of the samples where the event came, which are often few.
    """

    positive_weight: float = 1.0

    kind = "series-classification"
    metric = "auroc"

    def losses(self, model: nn.Module, batch: tuple[Tensor, ...], step: int) -> Outcome:
        """Binary cross-entropy in nats a series."""
        *series, outcome = batch
        logits = model(*series)
        weight = logits.new_tensor(self.positive_weight)
        loss = F.binary_cross_entropy_with_logits(logits, outcome.to(logits), pos_weight=weight)
        return Outcome(loss, {"accuracy": float(((logits.detach() > 0) == (outcome > 0.5)).double().mean())})

    def evaluate(self, model: nn.Module, batches: Iterable[tuple[Tensor, ...]]) -> dict[str, float]:
        """How well the event is foretold.

        Returns:
            auroc and auprc, the areas under the receiver's operating characteristic and under precision over recall
            (average precision); cross_entropy in nats a series; accuracy; events, the share of series with the event,
            which is what auprc is without any knowledge.
        """
        from sklearn.metrics import average_precision_score, roc_auc_score

        was_training = model.training
        model.eval()
        found, truth = [], []
        with torch.no_grad():
            for *series, outcome in batches:
                found.append(model(*series).double().cpu())
                truth.append(outcome.double().cpu())
        model.train(was_training)
        logits, events = torch.cat(found), torch.cat(truth)
        result = {
            "cross_entropy": float(F.binary_cross_entropy_with_logits(logits, events)),
            "accuracy": float(((logits > 0) == (events > 0.5)).double().mean()),
            "events": float(events.mean()),
        }
        if 0 < events.mean() < 1:  # else the areas do not exist
            result |= {
                "auroc": float(roc_auc_score(events, logits)), "auprc": float(average_precision_score(events, logits)),
            }  # fmt: skip
        return result
