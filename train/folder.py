"""The folder of a run: one run at a time, a checkpoint and the one before, and the batches that broke a step."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import IO, Any

from torch import Tensor
from torch.utils import _pytree as pytree

from ..zoo.errors import CheckpointError
from ..zoo.files import sync_folder
from .checkpoint import Tree, is_spread, read_tree, remove, write_sharded_tree, write_tree
from .errors import TrainingError
from .parallel import Parallel

log = logging.getLogger("restpoint.train")

# Broken batches tell much when they are few, and fill the disk when they are many.
KEPT = 10


class RunFolder:
    """A folder that one run at a time writes to; a context manager.

    It holds `checkpoint.safetensors`, and `previous.safetensors`, the one before, for the case that the last one was
    damaged; of tensors that are spread over processes the folders `checkpoint` and `previous`. A checkpoint that cannot
    be written leaves both as they were.

    Args:
        path: made where it does not exist.

    Raises (on entering):
        TrainingError: another process has the folder.
        OSError: the folder cannot be made or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # Each is a file or a folder, whichever the run that wrote it needed.
        self.checkpoint = path / "checkpoint.safetensors", path / "checkpoint"
        self.previous = path / "previous.safetensors", path / "previous"
        self.new = path / "new.safetensors", path / "new"
        self._lock: IO[str] | None = None

    def __enter__(self) -> RunFolder:
        self.path.mkdir(parents=True, exist_ok=True)
        file = (self.path / "lock").open("a+", encoding="utf-8")
        try:
            _lock(file)
        except OSError:
            file.seek(0)
            owner = file.read().strip()
            file.close()
            raise TrainingError(
                f"{self.path} is in use by another run, process {owner or 'unknown'}: two runs cannot write to one "
                "folder. Give another --output, or stop the other run."
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        self._lock = file
        for leftover in (*self.path.glob(".*.safetensors.*"), *self.new):  # of a run that was killed while it wrote
            remove(leftover)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._lock is not None:
            # The system releases the lock, also of a process that is killed.
            self._lock.close()
            self._lock = None

    @property
    def holds_run(self) -> bool:
        """Whether there is a checkpoint to go on from."""
        return any(path.exists() for path in self.checkpoint + self.previous)

    def save(self, tree: Tree, parallel: Parallel) -> bool:
        """Write a checkpoint, and keep the one before; returns whether it could be written. Every process calls this.

        A full disk is no reason to end a run that may still finish: it is logged, and what was saved before stays.

        Raises:
            CheckpointError: the processes share the tensors, and not the folder.
        """
        file, folder = self.new
        if is_spread(tree):
            done = write_sharded_tree(folder, tree, parallel)
        else:
            done = parallel.managed(lambda: write_tree(file, tree), first=True)
        done = done and parallel.managed(self._turn, first=True)
        if not done and parallel.first:
            log.warning("the checkpoint of step %s could not be written; the one before is kept", tree["step"])
        return done

    def _turn(self) -> None:
        """What is new becomes the checkpoint, and that the one before; at every moment one of them is there, whole."""
        if any(path.exists() for path in self.checkpoint):
            for path in self.previous:
                remove(path)
        for checkpoint, previous in zip(self.checkpoint, self.previous, strict=True):
            if checkpoint.exists():
                checkpoint.replace(previous)
        for new, checkpoint in zip(self.new, self.checkpoint, strict=True):
            if new.exists():
                new.replace(checkpoint)
        sync_folder(self.path)

    def load(self) -> Tree:
        """The last checkpoint that is whole, or None where there is none.

        Where that is the one before, the damaged one is called so from then on.

        Raises:
            CheckpointError: there are checkpoints, and none is whole.
        """
        complaints = []
        for path in self.checkpoint + self.previous:
            if not path.exists():
                continue
            try:
                tree = read_tree(path)
            except CheckpointError as error:
                log.warning("%s", error)
                complaints.append(str(error))
                continue
            if path in self.previous:
                log.warning("going on from the checkpoint before, of step %s", tree["step"])
                # Out of the way: in its turn it would take the place of the whole one.
                for damaged in (checkpoint for checkpoint in self.checkpoint if checkpoint.exists()):
                    aside = damaged.with_name(f"damaged{damaged.suffix}")
                    remove(aside)
                    damaged.replace(aside)
            return tree
        if complaints:
            raise CheckpointError(f"{' '.join(complaints)} Start anew in another folder.")
        return None

    def keep_batch(self, batch: Any, step: int, process: int, reason: str) -> Path | None:
        """Write the tensors of a batch that broke a step to a file of its own; only the first few are kept.

        Returns:
            Where it lies: {"step", "reason", "batch"} for `restpoint.train.checkpoint.read_tree`. None where enough
            are kept already, or the file could not be written.
        """
        folder = self.path / "broken"
        path = folder / f"step_{step}_process_{process}.safetensors"
        if len(list(folder.glob("*.safetensors"))) >= KEPT:
            return None
        tensors = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
        try:
            write_tree(path, {"step": step, "reason": reason, "batch": tensors})
        except OSError as error:
            log.warning("the batch of step %d could not be kept: %s", step, error)
            return None
        return path


def _lock(file: IO[str]) -> None:
    try:
        import fcntl
    except ImportError:  # Windows has no such locks; there the folder is not guarded.
        return
    # A record lock and no flock: worker processes inherit those, and would hold on to the folder of a dead run.
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
