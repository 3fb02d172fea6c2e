"""Attention whose weights are the solution of a problem."""

from .sparse import SparseAttention

__all__ = ["SparseAttention"]
