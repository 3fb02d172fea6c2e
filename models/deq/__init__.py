"""Deep equilibrium models."""

from .conv import ConvDEQ, ResidualCell, conv_deq_small, conv_deq_tiny
from .layer import DEQ, Problem

__all__ = ["DEQ", "ConvDEQ", "Problem", "ResidualCell", "conv_deq_small", "conv_deq_tiny"]
