"""Models made of solvers: one family a folder, one architecture a file."""

from .attention import CRF, SparseAttention, StructuredAttention, StructuredLatent
from .deq import DEQ
from .dropout import VariationalDropout
from .flow import ContinuousFlow
from .ode import NeuralODE
from .tagging import BiLSTMCRF

__all__ = [
    "CRF",
    "DEQ",
    "BiLSTMCRF",
    "ContinuousFlow",
    "NeuralODE",
    "SparseAttention",
    "StructuredAttention",
    "StructuredLatent",
    "VariationalDropout",
]
