"""Continuous normalising flows."""

from .divergence import Divergence, ExactTrace, Hutchinson, HutchPlusPlus
from .ffjord import FFJORD, ConcatSquash, ConcatSquashField, ffjord_small, ffjord_tabular
from .layer import ContinuousFlow, Transport

__all__ = [
    "FFJORD",
    "ConcatSquash",
    "ConcatSquashField",
    "ContinuousFlow",
    "Divergence",
    "ExactTrace",
    "HutchPlusPlus",
    "Hutchinson",
    "Transport",
    "ffjord_small",
    "ffjord_tabular",
]
