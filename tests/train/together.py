"""What two processes do together, started by torchrun; `test_parallel.py` compares it with one process.

usage: torchrun --nproc-per-node 2 together.py FOLDER
"""

import contextlib
import dataclasses
import datetime
import os
import pickle
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import restpoint.train.folder
from restpoint.train import Config, DataConfig, Interrupted, ModelConfig, OptimizerConfig, train
from restpoint.train.data import Affine
from restpoint.train.parallel import leave
from restpoint.train.tasks import ImageClassification, Outcome


def config(folder, **changes):
    """Eight steps with batches of 90, augmentation, accumulation and averaging."""
    base = Config(
        model=ModelConfig(arguments={"channels": 4, "stem_channels": [4], "groups": 2, "rtol": 1e-5, "max_steps": 30}),
        data=DataConfig(name="digits", batch_size=90, validation=800, eval_batch_size=400, augment=Affine(rotate=10)),
        optimizer=OptimizerConfig(lr=0.003, clip=0.1),
        epochs=2,
        accumulate=2,
        ema=0.9,
        threads=1,
        log_every=1,
        output=str(folder),
    )
    return dataclasses.replace(base, **changes)


SENT = []


class Uneven(ImageClassification):
    """What happens to one process is everybody's business: a loss that is not finite, a signal."""

    def losses(self, model, batch, step):
        outcome = super().losses(model, batch, step)
        if os.environ["RANK"] == "1":
            if step == 1:
                return Outcome(outcome.loss * float("nan"), {})
            # Before the step's second part: a second signal would end the process at once.
            if step == 5 and not SENT:
                SENT.append(signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGTERM)
        return outcome


class Stops(ImageClassification):
    """A signal at a step."""

    def losses(self, model, batch, step):
        if step == 3 and not STOPPED:
            STOPPED.append(signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        return super().losses(model, batch, step)


STOPPED = []


@contextlib.contextmanager
def nothing_unpickled():
    """Checkpoints are written and read without a single pickle, from the disk or from the other process."""

    def refuse(*arguments, **options):
        raise AssertionError("something was unpickled")

    ways = [(pickle, n) for n in ("load", "loads", "Unpickler", "dump", "dumps")] + [(torch, "load"), (torch, "save")]
    ways += [(dist.distributed_c10d, "_unpickler"), (dist.distributed_c10d, "_pickler")]
    before = [getattr(module, name) for module, name in ways]
    for module, name in ways:
        setattr(module, name, refuse)
    try:
        yield
    finally:
        for (module, name), was in zip(ways, before, strict=True):
            setattr(module, name, was)


def guard(module, name):
    """`module.name`, from now on with nothing unpickled."""
    plain = getattr(module, name)

    def guarded(*arguments, **options):
        with nothing_unpickled():
            return plain(*arguments, **options)

    setattr(module, name, guarded)


def main():
    """Train with DDP and with FSDP, be interrupted, and go on with what one process left."""
    # Once for all runs: processes cannot meet again where they have met.
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=1000))
    folder = Path(sys.argv[1])
    for name in ("save", "load"):
        guard(restpoint.train.folder.RunFolder, name)
    for name in ("load_model_state", "load_optimizer_state"):
        guard(sys.modules["restpoint.train.loop"], name)
    metrics = train(config(folder / "ddp"))
    assert metrics["converged"] > 0, "every process gets the metrics"
    train(config(folder / "fsdp", parallel="fsdp"))
    train(config(folder / "begun_by_one", parallel="fsdp", resume=True))
    penalised = ImageClassification(growth_weight=1.0, growth_powers=1, jacobian_weight=0.1)
    for parallel in ("ddp", "fsdp"):
        train(config(folder / f"penalised_{parallel}", parallel=parallel, epochs=1, task=penalised, diagnose_every=2))
    for name, task in (("stopped", Stops()), ("interrupted", Uneven())):
        with contextlib.suppress(Interrupted):
            train(config(folder / name, parallel="fsdp", task=task))
            raise AssertionError("the signal to one process was lost")
    train(config(folder / "stopped", parallel="fsdp", resume=True))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    leave(0)
