"""Optima that can be differentiated: programmes, minimisers, simplex maps, projections and soft sorting."""

from .simplex import entmax, entmax15, sparsemax

__all__ = ["entmax", "entmax15", "sparsemax"]
