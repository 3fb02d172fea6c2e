"""What a model is trained for: one class a task."""

from .classification import ImageClassification
from .density import DensityEstimation
from .tagging import SequenceTagging
from .task import Outcome, Task

__all__ = ["DensityEstimation", "ImageClassification", "Outcome", "SequenceTagging", "Task"]
