"""What two processes do together, started by torchrun; `test_parallel.py` compares it with one process.

usage: torchrun --nproc-per-node 2 together.py FOLDER
"""

import dataclasses
import datetime
import os
import signal
import sys
from pathlib import Path

import torch.distributed as dist

from restpoint.train import Config, DataConfig, Interrupted, ModelConfig, OptimizerConfig, train
from restpoint.train.data import Affine
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


def main():
    """Train with DDP and with FSDP, be interrupted, and go on with what one process left."""
    # Once for all runs: processes cannot meet again where they have met.
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=100))
    folder = Path(sys.argv[1])
    metrics = train(config(folder / "ddp"))
    assert metrics["converged"] > 0, "every process gets the metrics"
    train(config(folder / "fsdp", parallel="fsdp"))
    train(config(folder / "begun_by_one", parallel="fsdp", resume=True))
    penalised = ImageClassification(growth_weight=1.0, growth_powers=1, jacobian_weight=0.1)
    for parallel in ("ddp", "fsdp"):
        train(config(folder / f"penalised_{parallel}", parallel=parallel, epochs=1, task=penalised, diagnose_every=2))
    try:
        train(config(folder / "interrupted", parallel="fsdp", task=Uneven()))
    except Interrupted:
        dist.destroy_process_group()
    else:
        raise AssertionError("the signal to one process was lost")


if __name__ == "__main__":
    main()
