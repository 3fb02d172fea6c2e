"""What a model is trained for: one class a task."""

from .classification import ImageClassification
from .density import DensityEstimation
from .entities import EntityRecognition
from .image_density import ImageDensity
from .labelling import SequenceLabelling
from .language import LanguageModelling
from .nodes import NodeClassification
from .parsing import DependencyParsing
from .series import SeriesClassification
from .sudoku import SudokuSolving
from .tagging import SequenceTagging
from .task import Outcome, Task
from .traffic import TrafficFlow
from .trajectories import TrajectoryRegression

__all__ = [
    "DensityEstimation",
    "DependencyParsing",
    "EntityRecognition",
    "ImageClassification",
    "ImageDensity",
    "LanguageModelling",
    "NodeClassification",
    "Outcome",
    "SequenceLabelling",
    "SequenceTagging",
    "SeriesClassification",
    "SudokuSolving",
    "Task",
    "TrafficFlow",
    "TrajectoryRegression",
]
