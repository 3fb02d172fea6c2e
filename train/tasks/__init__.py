"""What a model is trained for: one class a task."""

from .classification import ImageClassification
from .task import Outcome, Task

__all__ = ["ImageClassification", "Outcome", "Task"]
