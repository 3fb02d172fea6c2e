"""Continuous normalising flows: a density carried along the trajectories of a field."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

from ...solvers.ode import CheckpointAdjoint, Controller, Method, ODESolution, PIDController, Tsit5, solve_ode
from ...solvers.ode.adjoint import Adjoint
from ...solvers.options import require, suggest
from ..ode.field import Field, hold, refuse_unsteady, takes_time
from .coupling import COUPLINGS
from .divergence import Divergence, ExactTrace, Noise


@dataclasses.dataclass
class Transport:
    """Points carried along a flow, and what was integrated on the way.

    Attributes:
        value: where they arrive, (batch, *shape).
        log_det: log |det d value / d start|, (batch,), exact or estimated as the flow's divergence is.
        kinetic: the integral of |dy/dt|^2 over the length of time, (batch,); None where it was not asked for.
        jacobian: likewise that of the squared Frobenius norm of the field's Jacobian, exact or estimated.
        solution: how the solve went; its value is the state (points, integrals) at both ends.
    """

    value: Tensor
    log_det: Tensor
    kinetic: Tensor | None
    jacobian: Tensor | None
    solution: ODESolution[Any]


class ContinuousFlow(nn.Module):
    """A density: that of a base distribution, carried along dy/dt = field(t, y) from t[0] to t[1], where the data are.

    log p(x) = log base(z) + log |det dz/dx|, where z is reached from x backwards in time. The logarithm of the
    determinant is the integral of the field's divergence along the way; it is computed beside the state, and takes no
    part in the choice of steps. Noise of an estimated divergence is drawn at every call, and fixed within it, so that
    log_prob and sampling cost one well-posed solve each.

    train() and eval() compute the same thing (dropout apart); both have gradients, those of log_prob with respect to
    x included.

    Args:
        field: f(t, y) -> dy/dt, or f(y), an nn.Module or a function on (batch, *shape).
        shape: of a sample, such as 2 or (1, 28, 28).
        divergence: `ExactTrace()` for few dimensions, else `Hutchinson()` or `HutchPlusPlus()`.
        base: the distribution at t[0], with `shape` as its event shape; None for the standard normal one. It does not
            move with the module's device and type.
        t: the base's time and the data's.
        solver, controller, adjoint, rtol, atol, max_steps, throw: as of `restpoint.models.NeuralODE`.

    Raises:
        TypeError: the field cannot be called with (t, y) or y, or an option is of the wrong class.
        ValueError: an option out of range, a base of another shape, or a field with torch's dropout or batch
            normalisation, which are no function of time and state per sample.

    Source: Chen et al. 2018, theorem 1 and section 4; Grathwohl et al. 2019 (estimated divergence).

    Example:
        >>> flow = ContinuousFlow(nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2)), 2)
        >>> flow.log_prob(flow.sample(5)).shape
        torch.Size([5])
    """

    def __init__(
        self,
        field: Field,
        shape: int | tuple[int, ...],
        *,
        divergence: Divergence | None = None,
        base: Distribution | None = None,
        t: tuple[float, float] = (0.0, 1.0),
        solver: Method | None = None,
        controller: Controller | None = None,
        adjoint: Adjoint | CheckpointAdjoint | None = None,
        rtol: float = 1e-5,
        atol: float = 1e-5,
        max_steps: int = 10_000,
        throw: bool | str = True,
    ) -> None:
        super().__init__()
        self._timed = takes_time(field)
        refuse_unsteady(field, "ContinuousFlow")
        self.shape = (shape,) if isinstance(shape, int) else tuple(shape)
        self.divergence = ExactTrace() if divergence is None else divergence
        require(self.divergence, Divergence, "divergence")
        if not self.shape or min(self.shape) < 1:
            raise ValueError(f"ContinuousFlow: shape must be that of a sample, at least 1 everywhere; got {shape}.")
        if base is not None and (base.event_shape != self.shape or base.batch_shape):
            raise ValueError(
                f"ContinuousFlow: the base must have the event shape {self.shape} and no batch shape; got event "
                f"{tuple(base.event_shape)} and batch {tuple(base.batch_shape)}. See torch.distributions.Independent."
            )
        if len(t) != 2 or t[0] == t[1]:
            raise ValueError(f"ContinuousFlow: t must be the base's time and another one, the data's; got {t}.")
        self.field = field
        self.base = base
        self.t = (float(t[0]), float(t[1]))
        self.solver = Tsit5() if solver is None else solver
        self.controller = PIDController() if controller is None else controller
        self.adjoint = CheckpointAdjoint() if adjoint is None else adjoint
        self.rtol, self.atol, self.max_steps, self.throw = rtol, atol, max_steps, throw

    def forward(
        self, x: Float[Tensor, "batch *shape"], args: tuple[Any, ...] = ()
    ) -> tuple[Float[Tensor, "batch *shape"], Float[Tensor, " batch"]]:
        """From data to the base: z, and log |det dz/dx|.

        Args:
            x: points of the data's space.
            args: further arguments of the field; tensors among them have the batch in front.
        """
        carried = self.transport(x, args=args)
        return carried.value, carried.log_det

    def inverse(
        self, z: Float[Tensor, "batch *shape"], args: tuple[Any, ...] = ()
    ) -> tuple[Float[Tensor, "batch *shape"], Float[Tensor, " batch"]]:
        """From the base to data: x, and log |det dx/dz|; arguments as of `forward`."""
        carried = self.transport(z, inverse=True, args=args)
        return carried.value, carried.log_det

    def log_prob(self, x: Float[Tensor, "batch *shape"], args: tuple[Any, ...] = ()) -> Float[Tensor, " batch"]:
        """Log density at x, in nats; with an estimated divergence an unbiased estimate of it."""
        z, log_det = self(x, args)
        return self.base_log_prob(z) + log_det

    def base_log_prob(self, z: Float[Tensor, "batch *shape"]) -> Float[Tensor, " batch"]:
        """Log density of the base, in nats."""
        return self._base(z).log_prob(z)

    def sample(self, n: int, args: tuple[Any, ...] = ()) -> Float[Tensor, "n *shape"]:
        """Draw n points, differentiable in the field's parameters.

        Args:
            n: how many.
            args: further arguments of the field; tensors among them have n rows.
        """
        parameter = next((p for p in _parameters(self.field) if p.is_floating_point()), None)
        z = self._base(torch.empty(0) if parameter is None else parameter).sample(torch.Size([n]))
        z = z if parameter is None else z.to(parameter)
        return self._solve(z, self.t, self._plain, z, args).value[-1]

    def transport(
        self, start: Float[Tensor, "batch *shape"], *, inverse: bool = False, energies: bool = False,
        args: tuple[Any, ...] = (),
    ) -> Transport:  # fmt: skip
        """Carry points along the flow.

        Args:
            start: points of the data's space, or with `inverse` of the base's.
            inverse: from the base to data.
            energies: integrate |dy/dt|^2 and |df/dy|^2 too, the regularisers of RNODE, which keep trajectories
                straight and cheap to follow.
            args: further arguments of the field; tensors among them have the batch in front.

        Raises:
            ValueError: the points are not of the flow's shape.
            SolverError: the solve failed and `throw` is True.

        Source: the energies: Finlay et al. 2020, equation 7.
        """
        if start.shape[1:] != self.shape:
            raise ValueError(f"ContinuousFlow: expected points (batch, *{self.shape}), got {tuple(start.shape)}.")
        if torch.is_inference_mode_enabled():
            # The divergence is a derivative, which inference mode cannot record.
            with torch.inference_mode(False), torch.no_grad():
                return self.transport(start.clone(), inverse=inverse, energies=energies, args=args)
        times = self.t if inverse else self.t[::-1]
        integrals = start.new_zeros(len(start), 3 if energies else 1)
        solution = self._solve((start, integrals), times, self._expanded(energies), start, args, divergence=True)
        value, integrals = solution.value[0][-1], solution.value[1][-1]
        lengths = integrals[:, 1:] * (1.0 if times[1] > times[0] else -1.0)
        kinetic, jacobian = lengths.unbind(1) if energies else (None, None)
        return Transport(value, integrals[:, 0], kinetic, jacobian, solution)

    def matching_loss(
        self, x: Float[Tensor, "batch *shape"], args: tuple[Any, ...] = (), *, coupling: str = "independent"
    ) -> Float[Tensor, " batch"]:
        """How far the field is from moving the base to the data at constant speed on straight lines; no solve.

        Each x is paired with a fresh z of the base and a time, uniform between the flow's; the loss is the squared
        distance of the field on the line between them from the line's velocity. The field that makes its mean least
        carries the base to the data. The field is given times (batch,).

        Args:
            x: points of the data's space.
            args: further arguments of the field; tensors among them have the batch in front.
            coupling: "independent", or "optimal" to pair the batch's z and x by least total squared distance.

        Raises:
            ValueError: another coupling.

        Source: Lipman et al. 2023, equation 23 with sigma_min = 0; Tong et al. 2024 (both couplings).
        """
        if coupling not in COUPLINGS:
            raise ValueError(
                f"ContinuousFlow: coupling must be one of {', '.join(map(repr, COUPLINGS))}; got {coupling!r}."
                f"{suggest(coupling, list(COUPLINGS))}"
            )
        z = self._base(x).sample(torch.Size([len(x)])).to(x)
        z = z[COUPLINGS[coupling](z, x)]
        share = torch.rand(len(x), dtype=x.dtype, device=x.device)
        start, length = self.t[0], self.t[1] - self.t[0]
        field, args = hold(self.field, self._timed, start, x, args)
        there = z + share.view(-1, *[1] * (x.ndim - 1)) * (x - z)
        velocity = field(start + length * share, there, *args)
        return (velocity - (x - z) / length).flatten(1).square().sum(1)

    def _solve(
        self,
        state: Any,
        times: tuple[float, ...],
        function: Callable[..., Any],
        start: Tensor,
        args: tuple[Any, ...],
        divergence: bool = False,
    ) -> ODESolution[Any]:
        field, args = hold(self.field, self._timed, times[0], start, args)
        noise: Noise = ()
        if divergence:
            time = torch.full((), times[0], dtype=start.dtype, device=start.device)
            noise = self.divergence.draw(lambda y: field(time, y, *args), start)
        return solve_ode(
            function(field, len(noise)),
            state,
            times,
            (*noise, *args),
            solver=self.solver,
            controller=self.controller,
            adjoint=self.adjoint,
            rtol=self.rtol,
            atol=self.atol,
            max_steps=self.max_steps,
            quadrature=(1,) if divergence else (),
            throw=self.throw,
        )

    def _plain(self, field: Field, drawn: int) -> Field:
        return field

    def _expanded(self, energies: bool) -> Callable[[Field, int], Field]:
        """The field together with what is integrated beside it, as functions of (t, state, *noise, *args)."""

        def expanded(field: Field, drawn: int) -> Field:
            def function(t: Tensor, state: tuple[Tensor, Tensor], *args: Any) -> tuple[Tensor, Tensor]:
                noise, further = args[:drawn], args[drawn:]
                found = self.divergence(lambda y: field(t, y, *further), state[0], noise)
                rates = [found.divergence]
                if energies:
                    rates += [found.derivative.flatten(1).square().sum(1), found.squares]
                return found.derivative, torch.stack(rates, dim=1)

            return function

        return expanded

    def _base(self, like: Tensor) -> Distribution:
        if self.base is not None:
            return self.base
        zeros = torch.zeros(self.shape, dtype=like.dtype, device=like.device)
        return Independent(Normal(zeros, torch.ones_like(zeros), validate_args=False), len(self.shape))

    def extra_repr(self) -> str:
        """The options, for repr()."""
        names = ("shape", "divergence", "t", "solver", "controller", "adjoint", "rtol", "atol", "max_steps")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


def _parameters(field: Field) -> list[Tensor]:
    return list(field.parameters()) if isinstance(field, nn.Module) else []
