"""What a model is trained for: one class a task."""

from .classification import ImageClassification
from .density import DensityEstimation
from .language import LanguageModelling
from .series import SeriesClassification
from .tagging import SequenceTagging
from .task import Outcome, Task

__all__ = [
    "DensityEstimation",
    "ImageClassification",
    "LanguageModelling",
    "Outcome",
    "SequenceTagging",
    "SeriesClassification",
    "Task",
]
