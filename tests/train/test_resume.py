"""Nothing is lost: runs that are killed, stopped, or out of disk go on where they were, bit for bit."""

import dataclasses
import json
import logging
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from restpoint.train import Config, DataConfig, Interrupted, ModelConfig, TrainingError, train
from restpoint.train.checkpoint import (
    load_optimizer_state,
    load_random_state,
    optimizer_state,
    pack,
    random_state,
    read_tree,
    unpack,
    write_tree,
)
from restpoint.train.folder import RunFolder
from restpoint.train.tasks import ImageClassification, Outcome
from restpoint.zoo import CheckpointError

WEIGHTS = "conv_deq_tiny.digits.safetensors"


def config(folder, **changes):
    base = Config(
        model=ModelConfig(arguments={"channels": 4, "stem_channels": [4], "groups": 2, "max_steps": 5}),
        data=DataConfig(name="digits", batch_size=100, eval_batch_size=600),
        epochs=2,
        ema=0.9,
        threads=1,
        output=str(folder),
    )
    return dataclasses.replace(base, **changes)


class At(ImageClassification):
    """Does something at a step."""

    step = 15

    def losses(self, model, batch, step):
        if step == self.step:
            self.act()
        return super().losses(model, batch, step)


def killed(folder, kills, epochs, every, seed):
    script = Path(__file__).parent / "runs.py"
    command = [sys.executable, str(script), str(folder), *(str(n) for n in (kills, epochs, every, seed))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["killed"] == kills
    return told["digests"]


@pytest.mark.slow
def test_a_run_that_is_killed_three_times_ends_with_the_weights_of_one_that_is_not(tmp_path):
    whole, parts = killed(tmp_path, kills=3, epochs=1, every=3, seed=0)
    assert whole == parts


@pytest.mark.exhaustive
def test_a_run_that_is_killed_twenty_times_ends_with_the_weights_of_one_that_is_not(tmp_path):
    whole, parts = killed(tmp_path, kills=20, epochs=4, every=1, seed=1)
    assert whole == parts


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_between_two_steps(number, tmp_path):
    class Stopped(At):
        def act(self):
            os.kill(os.getpid(), number)

    with pytest.raises(Interrupted, match="at step 16; --resume auto") as stopped:
        train(config(tmp_path / "parts", task=Stopped(), log_every=5))
    assert stopped.value.signal == number
    tree = read_tree(tmp_path / "parts" / "checkpoint.safetensors")
    assert (tree["step"], tree["epoch"], tree["place"]) == (16, 1, 5)
    # The curves' last points are on the disk, too, and not with a thread that ends with the process.
    events = EventAccumulator(str(tmp_path / "parts"))
    events.Reload()
    assert [point.step for point in events.Scalars("train/loss")] == [1, 5, 10, 15]
    train(config(tmp_path / "parts", resume="auto"))
    train(config(tmp_path / "whole", resume="auto"))
    assert (tmp_path / "parts" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


def test_the_batch_that_broke_a_step_is_kept(tmp_path):
    class Broken(At):
        def losses(self, model, batch, step):
            outcome = super().losses(model, batch, step)
            seen.append(batch)
            return Outcome(outcome.loss * float("nan"), {}) if step >= self.step else outcome

        def act(self):
            pass

    seen = []
    with pytest.raises(TrainingError, match=r"3 steps in a row.*broken"):
        train(config(tmp_path, task=Broken(), patience=3))
    kept = read_tree(tmp_path / "broken" / "step_15_process_0.safetensors")
    assert (kept["step"], kept["reason"]) == (15, "loss")
    assert kept["batch"][0].equal(seen[15][0])
    assert kept["batch"][1].equal(seen[15][1])
    assert len(list((tmp_path / "broken").iterdir())) == 3


def test_a_full_disk_keeps_the_checkpoint_before_and_says_so(tmp_path, caplog):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Full(At):
        """From its step on no file may grow beyond some kilobytes; Python ignores the signal, and writes fail."""

        def act(self):
            resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, limit[1]))

    try:
        with caplog.at_level(logging.WARNING), pytest.raises(TrainingError, match="cannot be written"):
            train(config(tmp_path, task=Full(), checkpoint_every=3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "could not be written" in caplog.text
    assert read_tree(tmp_path / "checkpoint.safetensors")["step"] == 15
    assert read_tree(tmp_path / "previous.safetensors")["step"] == 12
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    train(config(tmp_path, resume="auto"))
    train(config(tmp_path / "whole"))
    assert (tmp_path / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()


def test_a_truncated_checkpoint_falls_back_to_the_one_before_and_says_so(tmp_path, caplog):
    train(config(tmp_path, checkpoint_every=4))
    expected = (tmp_path / WEIGHTS).read_bytes()
    last = tmp_path / "checkpoint.safetensors"
    last.write_bytes(last.read_bytes()[:-100])
    (tmp_path / WEIGHTS).unlink()
    with caplog.at_level(logging.WARNING):
        train(config(tmp_path, resume=True))
    assert "not a whole checkpoint" in caplog.text
    assert "the checkpoint before, of step 20" in caplog.text
    assert (tmp_path / WEIGHTS).read_bytes() == expected


def test_two_runs_cannot_write_to_one_folder(tmp_path):
    # Locks are between processes: a child holds the folder until it is killed.
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with RunFolder(tmp_path):
            os.write(writing, b"in")
            signal.pause()
        os._exit(1)
    assert os.read(reading, 2) == b"in"
    try:
        with pytest.raises(TrainingError, match=f"in use by another run, process {child}"):
            train(config(tmp_path))
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with RunFolder(tmp_path):
        pass


def test_what_to_resume_has_to_be_there_unless_it_may_begin(tmp_path):
    with pytest.raises(TrainingError, match="--resume auto would begin"):
        train(config(tmp_path, resume=True))


def test_other_options_are_told_when_a_run_goes_on(tmp_path, caplog):
    train(config(tmp_path, epochs=1))
    changed = dataclasses.replace(config("").optimizer, lr=0.5)
    with caplog.at_level(logging.WARNING):
        train(config(tmp_path, resume="auto", optimizer=changed))
    assert "epochs 1 -> 2" in caplog.text
    assert "optimizer.lr 0.001 -> 0.5" in caplog.text


def test_trees_keep_what_they_hold(tmp_path):
    tree = {"a": [1, 2.5, None, True, "x", {"b": torch.arange(3)}], "c": torch.tensor(2.0, dtype=torch.float64)}
    write_tree(tmp_path / "t", tree)
    back = read_tree(tmp_path / "t")
    assert back["a"][:5] == tree["a"][:5]
    assert back["a"][5]["b"].equal(torch.arange(3))
    assert back["c"].dtype == torch.float64
    with pytest.raises(CheckpointError, match="cannot hold a/1, which is of type object"):
        pack({"a": [0, object()]})


def test_every_generator_goes_on(tmp_path):
    import random

    state = unpack(pack(random_state()))
    first = torch.rand(3), np.random.rand(3), random.random(), np.random.randn()  # noqa: NPY002
    load_random_state(state)
    again = torch.rand(3), np.random.rand(3), random.random(), np.random.randn()  # noqa: NPY002
    assert first[0].equal(again[0])
    assert np.array_equal(first[1], again[1])
    assert first[2:] == again[2:]


@pytest.mark.parametrize("name", ["adamw", "momentum", "lamb", "lion", "adafactor", "lookahead_adamw", "muon"])
def test_optimisers_go_on_bit_for_bit(name):
    from timm.optim import create_optimizer_v2

    x = torch.randn(5, 3)

    def new():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        model.unused = torch.nn.Linear(2, 2)
        return model, create_optimizer_v2(model, name, 1e-2, 0.01)

    def steps(model, optimizer, count):
        torch.manual_seed(1)  # one of them draws
        for _ in range(count):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()

    model, optimizer = new()
    steps(model, optimizer, 3)
    saved = unpack(pack({"model": model.state_dict(), "optimizer": optimizer_state(optimizer)}))
    steps(model, optimizer, 3)
    other, fresh = new()
    other.load_state_dict(saved["model"])
    load_optimizer_state(fresh, saved["optimizer"], options=True)
    steps(other, fresh, 3)
    assert all(a.equal(b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
