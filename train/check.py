"""What a recipe may not say, told before anything is computed."""

from __future__ import annotations

import math
from pathlib import Path

import timm.optim
import torch

from ..solvers.options import suggest
from .config import Config
from .errors import TrainingError

COUNTS = ("epochs", "accumulate", "log_every", "evaluate_every", "patience", "threads", "checkpoint_every")
DATA_COUNTS = ("batch_size", "eval_batch_size", "length")
# Those of timm that go by the step alone.
SCHEDULES = ("cosine", "tanh", "step", "multistep", "poly")


def check_config(config: Config) -> None:
    """Look at every number and name that is the same mistake for any model and data.

    Raises:
        TrainingError: a count below one, a rate that is none, a device that is not here, an optimiser or schedule that
            timm does not have, a data folder that does not exist; the message names the key.
    """
    counts = {name: getattr(config, name) for name in COUNTS}
    counts |= {f"data.{name}": getattr(config.data, name) for name in DATA_COUNTS}
    counts["warmup.layers"] = config.warmup.layers
    for name, value in counts.items():
        if value is not None and value < 1:
            raise TrainingError(f"{name} must be at least 1; got {value}.")
    whole = {"diagnose_every": config.diagnose_every, "data.validation": config.data.validation}
    whole |= {"data.workers": config.data.workers, "warmup.steps": config.warmup.steps}
    rates = {name: getattr(config.optimizer, name) for name in ("weight_decay", "warmup_epochs", "min_lr")}
    for name, value in (whole | {f"optimizer.{name}": value for name, value in rates.items()}).items():
        if not (math.isfinite(value) and value >= 0):
            raise TrainingError(f"{name} must not be negative; got {value}.")
    for name in ("lr", "clip", "layer_decay"):
        value = getattr(config.optimizer, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise TrainingError(f"optimizer.{name} must be positive; got {value}.")
    if config.ema is not None and not 0 <= config.ema < 1:
        raise TrainingError(f"ema must lie in [0, 1); got {config.ema}.")
    _check_names(config)
    _check_device(config.device)
    if config.data_dir is not None and not Path(config.data_dir).expanduser().exists():
        raise TrainingError(f"data_dir: there is no folder {config.data_dir}.")


def check_parts(rows: int, accumulate: int, world: int) -> None:
    """See that a step's batch of so many rows has one for every part that it is cut into.

    Raises:
        TrainingError: it has not.
    """
    if rows < accumulate * world:
        cut = f"{world} processes" if accumulate == 1 else f"{accumulate} parts in each of {world} processes"
        raise TrainingError(
            f"A batch of {rows} cannot be cut into {cut}: lower accumulate, raise data.batch_size, or start fewer "
            "processes."
        )


def _check_names(config: Config) -> None:
    known = [str(name) for name in timm.optim.list_optimizers()]
    chosen = config.optimizer.name
    if chosen.lower().removeprefix("lookahead_") not in known:
        raise TrainingError(f"optimizer.name: timm has no optimiser {chosen!r}.{suggest(chosen, known)}")
    schedule = config.optimizer.schedule
    if schedule not in SCHEDULES:
        raise TrainingError(
            f"optimizer.schedule: there is no {schedule!r}.{suggest(schedule, list(SCHEDULES))} "
            f"There are: {', '.join(SCHEDULES)}."
        )


def _check_device(name: str) -> None:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise TrainingError(f"device: torch knows no {name!r}; give cpu, cuda, or cuda:1.") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise TrainingError(f"device: {name} is not here; torch sees {torch.cuda.device_count()} CUDA devices.")
