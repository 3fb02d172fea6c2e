"""A process that starts training runs as its children, so that a test can kill them without paying for imports.

usage: python runs.py FOLDER KILLS SEED

Trains a small model in one go, and once more while it is killed KILLS times at random steps, and prints as JSON how far
each run came and the two sha256 of the weights.
"""

import hashlib
import json
import os
import random
import signal
import sys
from pathlib import Path

ARGUMENTS = [
    "--config", "conv_deq_tiny_digits.yaml", "--model.arguments.channels", "8", "--model.arguments.groups", "2",
    "--model.arguments.stem-channels", "[8]", "--epochs", "2", "--log-every", "1", "--checkpoint-every", "5",
    "--resume", "auto",
]  # fmt: skip
STEPS = 74


def start(folder):
    """A run in a child of this process; returns its process id and a stream of what it logs."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        os.dup2(writing, 2)
        # The module is imported before the fork; nothing of the run itself is.
        from restpoint.train.cli import main

        os._exit(main([*ARGUMENTS, "--output", str(folder)]))
    os.close(writing)
    return child, os.fdopen(reading, encoding="utf-8")


def run(folder, kill_after=None):
    """Run until so many steps were logged, and kill; else to the end. Returns the number of steps."""
    child, lines = start(folder)
    steps, said = 0, []
    with lines:
        for line in lines:
            said.append(line)
            steps += " step " in line and "loss" in line
            if kill_after is not None and steps > kill_after:
                os.kill(child, signal.SIGKILL)
                break
    _, status = os.waitpid(child, 0)
    if kill_after is None and status != 0:
        sys.exit("".join(said))
    return steps


def main():
    """Both trainings."""
    folder, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    import torch

    import restpoint.train.cli  # noqa: F401

    torch.set_num_threads(1)
    run(folder / "whole")
    chance, reached = random.Random(seed), []
    for _ in range(kills):
        reached.append(run(folder / "parts", chance.randrange(STEPS // 3)))
    reached.append(run(folder / "parts"))
    name = "conv_deq_tiny.digits.safetensors"
    digests = [hashlib.sha256((folder / part / name).read_bytes()).hexdigest() for part in ("whole", "parts")]
    print(json.dumps({"reached": reached, "digests": digests}))


if __name__ == "__main__":
    main()
