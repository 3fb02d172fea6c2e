"""Models made of solvers: one family a folder, one architecture a file."""

from .attention import CRF, SparseAttention, StructuredAttention, StructuredLatent
from .deq import DEQ
from .dropout import VariationalDropout
from .flow import ContinuousFlow
from .monotone import MonotoneDEQ
from .ode import NeuralODE
from .optimization import ArgminLayer, OptNetSudoku, QPLayer
from .tagging import BiLSTMCRF

__all__ = [
    "CRF",
    "DEQ",
    "ArgminLayer",
    "BiLSTMCRF",
    "ContinuousFlow",
    "MonotoneDEQ",
    "NeuralODE",
    "OptNetSudoku",
    "QPLayer",
    "SparseAttention",
    "StructuredAttention",
    "StructuredLatent",
    "VariationalDropout",
]
