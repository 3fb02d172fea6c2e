"""A process that starts training runs as its children, so that a test can kill them without paying for imports.

usage: python runs.py FOLDER KILLS EPOCHS EVERY SEED

Trains a small model in one go, and once more while it is killed KILLS times at random steps, with a checkpoint after
EVERY so many. Prints as JSON how many steps each run took, how many were killed, and the two sha256 of the weights.
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
    "--model.arguments.stem-channels", "[8]", "--log-every", "1", "--resume", "auto",
]  # fmt: skip
STEPS_AN_EPOCH = 37


def start(folder, *options):
    """A run in a child of this process; returns its process id and a stream of what it logs."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        os.dup2(writing, 2)
        # The module is imported before the fork; nothing of the run itself is.
        from restpoint.train.cli import main

        os._exit(main([*ARGUMENTS, *options, "--output", str(folder)]))
    os.close(writing)
    return child, os.fdopen(reading, encoding="utf-8")


def run(folder, *options, kill_after=None):
    """Run until so many steps were logged, and kill; else to the end: the number of steps, and if it was killed."""
    child, lines = start(folder, *options)
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
    return steps, os.WIFSIGNALED(status)


def main():
    """Both trainings."""
    folder, (kills, epochs, every, seed) = Path(sys.argv[1]), map(int, sys.argv[2:])
    import torch

    import restpoint.train.cli  # noqa: F401

    torch.set_num_threads(1)
    length, often = f"--epochs={epochs}", f"--checkpoint-every={every}"
    run(folder / "whole", length)
    # All kills together come before the last step, so that none of them meets a run that is done.
    chance, ended = random.Random(seed), []
    for _ in range(kills):
        after = chance.randrange(epochs * STEPS_AN_EPOCH // kills - 1)
        ended.append(run(folder / "parts", length, often, kill_after=after))
    ended.append(run(folder / "parts", length))
    name = "conv_deq_tiny.digits.safetensors"
    digests = [hashlib.sha256((folder / part / name).read_bytes()).hexdigest() for part in ("whole", "parts")]
    killed = sum(was for _, was in ended)
    print(json.dumps({"steps": [steps for steps, _ in ended], "killed": killed, "digests": digests}))


if __name__ == "__main__":
    main()
