"""Networks whose capacities are learnt from what arrives."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ...solvers.options import options
from ..data.traffic import Flows
from .task import Outcome, Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@options
class TrafficFlow(Task):
    """The squared error of what arrives, relative to its mean square."""

    kind = "traffic"
    metric = "explained"

    def prepare(self, model: nn.Module, source: Any) -> None:
        """Tell the model which paths there are."""
        model.fit(source.network.routing, source.network.ends)  # type: ignore[operator]

    def losses(self, model: nn.Module, batch: Flows, step: int) -> Outcome:
        """The error of a batch."""
        demands, _, arrived = batch
        loss = (model(demands) - arrived).square().mean() / arrived.square().mean()
        return Outcome(loss, {"error": float(loss.detach())})

    def use(self, model: nn.Module, batch: Flows) -> Any:
        """What arrives of the demands."""
        return model(batch[0])

    def evaluate(self, model: nn.Module, batches: Iterable[Flows]) -> dict[str, float]:
        """How well arrivals are told, and capacities recovered.

        Returns:
            explained, one less the squared error relative to the arrivals' variance; error, the mean absolute error
            relative to the mean arrival; of the links that are full in one of these rows at least, capacity_error, the
            mean relative error of their capacities, and capacity_median, its median.
        """
        squares = absolute = 0.0
        seen, capacities = [], []
        with torch.no_grad():
            for demands, felt, arrived in batches:
                off = model(demands) - arrived
                squares, absolute = squares + float(off.square().sum()), absolute + float(off.abs().sum())
                seen.append(arrived)
                capacities.append(felt.nan_to_num(0.0).amax(0))
            truth = torch.stack(capacities).amax(0)
            known = truth > 0
            relative = (model.capacities[known] / truth[known] - 1).abs()  # type: ignore[index]
        every = torch.cat(seen)
        return {
            "explained": 1 - squares / float((every - every.mean()).square().sum()),
            "error": absolute / float(every.sum()),
            "capacity_error": float(relative.mean()),
            "capacity_median": float(relative.median()),
        }

    def draw(self, model: nn.Module, source: Any) -> Figure:
        """Learnt capacities against the true ones, and what arrives as told against what does."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 4.2), layout="constrained", facecolor="white")
        left, right = figure.subplots(1, 2)
        full = (~source.train[1].isnan()).any(0)
        own = model.capacities.detach().cpu()  # type: ignore[operator]
        for known, label, marker in ((full, "ever full in training", "o"), (~full, "never full: unknowable", "x")):
            left.plot(source.capacities[known], own[known], marker, label=label)
        reach = [0, 1.05 * float(source.capacities.max())]
        left.plot(reach, reach, color="0.6", linewidth=0.8)
        left.set(xlabel="true capacity", ylabel="learnt capacity", title="links", xlim=reach, ylim=reach)
        left.legend(fontsize=8)
        demands, _, arrived = next(iter(source.test_batches(64, 64)))
        said = model(demands.to(next(model.parameters()).device)).cpu()
        reach = [0, 1.05 * float(arrived.max())]
        right.plot(reach, reach, color="0.6", linewidth=0.8)
        right.plot(arrived.flatten(), said.flatten(), ".", markersize=3)
        right.set(xlabel="arrives", ylabel="told by the layer", title="pairs of nodes, of 64 test matrices")
        figure.suptitle(f"{source.name}: capacities learnt from what arrives", fontsize=11)
        return figure
