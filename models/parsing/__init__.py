"""Models that find the tree of a sentence."""

from .biaffine import BiaffineParser, biaffine_small

__all__ = ["BiaffineParser", "biaffine_small"]
