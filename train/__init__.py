"""Training: data, tasks, recipes, and a flat loop. `restpoint-train --help` is the command."""

from .config import Config, DataConfig, ModelConfig, OptimizerConfig, WarmupConfig
from .errors import Interrupted, TrainingError
from .evaluate import evaluate_model
from .loop import train

__all__ = [
    "Config",
    "DataConfig",
    "Interrupted",
    "ModelConfig",
    "OptimizerConfig",
    "TrainingError",
    "WarmupConfig",
    "evaluate_model",
    "train",
]
