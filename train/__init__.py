"""Training: data, tasks, recipes, and a flat loop. `restpoint-train --help` is the command."""

from .config import Config, DataConfig, ModelConfig, OptimizerConfig
from .evaluate import evaluate_model
from .loop import TrainingError, train

__all__ = ["Config", "DataConfig", "ModelConfig", "OptimizerConfig", "TrainingError", "evaluate_model", "train"]
