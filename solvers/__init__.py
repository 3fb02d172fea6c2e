"""Numerical methods that can be differentiated, and how: import everything from here."""

from .adjoint import (
    CheckpointAdjoint,
    ImplicitAdjoint,
    JacobianFreeAdjoint,
    PhantomAdjoint,
    ReversibleAdjoint,
    UnrollAdjoint,
)
from .fixed_point import Anderson, Broyden, Newton, Picard, fixed_point, root
from .linear import GMRES, LU, Auto, Cholesky
from .solution import Solution, SolverError, SolverWarning, Stats, Status
from .tree import StateError
