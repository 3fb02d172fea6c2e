"""Layers whose output is an optimum."""

from .argmin import ArgminLayer
from .quadratic import QPLayer
from .sudoku import OptNetSudoku, boards

__all__ = ["ArgminLayer", "OptNetSudoku", "QPLayer", "boards"]
