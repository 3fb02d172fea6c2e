"""Layers whose output is an optimum."""

from .argmin import ArgminLayer
from .quadratic import QPLayer
from .sudoku import OptNetSudoku, boards
from .sudoku_deq import SudokuDEQ
from .traffic import TrafficLayer, maximum_flow

__all__ = ["ArgminLayer", "OptNetSudoku", "QPLayer", "SudokuDEQ", "TrafficLayer", "boards", "maximum_flow"]
