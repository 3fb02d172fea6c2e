"""The training loop, from top to bottom."""

from __future__ import annotations

import logging
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from ..zoo import create_model
from ..zoo.cards import revive
from .checkpoint import load_checkpoint, save_checkpoint
from .config import Config
from .data import Batches, PointBatches, PointSource, Source, load_data
from .export import export
from .tasks import Outcome

log = logging.getLogger("restpoint.train")


class TrainingError(RuntimeError):
    """A run that cannot start or go on; the message says what to change."""


def train(config: Config, command: str = "") -> dict[str, float]:
    """Train, evaluate and export one model.

    The run's folder receives TensorBoard curves, `checkpoint.safetensors` after every epoch, and at the end
    `NAME.safetensors` with its card `NAME.json`, which go into checkpoints/ as they are.

    Args:
        config: everything about the run.
        command: how it was started, for the card.

    Returns:
        The metrics of the exported weights on the test set, or on the validation set where one was carved.

    Raises:
        TrainingError: the folder holds another run, or the loss stayed without a finite value.
        DataError: the data are missing or damaged.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    folder = Path(config.output or f"runs/{config.name}")
    saved = folder / "checkpoint.safetensors"
    if saved.exists() and not config.resume:
        raise TrainingError(f"{folder} holds a run already: give --resume true to go on with it, or another --output.")
    folder.mkdir(parents=True, exist_ok=True)

    # Data
    source: Source | PointSource = load_data(config.data.name, config.data_dir)
    batches, held_out = split_batches(config, source)

    # Model: `shipped` is what evaluation and export see, with the averaged weights and the solver of `arguments`.
    arguments: dict[str, Any] = dict(source.model_arguments)
    arguments |= {k: revive(v, f"model.arguments.{k}") for k, v in config.model.arguments.items()}
    training = {k: revive(v, f"model.training.{k}") for k, v in config.model.training.items()}
    try:
        model = create_model(config.model.name, config.model.pretrained, **{**arguments, **training}).to(config.device)
        shipped = create_model(config.model.name, **arguments).to(config.device)
    except (TypeError, ValueError) as error:
        raise TrainingError(f"The model {config.model.name} cannot be built as the recipe says: {error}") from error
    ema = ModelEmaV3(model, decay=config.ema, use_warmup=True) if config.ema is not None else None
    averaged: nn.Module = model if ema is None else ema.module

    # Optimiser and schedule
    optimizer = create_optimizer_v2(
        model, config.optimizer.name, config.optimizer.lr, config.optimizer.weight_decay, **config.optimizer.arguments
    )
    scheduler, _ = create_scheduler_v2(
        optimizer,
        config.optimizer.schedule,
        num_epochs=config.epochs,
        warmup_epochs=config.optimizer.warmup_epochs,  # type: ignore[arg-type]
        warmup_lr=config.optimizer.lr / 100,
        min_lr=config.optimizer.min_lr,
        step_on_epochs=False,
        updates_per_epoch=len(batches),
    )

    step = skipped = skipped_in_a_row = first_epoch = 0
    if config.resume and saved.exists():
        step, skipped = load_checkpoint(saved, model, averaged, optimizer)
        first_epoch = step // len(batches)
        log.info("resumed at epoch %d, step %d", first_epoch, step)
    if scheduler is not None:
        scheduler.step_update(step)
    writer = SummaryWriter(str(folder), purge_step=step)
    log.info("%s: %d parameters", config.name, sum(p.numel() for p in model.parameters()))

    metrics: dict[str, float] = {}
    for epoch in range(first_epoch, config.epochs):
        model.train()
        began = time.perf_counter()
        bar = tqdm(batches.epoch(epoch), f"epoch {epoch + 1}/{config.epochs}", len(batches), disable=not _terminal())
        for batch in bar:
            outcome = config.task.losses(model, batch, step)
            optimizer.zero_grad()
            finite = bool(torch.isfinite(outcome.loss))
            if finite:
                outcome.loss.backward()
                gradient = torch.nn.utils.get_total_norm(p.grad for p in model.parameters() if p.grad is not None)
                finite = bool(torch.isfinite(gradient))
            if finite:
                if config.optimizer.clip is not None:
                    dispatch_clip_grad(model.parameters(), config.optimizer.clip, config.optimizer.clip_mode)
                optimizer.step()
                if ema is not None:
                    ema.update(model, step)
                skipped_in_a_row = 0
            else:
                skipped, skipped_in_a_row = skipped + 1, skipped_in_a_row + 1
                log.warning("step %d skipped: its loss or gradient is not finite", step)
                if skipped_in_a_row >= config.patience:
                    raise TrainingError(
                        f"{skipped_in_a_row} steps in a row had no finite loss or gradient, the last at step {step}. "
                        "Lower optimizer.lr, clip harder, or look at the data."
                    )
            step += 1
            if scheduler is not None:
                scheduler.step_update(step)
            if step % config.log_every == 0 or step == 1:
                values = describe(outcome, optimizer.param_groups[0]["lr"])
                for name, value in values.items():
                    writer.add_scalar(f"train/{name}", value, step)
                writer.add_scalar("train/skipped", skipped, step)
                bar.set_postfix_str(f"loss {float(outcome.loss.detach()):.3f}")
                if not _terminal():
                    log.info("step %d: %s", step, ", ".join(f"{k} {v:.4g}" for k, v in values.items()))
        writer.add_scalar("train/seconds", time.perf_counter() - began, step)
        save_checkpoint(saved, model, averaged, optimizer, step, skipped)

        # The test set is looked at once, at the end, so that nothing can be chosen by it.
        due = config.data.validation > 0 and (epoch + 1) % config.evaluate_every == 0
        if due or epoch + 1 == config.epochs:
            shipped.load_state_dict(averaged.state_dict())
            metrics = config.task.evaluate(shipped, held_out)
            for name, value in metrics.items():
                writer.add_scalar(f"eval/{name}", value, step)
            log.info("epoch %d: %s", epoch + 1, ", ".join(f"{k} {v:.5g}" for k, v in metrics.items()))

    writer.close()
    if not metrics:
        shipped.load_state_dict(averaged.state_dict())
        metrics = config.task.evaluate(shipped, held_out)
    log.info("exported %s", export(shipped, folder, config, source, metrics, command))
    return metrics


def split_batches(
    config: Config, source: Source | PointSource
) -> tuple[Batches, Batches] | tuple[PointBatches, PointBatches]:
    """The training batches, and those of the validation set where one is carved, else of the test set."""
    data = config.data
    if isinstance(source, PointSource):
        return source.batches(data.batch_size, data.eval_batch_size, data.validation, config.seed, config.device)
    train_set, held_out = source.train, source.test
    if data.validation:
        if not 0 < data.validation < len(source.train):
            raise TrainingError(f"data.validation must lie in [0, {len(source.train)}); got {data.validation}.")
        train_set = source.train.take(slice(None, -data.validation))
        held_out = source.train.take(slice(-data.validation, None))
    statistics = source.mean, source.std
    return (
        Batches(
            train_set, *statistics, data.batch_size, shuffle=True, augment=data.augment, seed=config.seed,
            device=config.device,
        ),
        Batches(held_out, *statistics, data.eval_batch_size, device=config.device),
    )  # fmt: skip


def describe(outcome: Outcome, lr: float) -> dict[str, float]:
    """What one step is worth a point of: loss, metrics, learning rate, and how its solves went, both ways."""
    values = {"loss": float(outcome.loss.detach()), **outcome.metrics, "lr": lr}
    for solution in outcome.solutions:
        values["evaluations"] = float(solution.stats.evaluations.double().mean())
        values["residual"] = float(solution.stats.residual.mean())
        values["converged"] = float(solution.converged.double().mean())
        if solution.adjoint_stats is not None:
            values["adjoint_evaluations"] = float(solution.adjoint_stats.evaluations.double().mean())
            values["adjoint_residual"] = float(solution.adjoint_stats.residual.mean())
    return {name: value for name, value in values.items() if math.isfinite(value)}


def _terminal() -> bool:
    return sys.stderr.isatty()
