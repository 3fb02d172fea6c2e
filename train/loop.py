"""The training loop, from top to bottom."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch import nn
from torch.utils import _pytree as pytree
from tqdm import tqdm

from ..zoo import create_model
from ..zoo.cards import revive
from .check import check_config, check_parts
from .checkpoint import (
    load_model_state,
    load_optimizer_state,
    load_random_state,
    model_state,
    optimizer_state,
    pack,
    random_state,
    unpack,
    whole_state,
)
from .config import Config
from .curves import Curves, Pace, describe, in_words
from .data import AnySource, DataError, FolderSource, load_data
from .data.batches import part_of
from .errors import Interrupted, TrainingError
from .export import export
from .finetune import check_fit, freeze, input_of
from .folder import RunFolder
from .interrupt import Interrupt
from .objective import Objective, compile_inner
from .parallel import Parallel, joined, plain
from .split import split_batches

log = logging.getLogger("restpoint.train")

# What does not change the course of a run.
ELSEWHERE = (
    "data_dir", "output", "resume", "log_every", "evaluate_every", "checkpoint_every", "diagnose_every", "device",
    "parallel", "published", "note",
)  # fmt: skip


def train(config: Config, command: str = "") -> dict[str, float]:
    """Train, evaluate and export one model.

    The run's folder receives TensorBoard curves, `checkpoint.safetensors` and the one before it, the batches that broke
    a step, and at the end `NAME.safetensors` with its card `NAME.json`, which go into checkpoints/ as they are.

    Under torchrun every process calls this with the same config; the first one writes, and all return the same.

    Args:
        config: everything about the run.
        command: how it was started, for the card.

    Returns:
        The metrics of the exported weights on the test set, or on the validation set where one was carved.

    Raises:
        TrainingError: the recipe asks for what cannot be, the folder is in use or holds another run, or the loss stayed
            without a finite value.
        Interrupted: SIGTERM or Ctrl-C came; everything is saved.
        DataError: the data are missing or damaged.
    """
    check_config(config)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    folder = RunFolder(Path(config.output or f"runs/{config.name}"))
    with contextlib.ExitStack() as stack:
        parallel = stack.enter_context(joined(config.device, config.parallel))
        interrupt = stack.enter_context(Interrupt())
        if parallel.first:
            stack.enter_context(folder)
        return _train(config, command, folder, parallel, interrupt, stack)


def _train(
    config: Config, command: str, folder: RunFolder, parallel: Parallel, interrupt: Interrupt,
    stack: contextlib.ExitStack,
) -> dict[str, float]:  # fmt: skip
    torch.manual_seed(config.seed)
    if folder.holds_run and not config.resume:
        raise TrainingError(
            f"{folder.path} holds a run already: give --resume auto to go on with it, or another --output."
        )
    if config.resume is True and not folder.holds_run and parallel.first:
        raise TrainingError(f"{folder.path} holds no checkpoint to go on from: --resume auto would begin.")

    # Data
    source: AnySource = load_data(config.data.name, config.data_dir)
    if isinstance(source, FolderSource):
        source = source.fitted(config.data.shape, input_of(config.model))
    try:
        batches, held_out = split_batches(config, source, str(parallel.device))
    except DataError:
        raise
    except ValueError as error:
        raise TrainingError(f"The data {source.name} cannot be cut into batches as the recipe says: {error}") from error

    check_parts(min(batches.rows(place) for place in {0, len(batches) - 1}), config.accumulate, parallel.world)

    # Model: `shipped` is what evaluation and export see, with the averaged weights and the solver of `arguments`.
    arguments: dict[str, Any] = dict(source.model_arguments)
    arguments |= {k: revive(v, f"model.arguments.{k}") for k, v in config.model.arguments.items()}
    training = {k: revive(v, f"model.training.{k}") for k, v in config.model.training.items()}
    try:
        model = create_model(config.model.name, config.model.pretrained, **{**arguments, **training})
        shipped = create_model(config.model.name, **arguments).to(parallel.device)
    except (TypeError, ValueError) as error:
        raise TrainingError(f"The model {config.model.name} cannot be built as the recipe says: {error}") from error
    check_fit(config, model, source)
    freeze(model, config.model.freeze)
    config.task.prepare(model, source)
    model = model.to(parallel.device)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    log.info("%s: %d parameters, %d of them trained", config.name, sum(p.numel() for p in model.parameters()), trained)
    if config.compile:
        if config.task.twice:
            raise TrainingError(
                f"compile: the loss of {type(config.task).__name__} with these options holds derivatives, and torch "
                "cannot differentiate compiled code twice. Leave out compile, or the penalties on the Jacobian."
            )
        compile_inner(model)
    ema = ModelEmaV3(model, decay=config.ema, use_warmup=True) if config.ema is not None else None
    averaged: nn.Module = model if ema is None else ema.module
    objective: nn.Module = Objective(config.task, model, config.autocast, config.warmup)
    parallel.shard(objective, *([] if ema is None else [averaged]))

    # Optimiser and schedule
    try:
        optimizer = create_optimizer_v2(
            model, config.optimizer.name, config.optimizer.lr, config.optimizer.weight_decay,
            layer_decay=config.optimizer.layer_decay, **config.optimizer.arguments,
        )  # fmt: skip
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
    except (TypeError, ValueError, AssertionError) as error:
        raise TrainingError(f"The optimiser or its schedule cannot be made as the recipe says: {error}") from error
    scaler = torch.amp.GradScaler(parallel.device.type, enabled=config.autocast == "float16")

    # Where the run is: all of it is in a checkpoint, and what else the run depends on is a function of it.
    step = epoch = place = skipped = skipped_in_a_row = 0
    if parallel.rank > 0:
        torch.manual_seed(config.seed + 1_000_003 * parallel.rank)
    saved = folder.load() if parallel.first and config.resume else None
    content = parallel.spread(None if saved is None else pack(saved))
    if content:
        saved = unpack(content)
        step, epoch, place = saved["step"], saved["epoch"], saved["place"]
        skipped, skipped_in_a_row = saved["skipped"], saved["skipped_in_a_row"]
        changed = differences(saved["config"], plain_config(config))
        load_model_state(model, saved["model"])
        if ema is not None:
            load_model_state(averaged, saved["averaged"] or saved["model"])
        load_optimizer_state(
            optimizer, saved["optimizer"], options=not any(key.startswith("optimizer.") for key in changed)
        )
        scaler.load_state_dict(saved["scaler"])
        if parallel.rank < len(saved["random"]):
            load_random_state(saved["random"][parallel.rank])
        log.info("resumed at epoch %d, step %d", epoch + 1, step)
        if changed:
            log.warning("resumed with other options: %s", "; ".join(changed.values()))
    if scheduler is not None:
        scheduler.step_update(step)
    wrapped = parallel.wrap(objective)

    def checkpoint() -> dict[str, Any]:
        return {
            "step": step, "epoch": epoch, "place": place, "skipped": skipped, "skipped_in_a_row": skipped_in_a_row,
            "config": plain_config(config),
            "model": model_state(model),
            "averaged": None if ema is None else model_state(averaged),
            "optimizer": optimizer_state(optimizer),
            "scaler": scaler.state_dict(),
            "random": [unpack(part) for part in parallel.gather(pack(random_state()))],
        }  # fmt: skip

    def save() -> bool:
        return folder.save(checkpoint(), parallel)

    def look(weights: nn.Module, at: Callable[[], dict[str, float]]) -> dict[str, float]:
        """What the first process finds with these weights in `shipped`; the others wait for it."""
        state, found = whole_state(weights, keep=parallel.first), None
        if parallel.first:
            shipped.load_state_dict(state)
            found = json.dumps(at()).encode()
        return dict(json.loads(parallel.spread(found)))

    def measure() -> dict[str, float]:
        return look(averaged, lambda: config.task.evaluate(shipped, held_out))

    if config.model.pretrained and config.data.validation and step == 0:
        log.info("before: %s", in_words(measure(), 5))
    curves = stack.enter_context(Curves(folder.path, step, parallel.first))
    pace = Pace(parallel.device)
    metrics: dict[str, float] = {}
    while epoch < config.epochs:
        model.train()
        bar = tqdm(
            batches.epoch(epoch, place, parallel.rank, parallel.world), f"epoch {epoch + 1}/{config.epochs}",
            len(batches), initial=place, disable=not (parallel.first and _terminal()),
        )  # fmt: skip
        for batch in bar:
            # One step: its batch is shared by the processes, and each computes its share in parts.
            optimizer.zero_grad()
            total, ours = batches.rows(place), _rows(batch)
            loss, reason = 0.0, "loss"
            for index in range(config.accumulate):
                part = _part(batch, index, config.accumulate)
                last = index + 1 == config.accumulate
                with parallel.averaging(wrapped, last):
                    value, outcome = wrapped(part, step)
                    broken, stop = parallel.any(not bool(torch.isfinite(value)), interrupt.received)
                    if broken:
                        break
                    # The processes' gradients are averaged; the mean over the whole batch is what is wanted.
                    share = _rows(part) * parallel.world / total
                    scaler.scale(value * share).backward()
                loss += float(value.detach()) * share / parallel.world
            if not broken:
                scaler.unscale_(optimizer)
                gradient = plain(
                    torch.nn.utils.get_total_norm(p.grad for p in model.parameters() if p.grad is not None)
                )
                broken, reason = not bool(torch.isfinite(gradient)), "gradient"
            if broken:
                skipped, skipped_in_a_row = skipped + 1, skipped_in_a_row + 1
                log.warning("step %d skipped: its %s is not finite", step, reason)
                if not (scaler.is_enabled() and reason == "gradient"):  # which a smaller scale may mend
                    folder.keep_batch(batch, step, parallel.rank, reason)
            else:
                if config.optimizer.clip is not None:
                    dispatch_clip_grad(model.parameters(), config.optimizer.clip, config.optimizer.clip_mode)
                scaler.step(optimizer)
                if ema is not None:
                    ema.update(model, step)
                skipped_in_a_row = 0
            if reason == "gradient" or not broken:
                scaler.update()
            if skipped_in_a_row >= config.patience:
                raise TrainingError(
                    f"{skipped_in_a_row} steps in a row had no finite loss or gradient, the last at step {step}. "
                    f"Lower optimizer.lr, clip harder, or look at the data, such as the batches in "
                    f"{folder.path / 'broken'}."
                )
            step, place = step + 1, place + 1
            if place == len(batches):
                epoch, place = epoch + 1, 0
            if scheduler is not None:
                scheduler.step_update(step)

            # What is told about it
            pace.add(ours * parallel.world)
            if step % config.log_every == 0 or step == 1:
                values = describe(outcome, optimizer.param_groups[0]["lr"]) | {"loss": parallel.total(loss)}
                curves.scalars("train", values | {"skipped": skipped} | pace.values(), step)
                bar.set_postfix_str(f"loss {loss:.3f}")
                if parallel.first and not _terminal():
                    log.info("step %d: %s", step, in_words(values))
            if config.diagnose_every and step % config.diagnose_every == 0:
                curves.scalars("diagnosis", look(model, lambda: config.task.diagnose(shipped, batch)), step)  # noqa: B023

            # What is kept
            if stop:
                save()
                raise Interrupted(f"stopped by signal {stop} at step {step}; --resume auto goes on from there.", stop)
            if config.checkpoint_every and step % config.checkpoint_every == 0 and place:
                save()

        # The test set is looked at once, at the end, so that nothing can be chosen by it.
        save()
        due = config.data.validation > 0 and epoch % config.evaluate_every == 0
        if due or epoch == config.epochs:
            metrics = measure()
            curves.scalars("eval", metrics, step)
            curves.pictures(config.task.pictures(shipped) if parallel.first else {}, step)
            log.info("epoch %d: %s", epoch, in_words(metrics, 5))

    metrics = metrics or measure()
    if parallel.first:
        try:
            log.info("exported %s", export(shipped, folder.path, config, source, metrics, command))
        except OSError as error:
            raise TrainingError(
                f"The run is done, but {folder.path} cannot be written ({error}). Make room; --resume auto exports it."
            ) from error
    return metrics


def plain_config(config: Config) -> dict[str, Any]:
    """What the course of a run depends on, as JSON's types, by dotted name."""
    entries = {k: v for k, v in dataclasses.asdict(config).items() if k not in ELSEWHERE}
    return json.loads(json.dumps(_flat(entries | {"task_class": type(config.task).__name__}), default=str))


def differences(before: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """What changed between two of `plain_config`, in words, by name."""
    names = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    return {name: f"{name} {before.get(name)} -> {now.get(name)}" for name in names}


def _flat(entries: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in entries.items():
        nested = isinstance(value, dict) and value
        flat |= _flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def _rows(batch: Any) -> int:
    return len(next(leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, torch.Tensor)))


def _part(batch: Any, index: int, count: int) -> Any:
    """The `index`-th of `count` parts of a batch."""
    if count == 1:
        return batch
    rows = part_of(_rows(batch), index, count)
    return pytree.tree_map(lambda leaf: leaf[rows] if isinstance(leaf, torch.Tensor) else leaf, batch)


def _terminal() -> bool:
    return sys.stderr.isatty()
