"""Optima that can be differentiated: programmes, minimisers, simplex maps, projections and soft sorting."""

from .admm import ADMM
from .central_path import CentralPath
from .fenchel_young import fenchel_young_loss
from .interior_point import InteriorPoint
from .isotonic import project_isotonic
from .linear_program import linear_program
from .minimize import Minimum, minimize
from .minimize_methods import LBFGS, GradientDescent, Minimizer, NewtonCG
from .pdhg import PDHG
from .perturbed import perturbed_argmax, perturbed_loss
from .projections import project_box, project_l1_ball, project_l2_ball, project_simplex
from .quadratic import Certificate, Duals, QPSolution, quadratic_program
from .quadratic_problem import QPSolver
from .simplex import entmax, entmax15, sparsemax
from .sinkhorn import project_birkhoff, sinkhorn
from .sorting import project_permutahedron, soft_rank, soft_sort, soft_topk

__all__ = [
    "ADMM",
    "LBFGS",
    "PDHG",
    "CentralPath",
    "Certificate",
    "Duals",
    "GradientDescent",
    "InteriorPoint",
    "Minimizer",
    "Minimum",
    "NewtonCG",
    "QPSolution",
    "QPSolver",
    "entmax",
    "entmax15",
    "fenchel_young_loss",
    "linear_program",
    "minimize",
    "perturbed_argmax",
    "perturbed_loss",
    "project_birkhoff",
    "project_box",
    "project_isotonic",
    "project_l1_ball",
    "project_l2_ball",
    "project_permutahedron",
    "project_simplex",
    "quadratic_program",
    "sinkhorn",
    "soft_rank",
    "soft_sort",
    "soft_topk",
    "sparsemax",
]
