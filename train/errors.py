"""What can go wrong in a run."""

from __future__ import annotations


class TrainingError(RuntimeError):
    """A run that cannot start or go on; the message says what to change."""


class Interrupted(TrainingError):
    """A run that was asked to stop, and has saved where it was.

    Attributes:
        signal: that asked.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal
