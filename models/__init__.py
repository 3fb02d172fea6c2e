"""Models made of solvers: one family a folder, one architecture a file."""

from .deq import DEQ
from .dropout import VariationalDropout

__all__ = ["DEQ", "VariationalDropout"]
