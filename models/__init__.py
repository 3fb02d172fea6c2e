"""Models made of solvers: one family a folder, one architecture a file."""

from .attention import SparseAttention
from .deq import DEQ
from .dropout import VariationalDropout
from .flow import ContinuousFlow
from .ode import NeuralODE
from .tagging import BiLSTMCRF

__all__ = ["DEQ", "BiLSTMCRF", "ContinuousFlow", "NeuralODE", "SparseAttention", "VariationalDropout"]
