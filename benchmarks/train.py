"""What the training loop adds to its steps, in one run: `python benchmarks/train.py [--quick]`.

Everything is CPU time of one thread; the alternatives take turns, and the best of several turns counts, so that what
else the machine does weighs on all alike. Ratios carry over to other machines, absolute times do not.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3

from restpoint.train import Config, train
from restpoint.train.checkpoint import model_state, optimizer_state, random_state, read_tree, write_tree
from restpoint.train.cli import RECIPES, parse
from restpoint.train.data import load_data
from restpoint.train.split import split_batches
from restpoint.zoo import create_model
from restpoint.zoo.cards import revive


def seconds(run: Callable[[], Any]) -> float:
    """CPU time of one call."""
    began = time.process_time()
    run()
    return time.process_time() - began


def bare(config: Config) -> None:
    """The same data, model, loss, optimiser and averages, in as few lines as they take, without anything around."""
    torch.manual_seed(config.seed)
    source = load_data(config.data.name)
    batches, _ = split_batches(config, source)
    arguments = {k: revive(v, k) for k, v in (config.model.arguments | config.model.training).items()}
    model = create_model(config.model.name, **source.model_arguments, **arguments)
    optimizer = create_optimizer_v2(model, config.optimizer.name, config.optimizer.lr, config.optimizer.weight_decay)
    ema, step = ModelEmaV3(model, decay=config.ema or 0.99), 0
    for epoch in range(config.epochs):
        for batch in batches.epoch(epoch):
            optimizer.zero_grad()
            config.task.losses(model, batch, step).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip or 1.0)
            optimizer.step()
            ema.update(model, step)
            step += 1


def main() -> None:
    """Print what a run costs beside its bare steps, and what a checkpoint costs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer turns")
    turns = 2 if parser.parse_args().quick else 4
    torch.set_num_threads(1)
    recipe = parse([f"--config={RECIPES / 'conv_deq_tiny_digits.yaml'}"])
    # One image is measured at the end: evaluation is no part of what is compared.
    data = dataclasses.replace(recipe.data, validation=1)
    longest = dataclasses.replace(recipe, data=data, epochs=3)
    shortest = dataclasses.replace(longest, epochs=1)

    def run(config: Config, **changes: Any) -> Callable[[], Any]:
        def start() -> None:
            with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
                train(dataclasses.replace(config, output=folder, **changes))

        return start

    often = {"checkpoint_every": 10}
    runs = {
        "bare steps": (lambda: bare(longest), lambda: bare(shortest)),
        "the loop": (run(longest), run(shortest)),
        "with a point of every curve at every step": (run(longest, log_every=1), run(shortest, log_every=1)),
        "with a checkpoint at every tenth step": (run(longest, **often), run(shortest, **often)),
    }  # fmt: skip
    best = {name: float("inf") for name in runs}
    for _ in range(turns):
        for name, (long, short) in runs.items():
            # What does not grow with the number of steps cancels out.
            best[name] = min(best[name], seconds(long) - seconds(short))
    print("CPU time of two epochs of conv_deq_tiny on the digits, relative to bare steps")
    for name, value in best.items():
        print(f"  {name:42} {value / best['bare steps']:5.2f}")

    source = load_data("digits")
    model = create_model("conv_deq_tiny", **source.model_arguments)
    optimizer = create_optimizer_v2(model, "adamw", 1e-3)
    sum(p.square().sum() for p in model.parameters()).backward()  # type: ignore[union-attr]
    optimizer.step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c.safetensors"
        tree = {"model": model_state(model), "optimizer": optimizer_state(optimizer), "random": random_state()}
        save = min(seconds(lambda: write_tree(path, tree)) for _ in range(10))
        load = min(seconds(lambda: read_tree(path)) for _ in range(10))
        size = path.stat().st_size / 1e3
        print(f"A checkpoint of it: {size:.0f} kB, {1e3 * save:.1f} ms to write, {1e3 * load:.1f} ms to read")


if __name__ == "__main__":
    main()
