"""Latent ODEs: an irregular series as noisy observations of one trajectory in a latent space."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from ...solvers.ode import CheckpointAdjoint, Controller, Dopri5, Method, ODESolution, PIDController, solve_ode
from ...solvers.ode.adjoint import Adjoint
from ..registry import register_model
from .ode_rnn import ODERNN, tanh_layers, with_static


class LatentODE(nn.Module):
    """Variational autoencoder of irregular series whose latent variable is where a trajectory starts.

    An `ODERNN` reads the series from its end to its start and gives the posterior q(z0 | series), a normal distribution
    with independent components. The trajectory dz/dt = field(z) from z0 explains the observations: value v of the
    series at time t has the mean decoder(z(t))_v and the deviation `noise`. A classifier reads z0. Only what was
    observed enters the likelihood. One solve over the whole span serves all samples: its dense output is read at
    the times of each, so there is no union of times to be stepped through.

    Unlike in the paper the statics are no variables of the series: they enter the posterior beside the encoder's state.

    Args:
        variables: of the series.
        statics: values known from the start.
        num_classes: 1 for the logit of an event, which then has no dimension of its own.
        latent: length of z.
        hidden: of the encoder's state.
        width: of the layers of both fields and of the classifier.
        depth: layers of both fields.
        span: so long, from their start, are the series that the decoder is asked for; one unit of time.
        noise: standard deviation of an observation.
        solver, controller, rtol, atol, max_steps: of the decoder's trajectory; Dopri5() with adaptive steps.
        encoder_solver, encoder_controller: of each interval of the encoder; as of `ODERNN`.
        adjoint: of both; None takes `CheckpointAdjoint(recursive=True)`, whose memory hardly grows with the steps.

    Source: Rubanova, Chen and Duvenaud 2019, Latent ODEs for irregularly-sampled time series, section 3.2; sizes
    from its appendix on PhysioNet.
    """

    def __init__(
        self,
        *,
        variables: int,
        statics: int = 0,
        num_classes: int = 1,
        latent: int = 20,
        hidden: int = 40,
        width: int = 50,
        depth: int = 3,
        span: float = 1.0,
        noise: float = 0.1,
        solver: Method | None = None,
        controller: Controller | None = None,
        adjoint: Adjoint | CheckpointAdjoint | None = None,
        encoder_solver: Method | None = None,
        encoder_controller: Controller | None = None,
        rtol: float = 1e-3,
        atol: float = 1e-4,
        max_steps: int = 10_000,
    ) -> None:
        super().__init__()
        if not noise > 0 or not span > 0:
            raise ValueError(f"LatentODE: noise and span must be positive; got {noise} and {span}.")
        self.statics, self.num_classes, self.latent, self.span, self.noise = statics, num_classes, latent, span, noise
        self.encoder = ODERNN(
            variables, hidden, width=width, depth=depth, span=span, solver=encoder_solver,
            controller=encoder_controller, adjoint=adjoint,
        )  # fmt: skip
        self.posterior_layers = tanh_layers(hidden + statics, 2 * width, 1, 2 * latent)
        self.field = tanh_layers(latent, width, depth, latent)
        self.decoder = nn.Linear(latent, variables)
        self.classifier = tanh_layers(latent, width, 2, num_classes)
        self.solver = Dopri5() if solver is None else solver
        self.controller = PIDController() if controller is None else controller
        self.adjoint = CheckpointAdjoint(recursive=True) if adjoint is None else adjoint
        self.rtol, self.atol, self.max_steps = rtol, atol, max_steps

    def posterior(
        self,
        times: Float[Tensor, "batch length"],
        values: Float[Tensor, "batch length variables"],
        observed: Bool[Tensor, "batch length variables"],
        static: Float[Tensor, "batch statics"] | None = None,
    ) -> tuple[Float[Tensor, "batch latent"], Float[Tensor, "batch latent"]]:
        """Mean and deviation of q(z0 | series); arguments as of `forward`."""
        state = with_static(self.encoder(times, values, observed, backwards=True), static, self.statics)
        mean, spread = self.posterior_layers(state).chunk(2, -1)
        return mean, nn.functional.softplus(spread) + 1e-4

    def solve(self, z0: Float[Tensor, "batch latent"]) -> ODESolution[Tensor]:
        """The trajectory from z0 over one span, with its dense output."""
        return solve_ode(
            self._rate,
            z0,
            (0.0, 1.0),
            solver=self.solver,
            controller=self.controller,
            adjoint=self.adjoint,
            rtol=self.rtol,
            atol=self.atol,
            max_steps=self.max_steps,
            dense=True,
        )

    def decode(
        self, z0: Float[Tensor, "batch latent"], times: Float[Tensor, "batch points"]
    ) -> Float[Tensor, "batch points variables"]:
        """What is expected at each series' `times` since its start.

        Raises:
            TimeError: a time that lies outside of the span.
        """
        interpolation = self.solve(z0).interpolation
        assert interpolation is not None
        return self.decoder(interpolation(times.double() / self.span).transpose(0, 1))

    def classify(self, z0: Float[Tensor, "batch latent"]) -> Float[Tensor, " batch"] | Float[Tensor, "batch classes"]:
        """Logits of latent states."""
        logits = self.classifier(z0)
        return logits.squeeze(-1) if self.num_classes == 1 else logits

    def forward(
        self,
        times: Float[Tensor, "batch length"],
        values: Float[Tensor, "batch length variables"],
        observed: Bool[Tensor, "batch length variables"],
        static: Float[Tensor, "batch statics"] | None = None,
    ) -> Float[Tensor, " batch"] | Float[Tensor, "batch classes"]:
        """Logits at the posterior's mean.

        Args:
            times: ascending in each row; a series that has ended repeats its last time.
            values: standardised; what stands where nothing was observed is not read.
            observed: which of them were measured.
            static: what is known from the start.

        Raises:
            ValueError: shapes that do not fit each other or the model, or times that descend.
            SolverError: a solve failed.
        """
        return self.classify(self.posterior(times, values, observed, static)[0])

    def explain(
        self,
        times: Float[Tensor, "batch length"],
        values: Float[Tensor, "batch length variables"],
        observed: Bool[Tensor, "batch length variables"],
        static: Float[Tensor, "batch statics"] | None = None,
        kl_weight: float = 1.0,
    ) -> tuple[Tensor, Float[Tensor, " batch"]]:
        """Logits and evidence lower bound at one sample of the posterior, drawn from torch's generator.

        Args:
            times, values, observed, static: as of `forward`; times are counted from each series' first.
            kl_weight: of the divergence from the prior, which is annealed in training; 1 gives the bound.

        Returns:
            Logits, and per series the masked Gaussian log-likelihood less the weighted divergence of q(z0 | series)
            from the standard normal prior, in nats an observed value.

        Raises:
            TimeError: a series longer than the span.
        """
        mean, spread = self.posterior(times, values, observed, static)
        z0 = mean + spread * torch.randn_like(mean)
        found = self.decode(z0, times - times[:, :1])
        error = torch.where(observed, values - found, torch.zeros_like(values)) / self.noise
        count = observed.sum((1, 2)).to(values.dtype)
        constant = math.log(self.noise) + 0.5 * math.log(2 * math.pi)
        likelihood = -0.5 * error.square().sum((1, 2)) - constant * count
        divergence = 0.5 * (mean.square() + spread.square() - 1 - 2 * spread.log()).sum(1)
        return self.classify(z0), (likelihood - kl_weight * divergence) / count.clamp(min=1)

    def _rate(self, t: Tensor, z: Tensor) -> Tensor:
        return self.field(z)


@register_model(family="series", task="series-classification", accepts=LatentODE)
def latent_ode_small(**arguments: Any) -> LatentODE:
    """The latent ODE of Rubanova et al. 2019 with its sizes for PhysioNet: 20 latent and 40 recurrent states."""
    return LatentODE(**{"variables": 12, **arguments})


@register_model(family="series", task="series-classification", accepts=LatentODE)
def test_latent_ode(**arguments: Any) -> LatentODE:
    """A latent ODE small enough for tests."""
    return LatentODE(**{"variables": 3, "latent": 3, "hidden": 4, "width": 8, "depth": 1, **arguments})
