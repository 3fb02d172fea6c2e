"""MNIST in the IDX layout that torchvision reads and downloads."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .source import DataError, ImageSet, Source, register_data

TYPES = {8: np.dtype(np.uint8)}
FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", 60_000),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte", 10_000),
}


@register_data
def mnist(data_dir: Path | None = None) -> Source:
    """70,000 grey images of 28 x 28 pixels in the official split.

    Args:
        data_dir: holds `MNIST/raw/train-images-idx3-ubyte` and so on, plain or with .gz, as
            `torchvision.datasets.MNIST(data_dir, download=True)` leaves them; that is called where they are missing.

    Raises:
        DataError: no folder was given; the files are missing and cannot be downloaded; a file is damaged.
    """
    if data_dir is None:
        raise DataError("mnist: give the folder that holds MNIST/raw (--data-dir); missing files are downloaded to it.")
    raw = data_dir / "MNIST" / "raw"
    if any(_find(raw, name) is None for *names, _ in FILES.values() for name in names):
        _download(data_dir)
    sets = {}
    for split, (images, labels, count) in FILES.items():
        pixels, classes = read_idx(_existing(raw, images)), read_idx(_existing(raw, labels))
        if pixels.shape != (count, 28, 28) or classes.shape != (count,):
            raise DataError(
                f"mnist: {raw} holds images {tuple(pixels.shape)} and labels {tuple(classes.shape)} for {split}; "
                f"expected ({count}, 28, 28) and ({count},)."
            )
        if classes.max() > 9:
            raise DataError(f"mnist: {raw / labels} holds the label {int(classes.max())}; expected 0 to 9.")
        sets[split] = ImageSet(pixels.unsqueeze(1), classes.to(torch.int64))
    return Source(
        name="mnist",
        train=sets["train"],
        test=sets["test"],
        classes=tuple(str(k) for k in range(10)),
        mean=(0.1307,),
        std=(0.3081,),
        split="the official 60,000 train; the official 10,000 are measured",
        licence="CC BY-SA 3.0",
        citation="LeCun, Cortes and Burges 1998, the MNIST database of handwritten digits",
    )


def read_idx(path: Path) -> Tensor:
    """The array of an IDX file of bytes, plain or gzipped.

    Layout: two zero bytes, the type (8 for bytes), the number of dimensions, each dimension as a big-endian 32-bit
    integer, then the values.

    Raises:
        DataError: the file does not begin so, or has another length than its dimensions say.
    """
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in TYPES:
        raise DataError(f"{path} is not an IDX file of bytes: it begins with {content[:4].hex(' ')}.")
    start = 4 + 4 * content[3]
    shape = tuple(np.frombuffer(content[4:start], dtype=">i4").tolist())
    values = np.frombuffer(content[start:], dtype=TYPES[content[2]])
    if values.size != int(np.prod(shape)):
        raise DataError(f"{path} is damaged: {values.size} values, and its header says {shape}. Delete it.")
    return torch.from_numpy(values.reshape(shape).copy())


def _find(raw: Path, name: str) -> Path | None:
    return next((p for p in (raw / name, raw / f"{name}.gz") if p.is_file()), None)


def _existing(raw: Path, name: str) -> Path:
    path = _find(raw, name)
    if path is None:
        raise DataError(f"mnist: {raw / name} is missing, with and without .gz.")
    return path


def _download(data_dir: Path) -> None:
    names = ", ".join(name for entry in FILES.values() for name in entry[:2])
    # A folder whose name was misspelt should not come into being.
    if not data_dir.is_dir():
        raise DataError(f"mnist: there is no folder {data_dir}.")
    problem = f"mnist: {data_dir / 'MNIST' / 'raw'} does not hold the four files {names}"
    try:
        from torchvision.datasets import MNIST
    except ImportError as error:
        raise DataError(f"{problem}, and torchvision, which could download them, is not installed.") from error
    try:
        MNIST(str(data_dir), download=True)
    except (OSError, RuntimeError) as error:
        raise DataError(f"{problem}, and downloading them failed: {error}") from error
