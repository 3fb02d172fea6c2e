"""CIFAR-10 in its binary version, or as folders of images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .source import DataError, ImageSet, Source, register_data

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TRAIN = tuple(f"data_batch_{k}.bin" for k in range(1, 6))
TEST = ("test_batch.bin",)
RECORD = 1 + 3 * 32 * 32


@register_data
def cifar10(data_dir: Path | None = None) -> Source:
    """CIFAR-10: 50,000 colour images of 32 x 32 pixels to train on and 10,000 to measure on.

    Read from `data_dir/cifar-10-batches-bin/*.bin`, the binary version as its authors distribute it, or from
    `data_dir/cifar10/{train,test}/CLASS/*.png`. The Python version would have to be unpickled and is not read.

    Raises:
        DataError: neither is there, or one is damaged.

    Source: Krizhevsky 2009, Learning multiple layers of features from tiny images.
    """
    if data_dir is None:
        raise DataError("cifar10: data_dir is missing: the folder that holds cifar-10-batches-bin/ or cifar10/.")
    binary, folders = data_dir / "cifar-10-batches-bin", data_dir / "cifar10"
    if binary.is_dir():
        train, test = (_concatenated([read_binary(binary / name) for name in names]) for names in (TRAIN, TEST))
    elif folders.is_dir():
        train, test = _read_folder(folders / "train"), _read_folder(folders / "test")
    else:
        raise DataError(f"cifar10: {data_dir} holds neither cifar-10-batches-bin/*.bin nor cifar10/train/CLASS/*.png.")
    return Source(
        name="cifar10",
        train=ImageSet(*train),
        test=ImageSet(*test),
        classes=CLASSES,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        split="the official 50,000 train; the official 10,000 are measured",
        licence="none stated by its authors",
        citation="Krizhevsky 2009, Learning multiple layers of features from tiny images",
    )


def read_binary(path: Path) -> tuple[Tensor, Tensor]:
    """Images (n, 3, 32, 32) and labels (n,) of one file: a byte of label and 3,072 bytes of image each.

    Raises:
        DataError: the file is missing, or holds no whole number of records.
    """
    if not path.is_file():
        raise DataError(f"cifar10: {path} is missing.")
    content = np.fromfile(path, dtype=np.uint8)
    if content.size == 0 or content.size % RECORD:
        raise DataError(f"cifar10: {path} is damaged: {content.size} bytes are no multiple of {RECORD}.")
    records = torch.from_numpy(content).reshape(-1, RECORD)
    return records[:, 1:].reshape(-1, 3, 32, 32).clone(), records[:, 0].long()


def _read_folder(folder: Path) -> tuple[Tensor, Tensor]:
    from PIL import Image

    images, labels = [], []
    for label, name in enumerate(CLASSES):
        for path in sorted((folder / name).glob("*.png")):
            pixels = np.asarray(Image.open(path).convert("RGB"))
            if pixels.shape != (32, 32, 3):
                raise DataError(f"cifar10: {path} has the shape {pixels.shape}, expected (32, 32, 3).")
            images.append(torch.from_numpy(pixels.copy()).permute(2, 0, 1))
            labels.append(label)
    if not images:
        raise DataError(f"cifar10: {folder} holds no CLASS/*.png with the classes {', '.join(CLASSES)}.")
    # Batches that follow the files' order, such as a validation set carved from the end, must not lack classes.
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return torch.stack(images)[order], torch.tensor(labels)[order]


def _concatenated(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([images for images, _ in parts]), torch.cat([labels for _, labels in parts])
