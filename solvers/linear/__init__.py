"""Linear systems, a square one a sample: A x = b behind one interface."""

from .auto import Auto
from .dense import LU, Cholesky
from .gmres import GMRES
from .operator import LinearOperator
from .solver import LinearSolver

__all__ = ["GMRES", "LU", "Auto", "Cholesky", "LinearOperator", "LinearSolver"]
