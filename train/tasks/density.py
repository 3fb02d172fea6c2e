"""Density estimation."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...models.flow import ContinuousFlow
from ...solvers.options import options
from ...zoo.demo_flow import draw, portray
from ..data.density import Points, PointSource
from ..data.uci import TableSource
from .flow_figures import table_figure
from .task import Outcome, Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PIXELS = 96


@options
class DensityEstimation(Task):
    """Negative log-likelihood, and for continuous flows what makes them cheap to train and to follow.

    Any model that offers `log_prob` can be trained; the options below apply to a `ContinuousFlow`.

    Attributes:
        matching: so many steps of the optimiser go by flow matching, which needs no solve, before the likelihood's.
        kinetic: weight of the mean integral of |dy/dt|^2; 0 for none.
        jacobian: weight of the mean integral of the squared Frobenius norm of the field's Jacobian; 0 for none.

    Source: flow matching: Lipman et al. 2023; the two weights: Finlay et al. 2020 (RNODE), equation 7.
    """

    matching: int = 0
    kinetic: float = 0.0
    jacobian: float = 0.0

    kind = "density"
    metric = "log_likelihood"

    @property
    def twice(self) -> bool:  # type: ignore[override]
        """The divergence in the likelihood is a derivative."""
        return True

    def losses(self, model: nn.Module, batch: Points, step: int) -> Outcome:
        """Negative log-likelihood of a batch, in nats a point, and the regularisers."""
        points, _ = batch
        if not isinstance(model, ContinuousFlow):
            loss = -model.log_prob(points).mean()  # type: ignore[operator]
            return Outcome(loss, {"nll": float(loss.detach())})
        if step < self.matching:
            loss = model.matching_loss(points).mean()
            return Outcome(loss, {"matching": float(loss.detach())})
        energies = self.kinetic > 0 or self.jacobian > 0
        carried = model.transport(points, energies=energies)
        loss = -(model.base_log_prob(carried.value) + carried.log_det).mean()
        metrics = {"nll": float(loss.detach())}
        if carried.kinetic is not None and carried.jacobian is not None:
            kinetic, jacobian = carried.kinetic.mean(), carried.jacobian.mean()
            metrics |= {"kinetic": float(kinetic.detach()), "jacobian": float(jacobian.detach())}
            loss = loss + self.kinetic * kinetic + self.jacobian * jacobian
        return Outcome(loss, metrics, [carried.solution])

    def pictures(self, model: nn.Module) -> dict[str, Tensor]:
        """For continuous flows in the plane: how many of 4,096 samples fall on each pixel of [-5, 5]^2."""
        if not (isinstance(model, ContinuousFlow) and model.shape == (2,)):
            return {}
        with torch.no_grad(), torch.random.fork_rng(devices=_devices(model)):
            torch.manual_seed(0)
            samples = model.sample(4096).cpu().double()
        counts = torch.histogramdd(samples, [PIXELS, PIXELS], range=[-5.0, 5.0, -5.0, 5.0]).hist
        # Rows go down in a picture, and y goes up.
        picture = (counts / counts.max().clamp_min(1)).sqrt().T.flip(0).float()
        return {"samples": picture.unsqueeze(0)}

    def evaluate(self, model: nn.Module, batches: Iterable[Points]) -> dict[str, float]:
        """Likelihood of points whose log density is known, the true one or where `batches.reference` says so another's.

        Returns:
            In nats a point: log_likelihood of the model; nll, its negative. Where the true density is known: true_nll,
            what it reaches on the same points; divergence, their difference: an unbiased estimate of the
            Kullback-Leibler divergence of the model from the truth, and its standard error. For tables:
            gaussian_log_likelihood, that of the normal distribution fitted to the training rows, log_likelihood_error,
            the standard error of the mean, and gain over the normal distribution, with its own. For continuous flows
            also evaluations (mean a point).
        """
        was_training = model.training
        model.eval()
        found: list[Tensor] = []
        truth: list[Tensor] = []
        evaluations: list[Tensor] = []
        with torch.no_grad():
            for points, log_p in batches:
                if isinstance(model, ContinuousFlow):
                    carried = model.transport(points)
                    found.append((model.base_log_prob(carried.value) + carried.log_det).double())
                    evaluations.append(carried.solution.stats.evaluations.double())
                else:
                    found.append(model.log_prob(points).double())  # type: ignore[operator]
                truth.append(log_p.double())
        model.train(was_training)
        log_q, log_p = torch.cat(found), torch.cat(truth)
        result: dict[str, Any] = {"log_likelihood": float(log_q.mean()), "nll": -float(log_q.mean())}
        if getattr(batches, "reference", "true") == "gaussian":
            result |= {"log_likelihood_error": _error(log_q), "gaussian_log_likelihood": float(log_p.mean())}
            result |= {"gain": float((log_q - log_p).mean()), "gain_error": _error(log_q - log_p)}
        else:
            result |= {"true_nll": -float(log_p.mean()), "divergence": float((log_p - log_q).mean())}
            result |= {"divergence_error": _error(log_p - log_q)}
        return {**result, "evaluations": float(torch.cat(evaluations).mean())} if evaluations else result

    def use(self, model: nn.Module, batch: Points) -> Tensor:
        """The points' log density."""
        return model.log_prob(batch[0])  # type: ignore[operator]

    def draw(self, model: nn.Module, source: Any) -> Figure | None:
        """For continuous flows: in the plane the true density, the model's, and samples; of tables rows and samples."""
        if isinstance(model, ContinuousFlow) and isinstance(source, TableSource):
            rows = source.test[:1000].float()
            return table_figure(rows, model.sample(len(rows)).cpu(), f"{source.name}: the target against other columns")
        if not (isinstance(model, ContinuousFlow) and isinstance(source, PointSource)):
            return None
        measured = self.evaluate(model, source.test_batches(500))
        name = str(getattr(getattr(model, "blueprint", None), "architecture", type(model).__name__))
        return draw([portray(name, model, source.density, measured["nll"], measured["true_nll"])])


def _error(values: Tensor) -> float:
    """Standard error of the mean."""
    return float(values.std()) / math.sqrt(len(values))


def _devices(model: nn.Module) -> list[torch.device]:
    return list({p.device for p in model.parameters() if p.device.type == "cuda"})
