"""The solvers that the ODE benchmark compares, each behind one interface."""

from __future__ import annotations

import abc
import contextlib
import importlib
import inspect
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from ode_problems import Problem
from torch import Tensor

from restpoint.solvers.ode import (
    BacksolveAdjoint,
    Dopri5,
    InterpolatedAdjoint,
    Kvaerno5,
    PIDController,
    Tsit5,
    odeint,
    odeint_adjoint,
    solve_ode,
)

Answer = tuple[Tensor, list[Tensor]]


class Solver(abc.ABC):
    """Somebody's way of solving a problem.

    Attributes:
        name: in the tables.
        ours: whether it is restpoint's.
    """

    name: str
    ours = False

    @abc.abstractmethod
    def forward(self, problem: Problem) -> Callable[[], Any]:
        """A function that solves, ready to be timed."""

    @abc.abstractmethod
    def backward(self, problem: Problem) -> Callable[[], Any]:
        """A function that solves and differentiates, ready to be timed."""

    @abc.abstractmethod
    def answer(self, problem: Problem, differentiate: bool) -> Answer:
        """The solution (T, batch, n), and the gradients of y0 and the parameters if asked for."""

    @abc.abstractmethod
    def counts(self, problem: Problem) -> tuple[int | None, int | None, int | None]:
        """Steps of the forward solve, its evaluations, and further ones of the backward pass."""


class TorchSolver(Solver):
    """One that is called from torch."""

    def __init__(self, name: str, solve: Callable[[Problem, Callable, Tensor], tuple[Tensor, int | None]], ours=False):
        """`solve` maps a problem, its field and y0 to the solution and the number of steps."""
        self.name, self._solve, self.ours = name, solve, ours

    def forward(self, problem: Problem) -> Callable[[], Any]:
        """As `Solver.forward`."""
        return lambda: self.answer(problem, False)

    def backward(self, problem: Problem) -> Callable[[], Any]:
        """As `Solver.backward`."""
        return lambda: self.answer(problem, True)

    def answer(self, problem: Problem, differentiate: bool) -> Answer:
        """As `Solver.answer`."""
        return self._run(problem, lambda t, y: problem.field(t, y, *problem.params), differentiate)[0]

    def _run(self, problem: Problem, field: Callable, differentiate: bool) -> tuple[Answer, int | None]:
        with torch.set_grad_enabled(differentiate):
            y0 = problem.y0.clone().requires_grad_(differentiate)
            solution, steps = self._solve(problem, field, y0)
            if not differentiate:
                return (solution, []), steps
            grads = torch.autograd.grad(solution.square().mean(), [y0, *problem.params])
            return (solution.detach(), list(grads)), steps

    def counts(self, problem: Problem) -> tuple[int | None, int | None, int | None]:
        """As `Solver.counts`."""
        forward, both = (Watched(lambda t, y: problem.field(t, y, *problem.params)) for _ in range(2))
        _, steps = self._run(problem, forward, False)
        self._run(problem, both, True)
        return steps, forward.calls, both.calls - forward.calls


class Watched:
    """A field that counts evaluations, and the steps of solvers that call back."""

    def __init__(self, field: Callable) -> None:
        self.field, self.calls, self.steps = field, 0, 0

    def __call__(self, t: Tensor, y: Tensor) -> Tensor:
        """The field."""
        self.calls += 1
        return self.field(t, y)

    def callback_step(self, t: Tensor, y: Tensor, dt: Tensor) -> None:
        """One more."""
        self.steps += 1


def steps_of(field: Callable) -> int | None:
    """The steps that a field was called back for, if it counts them."""
    return field.steps if isinstance(field, Watched) else None


def torchdiffeq_solvers() -> list[Solver]:
    """By taping and by its adjoint."""
    import torchdiffeq

    def direct(problem: Problem, field: Callable, y0: Tensor) -> tuple[Tensor, int | None]:
        solution = torchdiffeq.odeint(field, y0, problem.t, rtol=problem.rtol, atol=problem.atol)
        return solution, steps_of(field)

    def adjoint(problem: Problem, field: Callable, y0: Tensor) -> tuple[Tensor, None]:
        tolerance = {"rtol": problem.rtol, "atol": problem.atol}
        return torchdiffeq.odeint_adjoint(field, y0, problem.t, adjoint_params=problem.params, **tolerance), None

    return [TorchSolver("torchdiffeq", direct), TorchSolver("torchdiffeq adjoint", adjoint)]


def torchode_solvers() -> list[Solver]:
    """With steps per sample, as it always has."""
    import torchode

    def solve(problem: Problem, field: Callable, y0: Tensor) -> tuple[Tensor, int]:
        term = torchode.ODETerm(field)
        controller = torchode.IntegralController(atol=problem.atol, rtol=problem.rtol, term=term)
        adjoint = torchode.AutoDiffAdjoint(torchode.Dopri5(term), controller, backprop_through_step_size_control=False)
        times = problem.t.expand(len(y0), -1)
        solution = adjoint.solve(torchode.InitialValueProblem(y0=y0, t_eval=times))
        return solution.ys.transpose(0, 1), int(solution.stats["n_steps"].max())

    return [TorchSolver("torchode", solve)]


def torchdyn_solvers() -> list[Solver]:
    """By taping."""
    with contextlib.redirect_stdout(io.StringIO()):
        numerics = importlib.import_module("torchdyn.numerics")

    def solve(problem: Problem, field: Callable, y0: Tensor) -> tuple[Tensor, None]:
        _, solution = numerics.odeint(field, y0, problem.t, solver="dopri5", rtol=problem.rtol, atol=problem.atol)
        return solution, None

    return [TorchSolver("torchdyn", solve)]


class Diffrax(Solver):
    """diffrax, compiled by XLA."""

    def __init__(self, name: str, method: str) -> None:
        """`method` is the name of its class."""
        import diffrax
        import jax

        jax.config.update("jax_enable_x64", True)
        self.name, self._method, self._diffrax, self._jax = name, getattr(diffrax, method), diffrax, jax

    def _parts(self, problem: Problem) -> tuple[Any, Any, tuple[Any, ...]]:
        """The compiled solve, the compiled gradient, and their arguments."""
        jax, diffrax = self._jax, self._diffrax
        t = jax.numpy.asarray(problem.t.numpy(), dtype=jax.numpy.float64)
        dtype = problem.y0.numpy().dtype
        args = [jax.numpy.asarray(x.detach().numpy(), dtype=dtype) for x in (problem.y0, *problem.params)]

        def solve(y0: Any, *params: Any) -> tuple[Any, Any]:
            solution = diffrax.diffeqsolve(
                diffrax.ODETerm(lambda t, y, params: problem.jax_field(t.astype(dtype), y, *params)),
                self._method(),
                t0=t[0],
                t1=t[-1],
                dt0=None,
                y0=y0,
                args=params,
                saveat=diffrax.SaveAt(ts=t),
                stepsize_controller=diffrax.PIDController(rtol=problem.rtol, atol=problem.atol),
                max_steps=2**14,
            )
            return solution.ys, solution.stats["num_steps"]

        def loss(args: tuple[Any, ...]) -> tuple[Any, Any]:
            ys, _ = solve(*args)
            return (ys**2).mean(), ys

        return jax.jit(solve), jax.jit(jax.value_and_grad(loss, has_aux=True)), tuple(args)

    def forward(self, problem: Problem) -> Callable[[], Any]:
        """As `Solver.forward`."""
        solve, _, args = self._parts(problem)
        return lambda: self._jax.block_until_ready(solve(*args))

    def backward(self, problem: Problem) -> Callable[[], Any]:
        """As `Solver.backward`."""
        _, gradient, args = self._parts(problem)
        return lambda: self._jax.block_until_ready(gradient(args))

    def answer(self, problem: Problem, differentiate: bool) -> Answer:
        """As `Solver.answer`."""
        solve, gradient, args = self._parts(problem)
        if not differentiate:
            return _torch(solve(*args)[0]), []
        (_, ys), grads = gradient(args)
        return _torch(ys), [_torch(x) for x in grads]

    def counts(self, problem: Problem) -> tuple[int | None, int | None, int | None]:
        """As `Solver.counts`."""
        solve, _, args = self._parts(problem)
        return int(solve(*args)[1]), None, None


def _torch(x: Any) -> Tensor:
    return torch.from_numpy(np.array(x))


def ours(name: str, tighter: float = 1.0, **kwargs: Any) -> Solver:
    """restpoint's `solve_ode` with options, and tolerances so many times `tighter` than the problem's."""
    kwargs.setdefault("solver", Dopri5())

    def solve(problem: Problem, field: Callable, y0: Tensor) -> tuple[Tensor, int]:
        tolerances = {"rtol": problem.rtol / tighter, "atol": problem.atol / tighter}
        solution = solve_ode(field, y0, problem.t, max_steps=100_000, **tolerances, **kwargs)
        return solution.value, int(solution.stats.steps.max())

    return TorchSolver(name, solve, ours=True)


def our_drop_in(name: str, adjoint: bool) -> Solver:
    """restpoint's functions with the signatures of torchdiffeq."""

    def solve(problem: Problem, field: Callable, y0: Tensor) -> tuple[Tensor, int | None]:
        tolerance = {"rtol": problem.rtol, "atol": problem.atol}
        if adjoint:
            return odeint_adjoint(field, y0, problem.t, adjoint_params=problem.params, **tolerance), None
        return odeint(field, y0, problem.t, **tolerance), steps_of(field)

    return TorchSolver(name, solve, ours=True)


PER_SAMPLE = PIDController(per_sample=True)


def eager() -> list[Solver]:
    """Ours without compilation, on problems that are not stiff."""
    return [
        ours("restpoint"),
        ours("restpoint Tsit5", solver=Tsit5()),
        ours("restpoint per sample", controller=PER_SAMPLE),
        ours("restpoint backsolve", adjoint=BacksolveAdjoint()),
        ours("restpoint interpolated", adjoint=InterpolatedAdjoint()),
        our_drop_in("restpoint odeint", adjoint=False),
        our_drop_in("restpoint odeint_adjoint", adjoint=True),
    ]


def compiled() -> list[Solver]:
    """Ours with compilation, where the installed version has it."""
    if "compile" not in inspect.signature(solve_ode).parameters:
        return []
    return [ours("restpoint compiled", compile=True)]


def stiff() -> list[Solver]:
    """Ours for stiff problems."""
    return [
        ours("restpoint Kvaerno5", solver=Kvaerno5()),
        ours("restpoint Kvaerno5, 100x", tighter=100.0, solver=Kvaerno5()),
    ]


def peers() -> tuple[list[Solver], list[str]]:
    """The others that can be imported, and a note on each that cannot."""
    found: list[Solver] = []
    missing: list[str] = []
    makers: dict[str, Callable[[], list[Solver]]] = {
        "torchdiffeq": torchdiffeq_solvers,
        "torchode": torchode_solvers,
        "torchdyn": torchdyn_solvers,
        "diffrax": lambda: [Diffrax("diffrax (jit)", "Dopri5")],
    }
    for name, make in makers.items():
        try:
            found += make()
        except ImportError as error:
            missing.append(f"{name} is left out: {error}")
    return found, missing
