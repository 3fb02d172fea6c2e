"""Monotone operator equilibrium networks."""

from .classifiers import (
    MonotoneConv,
    MonotoneFC,
    MonotoneMultiTier,
    mon_conv_small,
    mon_fc_small,
    mon_multi_small,
    test_mon_conv,
    test_mon_fc,
    test_mon_multi,
)
from .layer import ForwardBackward, MonotoneDEQ, PeacemanRachford, Splitting
from .operators import Certificate, ConvOperator, DenseOperator, MonotoneOperator, MultiTierOperator

__all__ = [
    "Certificate",
    "ConvOperator",
    "DenseOperator",
    "ForwardBackward",
    "MonotoneConv",
    "MonotoneDEQ",
    "MonotoneFC",
    "MonotoneMultiTier",
    "MonotoneOperator",
    "MultiTierOperator",
    "PeacemanRachford",
    "Splitting",
    "mon_conv_small",
    "mon_fc_small",
    "mon_multi_small",
    "test_mon_conv",
    "test_mon_fc",
    "test_mon_multi",
]
