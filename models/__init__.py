"""Models made of solvers: one family a folder, one architecture a file."""

from .attention import CRF, SparseAttention, StructuredAttention, StructuredLatent
from .deq import DEQ
from .dropout import VariationalDropout
from .flow import ContinuousFlow
from .graph import GRAND, IGNN
from .monotone import MonotoneDEQ
from .ode import NeuralODE
from .optimization import ArgminLayer, OptNetSudoku, QPLayer
from .parsing import BiaffineParser
from .physics import HamiltonianNetwork, SecondOrderODE, UnstructuredODE
from .series import ODERNN, LatentODE, NeuralCDE
from .tagging import BiLSTMCRF

__all__ = [
    "CRF",
    "DEQ",
    "GRAND",
    "IGNN",
    "ODERNN",
    "ArgminLayer",
    "BiLSTMCRF",
    "BiaffineParser",
    "ContinuousFlow",
    "HamiltonianNetwork",
    "LatentODE",
    "MonotoneDEQ",
    "NeuralCDE",
    "NeuralODE",
    "OptNetSudoku",
    "QPLayer",
    "SecondOrderODE",
    "SparseAttention",
    "StructuredAttention",
    "StructuredLatent",
    "UnstructuredODE",
    "VariationalDropout",
]
