"""Labelled images in folders that are called as their classes are."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ...solvers.options import suggest
from ...zoo.cards import ImageInput
from ...zoo.predict import MODES, read_image
from .augment import Affine
from .batches import Batch, generator_of, part_of
from .seeded import seeded
from .source import DataError, register_data

log = logging.getLogger("restpoint.train")

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
HELD_OUT = ("val", "valid", "validation", "test")
SHOWN = 10


@dataclasses.dataclass(frozen=True)
class ImageList:
    """Image files with their labels.

    Attributes:
        paths: of the files.
        labels: class indices.
    """

    paths: tuple[Path, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, rows: slice | list[int]) -> ImageList:
        """The files at `rows`."""
        places = list(range(len(self)))[rows] if isinstance(rows, slice) else rows
        return ImageList(tuple(self.paths[i] for i in places), tuple(self.labels[i] for i in places))


class Reading(Dataset[tuple[Tensor, int]]):
    """Files as tensors with values in [0, 1]; an item is asked for by (seed, epoch, place in the list)."""

    def __init__(self, files: ImageList, shape: tuple[int, int, int], transform: Any = None) -> None:
        self.files, self.transform = files, transform
        self.plain = ImageInput(shape, (0.0,) * shape[0], (1.0,) * shape[0])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: tuple[int, int, int]) -> tuple[Tensor, int]:
        """The image and its label."""
        seed, epoch, place = key
        path, label = self.files.paths[place], self.files.labels[place]
        if self.transform is None:
            return read_image(path, self.plain), label
        with Image.open(path) as image, seeded(seed, epoch, place):
            return self.transform(image.convert(MODES[self.plain.shape[0]])), label


class FolderBatches:
    """Batches of normalised images from files, a function of seed and epoch.

    Args:
        files: which.
        how: the shape that images are brought to, and their mean and standard deviation.
        batch_size: images a batch. A last, smaller batch is dropped where `shuffle` is set and kept elsewhere.
        shuffle: a new order each epoch.
        transform: options of `timm.data.create_transform` for training, such as {scale: [0.5, 1], hflip: 0.5,
            auto_augment: rand-m9}; None only resizes.
        augment: applied to every image thereafter, or None.
        seed: of all that is drawn.
        device: where the batches go.
        workers: processes that read ahead.

    Raises:
        DataError: shuffled data fill no batch, or `transform` has an option that there is not.
    """

    def __init__(
        self,
        files: ImageList,
        how: ImageInput,
        batch_size: int,
        *,
        shuffle: bool = False,
        transform: dict[str, Any] | None = None,
        augment: Affine | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        workers: int = 0,
    ) -> None:
        if shuffle and len(files) < batch_size:
            raise DataError(
                f"{len(files)} training images do not fill one batch of {batch_size}: lower data.batch_size."
            )
        self.reading = Reading(files, how.shape, None if transform is None else _transform(transform, how.shape))
        self.files, self.how, self.batch_size, self.shuffle = files, how, batch_size, shuffle
        self.augment, self.seed, self.device, self.workers = augment, seed, device, workers

    def __len__(self) -> int:
        full, rest = divmod(len(self.files), self.batch_size)
        return full if self.shuffle or rest == 0 else full + 1

    def rows(self, place: int) -> int:
        """Images in batch `place` of an epoch."""
        return min(self.batch_size, len(self.files) - place * self.batch_size)

    def epoch(self, index: int = 0, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """The batches of epoch `index`, from batch `start` on; of each the part of process `rank` of `world`."""
        order = torch.arange(len(self.files))
        if self.shuffle:
            order = torch.randperm(len(self.files), generator=generator_of(self.seed, index, 0))
        parts, keys = [], []
        for place in range(start, len(self)):
            rows = order[place * self.batch_size : (place + 1) * self.batch_size].tolist()
            parts.append((part_of(len(rows), rank, world), len(rows)))
            keys.append([(self.seed, index, row) for row in rows[parts[-1][0]]])
        # A generator of its own: the loader would draw a seed for its workers from the global one.
        loader = DataLoader(
            self.reading, batch_sampler=keys, num_workers=self.workers, generator=generator_of(self.seed, index, 1)
        )
        mean, std = torch.tensor(self.how.mean).view(-1, 1, 1), torch.tensor(self.how.std).view(-1, 1, 1)
        for place, (images, labels) in enumerate(loader, start):
            if self.augment is not None:
                mine, total = parts[place - start]
                images = self.augment(images, generator_of(self.seed, index, place + 1), mine, total)
            yield ((images - mean) / std).to(self.device), labels.to(self.device)

    def __iter__(self) -> Iterator[Batch]:
        return self.epoch(0)


@dataclasses.dataclass(frozen=True)
class FolderSource:
    """The images of a folder, split in two.

    Attributes:
        root: the folder.
        train: what models are trained on, and validation sets are carved from.
        test: what metrics are reported on.
        classes: the name of each label.
        split: the two parts in words.
        broken: files that look like images by their name and cannot be read; they are left out.
        how: how an image becomes an input; see `fitted`.
    """

    root: Path
    train: ImageList
    test: ImageList
    classes: tuple[str, ...]
    split: str
    broken: tuple[Path, ...] = ()
    how: ImageInput = dataclasses.field(default_factory=lambda: ImageInput((3, 32, 32), (0.5,) * 3, (0.25,) * 3))

    name = "image_folder"
    licence = "the owner's"
    citation = ""

    def fitted(self, shape: tuple[int, int, int] | None, pretrained: ImageInput | None) -> FolderSource:
        """With images as a pretrained model takes them, else of `shape`, normalised by the training set's statistics.

        Args:
            shape: channels, height and width; None for the pretrained model's, or else (3, 32, 32).
            pretrained: what the model that is fine-tuned was trained with.
        """
        if pretrained is not None and (shape is None or shape[0] == pretrained.shape[0]):
            size = pretrained.shape if shape is None else shape
            return dataclasses.replace(self, how=dataclasses.replace(pretrained, shape=size))
        size = shape or self.how.shape
        reading = Reading(self.train, size)
        some = torch.randperm(len(self.train), generator=generator_of(0))[:512].tolist()
        pixels = torch.stack([reading[0, 0, place][0] for place in some]).double()
        mean, std = pixels.mean(dim=(0, 2, 3)), pixels.std(dim=(0, 2, 3)).clamp_min(1e-3)
        rounded = [tuple(round(float(v), 4) for v in values) for values in (mean, std)]
        return dataclasses.replace(self, how=ImageInput(size, *rounded))

    @property
    def model_arguments(self) -> dict[str, int]:
        """What the data say about a model: its classes and the image's channels."""
        return {"num_classes": len(self.classes), "in_chans": self.how.shape[0]}

    @property
    def card_fields(self) -> dict[str, Any]:
        """What the data say on a card."""
        return {"input": self.how, "labels": self.classes}

    def test_batches(self, batch_size: int, limit: int | None = None, device: str = "cpu") -> FolderBatches:
        """The images that metrics are reported on, or the first so many of them."""
        return FolderBatches(self.test.take(slice(limit)), self.how, batch_size, device=device)


@register_data
def image_folder(data_dir: Path | None = None) -> FolderSource:
    """Images in one folder a class.

    Args:
        data_dir: holds `train/CLASS/FILE` and `val/CLASS/FILE` (or valid, validation, test), or `CLASS/FILE`, of which
            every fifth file of each class is then held out, in an order that the file names alone decide.

    Raises:
        DataError: no folder was given; it is missing, empty, or of another layout; no class has a readable image; the
            held-out part has classes that the other has not.
    """
    if data_dir is None:
        raise DataError("image_folder: give the folder that holds the images (--data-dir).")
    root = data_dir.expanduser()
    if not root.is_dir():
        raise DataError(f"image_folder: {root} is {'no folder' if root.exists() else 'missing'}.")
    inner = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    held_out = next((name for name in HELD_OUT if name in inner), None)
    if "train" in inner:
        if held_out is None:
            raise DataError(
                f"image_folder: {root} holds train/ but none of {', '.join(f'{n}/' for n in HELD_OUT)}: what is to be "
                "measured?"
            )
        classes = _classes(root / "train")
        strange = [name for name in _classes(root / held_out) if name not in classes]
        if strange:
            raise DataError(
                f"image_folder: {root / held_out} holds the class {strange[0]!r}, which train/ has not."
                f"{suggest(strange[0], classes)} Its classes: {', '.join(classes)}."
            )
        train, broken = _readable(_files(root / "train", classes))
        test, more = _readable(_files(root / held_out, classes))
        split = f"train/ ({len(train)} images) trains; {held_out}/ ({len(test)} images) is measured"
        broken += more
    else:
        if held_out is not None:
            raise DataError(f"image_folder: {root} holds {held_out}/ but no train/.")
        classes = _classes(root)
        everything, broken = _readable(_files(root, classes))
        train, test = _split(everything)
        split = f"of each class four files of five train ({len(train)} images), the others ({len(test)}) are measured"
    for part, files in (("training", train), ("held-out", test)):
        missing = [name for label, name in enumerate(classes) if label not in set(files.labels)]
        if missing and (part == "training" or not len(files)):
            raise DataError(f"image_folder: the class {missing[0]!r} in {root} has no readable {part} image.")
    return FolderSource(root, train, test, tuple(classes), split, tuple(broken))


def _classes(folder: Path) -> list[str]:
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    loose = [path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES]
    layout = "expected train/CLASS/FILE and val/CLASS/FILE, or CLASS/FILE"
    if not names and loose:
        raise DataError(f"image_folder: {folder} holds images ({loose[0].name}) but no folder a class: {layout}.")
    if not names:
        raise DataError(f"image_folder: {folder} is empty, or holds no folder a class: {layout}.")
    if len(names) == 1:
        raise DataError(f"image_folder: {folder} holds one class ({names[0]}) alone: {layout}, with two or more.")
    return names


def _files(folder: Path, classes: list[str]) -> ImageList:
    paths, labels = [], []
    for label, name in enumerate(classes):
        found = sorted(path for path in (folder / name).rglob("*") if path.suffix.lower() in SUFFIXES)
        paths += found
        labels += [label] * len(found)
    return ImageList(tuple(paths), tuple(labels))


def _readable(files: ImageList) -> tuple[ImageList, list[Path]]:
    """The files that are whole images, and the others, which are named in the log."""
    with ThreadPoolExecutor() as pool:
        bar = tqdm(
            pool.map(_fault, files.paths), "checking images", len(files), disable=not sys.stderr.isatty(), leave=False
        )
        faults = list(bar)
    broken = [(path, fault) for path, fault in zip(files.paths, faults, strict=True) if fault]
    for path, fault in broken[:SHOWN]:
        log.warning("%s is left out: %s", path, fault)
    if broken:
        log.warning("%d of %d images could not be read and are left out", len(broken), len(files))
    return files.take([i for i, fault in enumerate(faults) if not fault]), [path for path, _ in broken]


def _fault(path: Path) -> str:
    """Why an image cannot be read, or an empty string."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                return f"its pixels have more than 8 bits (mode {image.mode})"
            image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return str(error)
    return ""


def _split(files: ImageList) -> tuple[ImageList, ImageList]:
    """Four of five files of every class, and the fifth, drawn with a fixed seed."""
    labels = np.array(files.labels)
    held_out: set[int] = set()
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        order = torch.randperm(len(rows), generator=generator_of(0, int(label))).numpy()
        held_out |= {int(i) for i in rows[order[: len(rows) // 5]]}
    return (
        files.take([i for i in range(len(files)) if i not in held_out]),
        files.take(sorted(held_out)),
    )


def _transform(options: dict[str, Any], shape: tuple[int, int, int]) -> Any:
    from timm.data import create_transform

    statistics = {"mean": (0.0,) * shape[0], "std": (1.0,) * shape[0]}
    try:
        return create_transform(shape, is_training=True, **{**options, **statistics})
    except TypeError as error:
        raise DataError(f"data.transform: {error}; its keys are the options of timm.data.create_transform.") from error
