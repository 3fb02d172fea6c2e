"""The 8 x 8 handwritten digits that come with scikit-learn."""

from __future__ import annotations

from pathlib import Path

import torch

from .source import ImageSet, Source, register_data


@register_data
def digits(data_dir: Path | None = None) -> Source:
    """1,797 grey images of 8 x 8 pixels; a third (599 images) is held out, the other 1,198 are the training set.

    The split is scikit-learn's own: `train_test_split(..., test_size=1 / 3, stratify=labels, random_state=0)`. Both
    parts have digits of every writer; the images lie writer by writer, so a split into contiguous thirds would ask for
    new writers' digits, which is harder. No file is read or downloaded: `data_dir` is not used.

    Source: the test half of Alpaydin and Kaynak 1998, Optical Recognition of Handwritten Digits, UCI repository.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(bunch.target).to(torch.int64)
    places = range(len(labels))
    kept, held_out = train_test_split(places, test_size=1 / 3, stratify=bunch.target, random_state=0)
    everything = ImageSet(images, labels, white=16)
    train = everything.take(torch.tensor(sorted(kept)))
    pixels = train.images.double() / train.white
    return Source(
        name="digits",
        train=train,
        test=everything.take(torch.tensor(sorted(held_out))),
        classes=tuple(str(k) for k in range(10)),
        mean=(round(float(pixels.mean()), 4),),
        std=(round(float(pixels.std()), 4),),
        split=(
            "train_test_split(test_size=1/3, stratify=labels, random_state=0) of scikit-learn: "
            "1,198 train, 599 measured"
        ),
        licence="CC BY 4.0",
        citation="Alpaydin and Kaynak 1998, Optical Recognition of Handwritten Digits (UCI), as in scikit-learn",
    )
