"""Deep equilibrium models."""

from .conv import BranchCell, ConvDEQ, conv_deq_small, conv_deq_tiny
from .layer import DEQ, Problem
from .transformer import AddPosition, DEQViT, TokenCell, deq_vit_small, deq_vit_tiny, test_deq_vit

__all__ = [
    "DEQ",
    "AddPosition",
    "BranchCell",
    "ConvDEQ",
    "DEQViT",
    "Problem",
    "TokenCell",
    "conv_deq_small",
    "conv_deq_tiny",
    "deq_vit_small",
    "deq_vit_tiny",
    "test_deq_vit",
]
