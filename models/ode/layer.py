"""The neural ODE layer: any module or function f(t, y) becomes a layer whose output is where its trajectory ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...solvers.ode import CheckpointAdjoint, Controller, Method, ODESolution, PIDController, Tsit5, solve_ode
from ...solvers.ode.adjoint import Adjoint
from .field import Field, hold, refuse_unsteady, takes_time

State = Any


class NeuralODE(nn.Module):
    """A layer whose output is the end of a trajectory: dy/dt = field(t, y) from y(t0) = x.

    train() and eval() solve the same problem (dropout apart) and both have gradients. The layer keeps nothing from one
    call to the next; `solve` returns how a solve went.

    Args:
        field: f(t, y) -> dy/dt, or f(y), an nn.Module or a function; t is 0-dim, or (batch,) where samples take
            their own steps. y is a tensor, or a tuple, list or dict of tensors, with the batch in front; row i of the
            result depends on row i of y alone. Further positional arguments are those given as `args` to a call.
        t: start and end; time may run backwards.
        augment: so many channels of zeros are appended to x (dimension 1) before the solve, and are part of the
            result, which lifts the restriction that trajectories in the space of x cannot cross.
        solver: an integrator of `restpoint.solvers.ode`.
        controller: of its steps: adaptive, or `ConstantController(dt=...)`; `per_sample=True` lets each sample take
            its own.
        adjoint: how the trajectory is differentiated.
        rtol: relative tolerance of a step.
        atol: absolute tolerance of a step.
        max_steps: budget of steps.
        throw: what to do when a solve fails: True raises, "warn" warns, False leaves it to the statistics.

    Raises:
        TypeError: the field cannot be called with (t, y) or y.
        ValueError: an option out of range, or a field with torch's dropout or batch normalisation, which are no
            function of time and state per sample.

    Source: Chen, Rubanova, Bettencourt and Duvenaud 2018; augmentation: Dupont, Doucet and Teh 2019, section 4.

    Example:
        >>> layer = NeuralODE(nn.Linear(3, 3))
        >>> layer(torch.ones(4, 3)).shape
        torch.Size([4, 3])
    """

    def __init__(
        self,
        field: Field,
        *,
        t: tuple[float, float] = (0.0, 1.0),
        augment: int = 0,
        solver: Method | None = None,
        controller: Controller | None = None,
        adjoint: Adjoint | CheckpointAdjoint | None = None,
        rtol: float = 1e-3,
        atol: float = 1e-3,
        max_steps: int = 10_000,
        throw: bool | str = True,
    ) -> None:
        super().__init__()
        self._timed = takes_time(field)
        refuse_unsteady(field, "NeuralODE")
        if len(t) != 2 or t[0] == t[1]:
            raise ValueError(f"NeuralODE: t must be a start and another time to end at; got {t}.")
        if augment < 0:
            raise ValueError(f"NeuralODE: augment must be at least 0; got {augment}.")
        self.field = field
        self.t = (float(t[0]), float(t[1]))
        self.augment = augment
        self.solver = Tsit5() if solver is None else solver
        self.controller = PIDController() if controller is None else controller
        self.adjoint = CheckpointAdjoint() if adjoint is None else adjoint
        self.rtol, self.atol, self.max_steps, self.throw = rtol, atol, max_steps, throw

    def forward(self, x: State, t: Tensor | Sequence[float] | None = None, args: tuple[Any, ...] = ()) -> State:
        """Where the trajectory from x leads.

        Args:
            x: the state at the start; batch in front.
            t: times (T,), or (batch, T), of which the first is the start; None for those of the layer.
            args: further arguments of the field; tensors among them have the batch in front.

        Returns:
            The state at the end, of the structure of x; where `t` is given, the states at all these times, stacked
            in front: (T, batch, ...).
        """
        value = self.solve(x, t, args).value
        return value if t is not None else _last(value)

    def solve(
        self, x: State, t: Tensor | Sequence[float] | None = None, args: tuple[Any, ...] = ()
    ) -> ODESolution[Any]:
        """The trajectory with its statistics; arguments as of `forward`.

        Returns:
            The solution of `solve_ode`: its value holds the states at all times, also where these are the layer's.

        Raises:
            ValueError: x cannot be augmented; TimeError and StateError as of `solve_ode`.
            SolverError: the solve failed and `throw` is True.
        """
        times = self.t if t is None else t
        # Autocast chooses types for the field; a trajectory adds up small steps, and stays in full precision.
        y0 = torch.utils._pytree.tree_map(_whole, self.augmented(x))
        start = float(times[0]) if not isinstance(times, Tensor) else float(times.detach().reshape(-1)[0])
        field, args = hold(self.field, self._timed, start, y0, args)
        return solve_ode(
            field,
            y0,
            times,
            args,
            solver=self.solver,
            controller=self.controller,
            adjoint=self.adjoint,
            rtol=self.rtol,
            atol=self.atol,
            max_steps=self.max_steps,
            throw=self.throw,
        )

    def augmented(self, x: State) -> State:
        """x with the layer's further channels of zeros; x itself where there are none."""
        if not self.augment:
            return x
        if not isinstance(x, Tensor) or x.ndim < 2:
            raise ValueError("NeuralODE: augment needs x to be one tensor (batch, channels, ...).")
        return torch.cat([x, x.new_zeros(len(x), self.augment, *x.shape[2:])], dim=1)

    def extra_repr(self) -> str:
        """The options, for repr()."""
        names = ["t", "solver", "controller", "adjoint", "rtol", "atol", "max_steps"]
        names += ["augment"] if self.augment else []
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


def _whole(leaf: Any) -> Any:
    halved = isinstance(leaf, Tensor) and leaf.dtype in (torch.float16, torch.bfloat16)
    return leaf.float() if halved and torch.is_autocast_enabled(leaf.device.type) else leaf


def _last(value: State) -> State:
    return torch.utils._pytree.tree_map(lambda leaf: leaf[-1], value)
