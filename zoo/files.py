"""Where cards and weights lie, and how a file is written so that nobody ever sees half of it."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

PACKAGE_CHECKPOINTS = Path(__file__).resolve().parent.parent / "checkpoints"


def home() -> Path:
    """The user's own folder: the environment's RESTPOINT_HOME, or `~/.cache/restpoint`."""
    return Path(os.environ.get("RESTPOINT_HOME") or "~/.cache/restpoint").expanduser()


def checkpoint_folders() -> tuple[Path, Path]:
    """Where cards and weights are looked for: what the package ships, then `checkpoints/` in `home()`."""
    return PACKAGE_CHECKPOINTS, home() / "checkpoints"


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to `path`, which holds its old content or the new one whole, also after a power cut.

    Raises:
        OSError: the folder cannot be made or written, or the disk is full; the old content is then untouched.
    """
    with replacing(path) as file:
        file.write(content)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file, open for writing and reading, that takes the place of `path` when the block ends without an error.

    Until then it has another name in the same folder, and after an error there is nothing left of it.

    Raises:
        OSError: the folder cannot be made or written, or the disk is full; the old content is then untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        # mkstemp's files are for their owner alone; others should read a checkpoint as they read any file.
        umask = os.umask(0)
        os.umask(umask)
        Path(temporary).chmod(0o666 & ~umask)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """See the names of a folder's files on the disk, where the system has a way to ask for it."""
    if os.name == "posix":
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
