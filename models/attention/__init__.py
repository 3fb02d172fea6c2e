"""Attention whose weights are the solution of a problem."""

from .crf import CRF
from .sparse import SparseAttention

__all__ = ["CRF", "SparseAttention"]
