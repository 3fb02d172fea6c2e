"""A small folder of images to try fine-tuning on: python -m restpoint.train.data.write_folder DIR."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from .digits import digits
from .source import DataError, ImageSet

CLASSES = ("even", "odd")


def write_folder(folder: Path) -> int:
    """Write scikit-learn's digits, upside down, as PNG files train/even/*, train/odd/*, val/even/*, val/odd/*.

    What trains here trained the zoo's digits models too, and what is measured here was held out there.

    Args:
        folder: made; it must not hold anything yet.

    Returns:
        How many files were written.

    Raises:
        DataError: the folder exists and is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder} is not empty: name a new folder.")
    source = digits()
    return _write(source.train, folder / "train") + _write(source.test, folder / "val")


def _write(data: ImageSet, folder: Path) -> int:
    for name in CLASSES:
        (folder / name).mkdir(parents=True, exist_ok=True)
    pixels = (data.images.float() * 255 / data.white).round().byte()[:, 0].flip(1, 2)
    for i, (image, label) in enumerate(zip(pixels, data.labels.tolist(), strict=True)):
        Image.fromarray(image.numpy()).save(folder / CLASSES[label % 2] / f"{i:04d}.png")
    return len(data)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the folder that is named on the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m restpoint.train.data.write_folder",
        description="Write 1,797 digits, upside down, as images in the folders of two classes: even and odd.",
        epilog="example: python -m restpoint.train.data.write_folder digits_upside_down",
    )
    parser.add_argument("folder", type=Path, help="a new folder")
    folder = parser.parse_args(argv).folder
    try:
        print(f"wrote {write_folder(folder)} images to {folder}")
    except (DataError, OSError) as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
