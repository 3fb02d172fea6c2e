"""Continuous normalising flows."""

from .divergence import Divergence, ExactTrace, Hutchinson, HutchPlusPlus
from .ffjord import FFJORD, ConcatSquash, ConcatSquashField, ffjord_small, ffjord_tabular
from .image import ImageField, ImageFlow, image_flow_small, image_flow_tiny
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
    "ImageField",
    "ImageFlow",
    "Transport",
    "ffjord_small",
    "ffjord_tabular",
    "image_flow_small",
    "image_flow_tiny",
]
