"""Graphs whose nodes are classified: implicit graph networks, and diffusion."""

from .grand import GRAND, Diffusivity, grand_nl_small, grand_small, test_grand
from .graph import Graph
from .ignn import IGNN, ImplicitGraph, WellPosed, ignn_small, test_ignn
from .sparse import Pattern

__all__ = [
    "GRAND",
    "IGNN",
    "Diffusivity",
    "Graph",
    "ImplicitGraph",
    "Pattern",
    "WellPosed",
    "grand_nl_small",
    "grand_small",
    "ignn_small",
    "test_grand",
    "test_ignn",
]
