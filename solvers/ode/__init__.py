"""Initial value problems of ordinary differential equations: integrators and their adjoints.

How the parts fit:

- `method.py`: what an integrator is (`Method`: init, step, dense), on (batch, n) matrices. Read its docstring to add
  one: a frozen option class, and a line here. `explicit.py` holds the explicit Runge-Kutta methods, `tableau.py` their
  algebra. `esdirk.py` holds the implicit ones: `newton.py` and `linearised.py` solve their stage equations,
  `stage_root.py` differentiates them. `reversible.py` and `symplectic.py` hold those whose steps can be undone.
- `control.py`: step-size controllers. `times.py`: output times, checked.
- `problem.py`: what the drivers get and give. `shared_steps.py` is the driver with one step for the batch. A driver
  runs without derivatives and leaves a mesh of accepted steps.
- `replay.py` repeats a mesh in recorded operations; every exact adjoint is made of that. `pullback.py` does the same
  backwards; `externals.py` finds the tensors that a field closes over.
- `adjoint.py`: an adjoint turns a `Task` into an `Outcome`, whose final state and dense outputs carry derivatives.
- `interpolation.py` evaluates dense outputs, in ordinary operations outside of the adjoint.
- `compiled/`: solves as compiled programs.
- `solve.py`: `solve_ode`. `compat/`: the interface of torchdiffeq.
"""

from ..adjoint.shared import CheckpointAdjoint, ReversibleAdjoint
from .adjoint import Adjoint, DirectAdjoint
from .adjoint_backsolve import BacksolveAdjoint
from .adjoint_interpolated import InterpolatedAdjoint
from .compat import odeint, odeint_adjoint, odeint_event
from .compiled.reasons import CompileWarning
from .control import ConstantController, Controller, IController, PIController, PIDController
from .esdirk import ESDIRK, ImplicitEuler, Kvaerno3, Kvaerno5
from .events import Event, EventInfo
from .explicit import RK4, Bosh3, Dopri5, Dopri8, Euler, ExplicitRungeKutta, Heun, Midpoint, Ralston, Tsit5
from .interpolation import Interpolation
from .method import Method
from .newton import StageNewton
from .reversible import AsynchronousLeapfrog, Reversible, ReversibleHeun, ReversibleMethod
from .solution import ODESolution
from .solve import solve_ode
from .symplectic import Leapfrog, SemiImplicitEuler, Symplectic, Yoshida4
from .tableau import Tableau
from .times import TimeError

__all__ = [
    "ESDIRK",
    "RK4",
    "Adjoint",
    "AsynchronousLeapfrog",
    "BacksolveAdjoint",
    "Bosh3",
    "CheckpointAdjoint",
    "CompileWarning",
    "ConstantController",
    "Controller",
    "DirectAdjoint",
    "Dopri5",
    "Dopri8",
    "Euler",
    "Event",
    "EventInfo",
    "ExplicitRungeKutta",
    "Heun",
    "IController",
    "ImplicitEuler",
    "InterpolatedAdjoint",
    "Interpolation",
    "Kvaerno3",
    "Kvaerno5",
    "Leapfrog",
    "Method",
    "Midpoint",
    "ODESolution",
    "PIController",
    "PIDController",
    "Ralston",
    "Reversible",
    "ReversibleAdjoint",
    "ReversibleHeun",
    "ReversibleMethod",
    "SemiImplicitEuler",
    "StageNewton",
    "Symplectic",
    "Tableau",
    "TimeError",
    "Tsit5",
    "Yoshida4",
    "odeint",
    "odeint_adjoint",
    "odeint_event",
    "solve_ode",
]
