"""The 8 x 8 handwritten digits that come with scikit-learn."""

from __future__ import annotations

from pathlib import Path

import torch

from .source import ImageSet, Source, register_data

TRAIN = 1198


@register_data
def digits(data_dir: Path | None = None) -> Source:
    """1,797 grey images of 8 x 8 pixels in scikit-learn's order: the first 1,198 train, the last 599 are held out.

    The images lie writer by writer, so that the held-out third was mostly written by hands that the training set does
    not contain, which is harder than a random third. No file is read or downloaded: `data_dir` is not used.

    Source: the test half of Alpaydin and Kaynak 1998, Optical Recognition of Handwritten Digits, UCI repository.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(bunch.target).to(torch.int64)
    everything = ImageSet(images, labels, white=16)
    train = everything.take(slice(TRAIN))
    pixels = train.images.double() / train.white
    return Source(
        name="digits",
        train=train,
        test=everything.take(slice(TRAIN, None)),
        classes=tuple(str(k) for k in range(10)),
        mean=(round(float(pixels.mean()), 4),),
        std=(round(float(pixels.std()), 4),),
        split="scikit-learn's order: the first 1,198 images train, the last 599 are held out and measured",
        licence="CC BY 4.0",
        citation="Alpaydin and Kaynak 1998, Optical Recognition of Handwritten Digits (UCI), as in scikit-learn",
    )
