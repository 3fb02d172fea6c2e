"""Deep equilibrium models."""

from .conv import BranchCell, ConvDEQ, conv_deq_small, conv_deq_tiny
from .layer import DEQ, Problem

__all__ = ["DEQ", "BranchCell", "ConvDEQ", "Problem", "conv_deq_small", "conv_deq_tiny"]
