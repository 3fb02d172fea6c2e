"""Two processes are one: the same losses, checkpoints that either can go on from."""

import importlib.util
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from restpoint.train import Interrupted, train
from restpoint.train.checkpoint import read_tree
from restpoint.train.data import Affine, load_data
from restpoint.train.data.batches import Batches
from restpoint.train.tasks import ImageClassification

SCRIPT = Path(__file__).parent / "together.py"
WEIGHTS = "conv_deq_tiny.digits.safetensors"


def module():
    spec = importlib.util.spec_from_file_location("together", SCRIPT)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def losses(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {point.step: point.value for point in events.Scalars("train/loss")}


SENT = []


class StopsAtFive(ImageClassification):
    def losses(self, model, batch, step):
        if step == 5 and not SENT:
            SENT.append(step)
            os.kill(os.getpid(), signal.SIGTERM)
        return super().losses(model, batch, step)


def test_the_parts_of_all_processes_are_the_batch_of_one():
    data = load_data("digits").train
    batches = Batches(data, (0.5,), (0.5,), 31, shuffle=True, augment=Affine(rotate=20, shift=1), seed=3)
    whole = list(batches.epoch(2, start=30))
    parts = [list(batches.epoch(2, start=30, rank=rank, world=3)) for rank in range(3)]
    for images, labels in whole:
        pieces = [part.pop(0) for part in parts]
        # The same pixels up to how a sum over four neighbours is ordered.
        torch.testing.assert_close(torch.cat([piece[0] for piece in pieces]), images)
        assert torch.cat([piece[1] for piece in pieces]).equal(labels)


@pytest.mark.slow
def test_two_processes_are_one_and_go_on_where_the_other_stopped(tmp_path, caplog):
    config = module().config
    train(config(tmp_path / "one"))
    with pytest.raises(Interrupted):
        train(config(tmp_path / "begun_by_one", task=StopsAtFive()))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, check=False, timeout=3000)
    assert done.returncode == 0, done.stderr[-5000:]

    expected, weights = losses(tmp_path / "one"), safetensors.torch.load_file(tmp_path / "one" / WEIGHTS)
    assert len(expected) == 8
    for name in ("ddp", "fsdp", "begun_by_one"):
        found = losses(tmp_path / name)
        # Sums in float32 in another order, over eight steps.
        assert found == pytest.approx(expected, rel=1e-4), name
        for key, value in safetensors.torch.load_file(tmp_path / name / WEIGHTS).items():
            torch.testing.assert_close(value, weights[key], rtol=1e-3, atol=1e-4)

    # Two processes go on from their parts as if nothing had been, each file a part of its own.
    assert (tmp_path / "stopped" / WEIGHTS).read_bytes() == (tmp_path / "fsdp" / WEIGHTS).read_bytes()
    parts = sorted((tmp_path / "stopped" / "checkpoint" / "parts").iterdir())
    assert [path.suffix for path in parts] == [".safetensors"] * 2
    name = "model/classifier.weight"
    pieces = [safetensors.torch.load_file(path)[name] for path in parts]
    saved = read_tree(tmp_path / "stopped" / "checkpoint")
    assert torch.cat(pieces).shape == saved["model"]["classifier.weight"].shape
    assert all(0 < len(piece) < 10 for piece in pieces)

    # One process goes on from what two had sharded, and knows what only the other of them met.
    saved = read_tree(tmp_path / "interrupted" / "checkpoint")
    assert (saved["step"], saved["skipped"], len(saved["random"])) == (6, 1, 2)
    assert (tmp_path / "interrupted" / "broken" / "step_1_process_1.safetensors").exists()
    with caplog.at_level(logging.INFO):
        metrics = train(config(tmp_path / "interrupted", resume=True))
    assert "resumed at epoch 2, step 6" in caplog.text
    assert metrics["converged"] > 0


def run_sharded(folder, *options, kill_after=None):
    """Two processes by the command, all of them killed when so many steps were logged; the exit status."""
    small = ["--model.arguments.channels=4", "--model.arguments.groups=2", "--model.arguments.stem-channels=[4]"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command += [
        "restpoint.train",
        "--parallel=fsdp",
        "--resume=auto",
        "--ema=0.9",
        "--epochs=6",
        "--log-every=1",
        *small,
    ]
    command += ["--data.validation=1000", "--data.batch-size=20", f"--output={folder}", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as launcher:
        steps = 0
        for line in launcher.stderr:
            steps += " step " in line and "loss" in line
            if kill_after is not None and steps > kill_after:
                children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
                for process in (launcher.pid, *map(int, children)):
                    os.kill(process, signal.SIGKILL)
                break
    return launcher.returncode


@pytest.mark.exhaustive
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="asks Linux for a process's children")
def test_sharded_runs_that_are_killed_end_with_the_weights_of_one_that_is_not(tmp_path):
    assert run_sharded(tmp_path / "whole") == 0
    for after in (8, 3, 11, 0, 6):
        assert run_sharded(tmp_path / "parts", "--checkpoint-every=1", kill_after=after) == -signal.SIGKILL
    assert run_sharded(tmp_path / "parts", "--checkpoint-every=1") == 0
    assert (tmp_path / "parts" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
