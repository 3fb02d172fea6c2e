"""What moves, and how it goes on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models.physics import UnstructuredODE
from ...solvers.options import options
from ..data.physics import HORIZONS, Trajectories, TrajectoryBatches
from .task import Outcome, Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What the energy of others is drawn beside.
BASELINE = "unstructured_ode_small"


@options
class TrajectoryRegression(Task):
    """The mean squared error of trajectories that go on from their first observations.

    A model maps observations (batch, seen, state) and times to states (batch, times, state), positions before momenta.
    One whose attribute `sees_momenta` is False is trained by the positions alone.
    """

    kind = "trajectory-regression"
    metric = "energy_drift"

    def losses(self, model: nn.Module, batch: Trajectories, step: int) -> Outcome:
        """Mean squared error of positions, and of momenta where they are seen."""
        seen, times, states = batch
        predicted = model(seen, times)
        if not getattr(model, "sees_momenta", True):
            half = states.shape[-1] // 2
            predicted, states = predicted[..., :half], states[..., :half]
        loss = F.mse_loss(predicted, states)
        return Outcome(loss, {})

    def evaluate(self, model: nn.Module, batches: Iterable[Trajectories]) -> dict[str, float]:
        """How well the model goes on for ten times as long as it was trained to, and keeps the energy.

        Args:
            model: of trajectories.
            batches: `TrajectoryBatches`, whose system knows the true energy.

        Returns:
            energy_drift: the root mean square, over trajectories and times, of the energy's difference from its value
            at the start, relative to that; smaller is better. energy_mse: the mean squared difference within the first
            of the ten horizons, in the system's own units. trajectory_mse and trajectory_mse_long: mean squared error
            of positions and momenta, within the first horizon and over all ten.
        """
        assert isinstance(batches, TrajectoryBatches)
        was_training = model.training
        model.eval()
        found: list[Tensor] = []
        truth: list[Tensor] = []
        with torch.no_grad():
            for seen, times, states in batches:
                found.append(model(seen, times).double().cpu())
                truth.append(states.double().cpu())
        model.train(was_training)
        predicted, states = torch.cat(found), torch.cat(truth)
        energy, start = batches.system.energy(predicted), batches.system.energy(states[:, :1])
        first = (states.shape[1] - 1) // HORIZONS + 1
        squares = (predicted - states).square()
        return {
            "energy_drift": float(((energy - start) / start).square().mean().sqrt()),
            "energy_mse": float((energy - start)[:, :first].square().mean()),
            "trajectory_mse": float(squares[:, :first].mean()),
            "trajectory_mse_long": float(squares.mean()),
        }

    def draw(self, model: nn.Module, source: Any) -> Figure:
        """One test trajectory beside the truth, and the energy of several over ten times the training horizon.

        Where an unstructured ODE of the same data is shipped, its energy is drawn, too.
        """
        from matplotlib.figure import Figure

        from ...zoo import create_model, list_models

        batches = source.test_batches(8, 8)
        seen, times, states = next(iter(batches))
        predicted, degrees = model(seen, times), states.shape[-1] // 2
        first = (len(times) - 1) // HORIZONS
        figure = Figure(figsize=(10, 4), layout="constrained")
        axes: Any = figure.subplots(1, 2, width_ratios=[1, 1.7])
        left, right = axes
        pairs = [(0, 1)] if degrees == 1 else [(2 * body, 2 * body + 1) for body in range(degrees // 2)]
        for x, y in pairs:
            left.plot(*states[0, : 3 * first, [x, y]].T, color="0.7", linewidth=4, label="truth")
            left.plot(*predicted[0, : 3 * first, [x, y]].T, color="C0", linewidth=1, label="model")
        left.plot(*states[0, 0, [0, 1]], "o", color="0.3", markersize=5)
        names = ("q", "p") if degrees == 1 else ("x", "y")
        left.set(xlabel=names[0], ylabel=names[1], title="three training horizons", aspect="equal")
        left.legend(*[part[:2] for part in left.get_legend_handles_labels()], loc="upper right", fontsize=7)
        system = batches.system
        start = system.energy(states[:, :1].double())
        shown = [(predicted, "C0", "model")]
        for name in list_models(f"{BASELINE}.{source.name}", pretrained=True):
            if not isinstance(model, UnstructuredODE):
                shown.insert(0, (create_model(name, pretrained=True).eval()(seen, times), "C1", "unstructured ODE"))
        for states_of, colour, label in shown:
            relative = (system.energy(states_of.double()) - start) / start.abs()
            lines = right.plot(times, relative.T, linewidth=0.8, color=colour, alpha=0.7)
            lines[0].set_label(label)
        right.legend(loc="upper left", fontsize=7, frameon=False)
        right.axhline(0.0, color="0.4", linewidth=1)
        right.axvspan(0, times[first], color="0.9")
        right.set_yscale("symlog", linthresh=0.01)
        right.set(xlabel="time; the grey part is as long as training", ylabel="relative error of the energy")
        right.set_title(f"energy over {HORIZONS} training horizons, {len(states)} test trajectories")
        for axis in axes:
            axis.spines[["top", "right"]].set_visible(False)
        return figure
