"""Linear systems, a square one a sample: A x = b behind one interface."""

from .auto import Auto
from .bicgstab import BiCGSTAB
from .cg import CG
from .dense import LU, Cholesky
from .fixed_point_linear import FixedPointLinear
from .gmres import GMRES
from .neumann import Neumann
from .operator import LinearOperator
from .solve import linear_solve
from .solver import LinearSolver

__all__ = [
    "CG",
    "GMRES",
    "LU",
    "Auto",
    "BiCGSTAB",
    "Cholesky",
    "FixedPointLinear",
    "LinearOperator",
    "LinearSolver",
    "Neumann",
    "linear_solve",
]
