"""Attention whose weights are the solution of a problem."""

from .crf import CRF
from .sparse import SparseAttention
from .structured import StructuredAttention
from .structured_latent import StructuredLatent

__all__ = ["CRF", "SparseAttention", "StructuredAttention", "StructuredLatent"]
