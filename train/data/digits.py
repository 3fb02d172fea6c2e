"""The 8 x 8 handwritten digits that come with scikit-learn."""

from __future__ import annotations

from pathlib import Path

import torch

from .source import ImageSet, Source, register_data


@register_data
def digits(data_dir: Path | None = None) -> Source:
    """1,797 grey images of 8 x 8 pixels; every third one is held out: those at index 2, 5, 8, ... (599 images).

    The other 1,198 are the training set. The images lie writer by writer, so both parts have digits of every writer; a
    split into contiguous thirds asks for new writers' digits and is harder. No file is read or downloaded: `data_dir`
    is not used.

    Source: the test half of Alpaydin and Kaynak 1998, Optical Recognition of Handwritten Digits, UCI repository.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(bunch.target).to(torch.int64)
    held_out = torch.arange(len(labels)) % 3 == 2
    everything = ImageSet(images, labels, white=16)
    train = everything.take(~held_out)
    pixels = train.images.double() / train.white
    return Source(
        name="digits",
        train=train,
        test=everything.take(held_out),
        classes=tuple(str(k) for k in range(10)),
        mean=(round(float(pixels.mean()), 4),),
        std=(round(float(pixels.std()), 4),),
        split="index % 3 != 2 trains (1,198 images); index % 3 == 2 is held out and measured (599 images)",
        licence="CC BY 4.0",
        citation="Alpaydin and Kaynak 1998, Optical Recognition of Handwritten Digits (UCI), as in scikit-learn",
    )
