"""The small interface between the loop and what is trained."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ...solvers import Solution

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclasses.dataclass
class Outcome:
    """What one batch gave.

    Attributes:
        loss: scalar, to be differentiated.
        metrics: scalars worth a curve.
        solutions: the solves on the way, whose adjoint_stats fill in when the loss is differentiated. Where a task
            leaves them out, the loop finds those of the model's layers by itself.
    """

    loss: Tensor
    metrics: dict[str, float]
    solutions: list[Solution[Any]] = dataclasses.field(default_factory=list)


class Task(abc.ABC):
    """A loss to train by and metrics to report.

    Attributes:
        kind: the registry's word for the models that the task fits.
        metric: the key of `evaluate`'s result that counts, larger being better.
        twice: whether the loss holds derivatives, and is differentiated twice, which compiled code cannot be.
    """

    kind: str
    metric: str
    twice: bool = False

    def prepare(self, model: nn.Module, source: Any) -> None:
        """Show the model the data set before the first step, for what is not learnt by gradients."""
        return None

    @abc.abstractmethod
    def losses(self, model: nn.Module, batch: Any, step: int) -> Outcome:
        """The loss of one training batch at optimiser step `step`."""

    @abc.abstractmethod
    def evaluate(self, model: nn.Module, batches: Iterable[Any]) -> dict[str, float]:
        """Metrics over all `batches`, with the model in eval mode and without gradients.

        Returns:
            Metrics by name; the first is what models of this kind are compared by, in tables and beside the literature.
        """

    def use(self, model: nn.Module, batch: Any) -> Any:
        """What a user does with the model, on one batch of evaluation: what it costs is measured.

        Returns:
            Tensors, or a structure of them, that gradients can be computed of. Where it is not said otherwise that is
            the model of all that a batch holds but the last, which is what the model should tell.
        """
        return model(*batch[:-1])

    def draw(self, model: nn.Module, source: Any) -> Figure | None:
        """A picture of what the model does, for its card.

        Called in eval mode, without gradients, and with a seed of its own, so that it draws the same whenever it does.

        Args:
            model: trained.
            source: the data set, of which the test set is shown.

        Returns:
            A figure of matplotlib, about 9 by 4 inches; None where there is nothing to see.
        """
        return None

    def diagnose(self, model: nn.Module, batch: Any) -> dict[str, float]:
        """What costs more than a step and is worth a curve; draws from no global generator."""
        return {}

    def pictures(self, model: nn.Module) -> dict[str, Tensor]:
        """What the model makes, as pictures (channels, height, width) in [0, 1]; draws from no global generator."""
        return {}
