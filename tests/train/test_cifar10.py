"""CIFAR-10 from the files of its two layouts, written here at a small size."""

import numpy as np
import pytest
import torch
from PIL import Image

from restpoint.train.data import DataError, load_data
from restpoint.train.data.cifar10 import CLASSES, TEST, TRAIN


@pytest.fixture
def records():
    return np.random.default_rng(0).integers(0, 256, (6, 20, 3073), dtype=np.uint8) % np.array([10] + [256] * 3072)


def test_the_binary_version(tmp_path, records):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for name, content in zip(TRAIN + TEST, records.astype(np.uint8)):
        content.tofile(folder / name)
    source = load_data("cifar10", tmp_path)
    assert source.train.images.shape == (100, 3, 32, 32)
    assert source.test.images.shape == (20, 3, 32, 32)
    assert source.train.labels[20] == records[1, 0, 0]
    # The red plane comes first, row by row.
    assert source.test.images[3, 0, 1, 2] == records[5, 3, 1 + 32 + 2]
    assert source.model_arguments == {"num_classes": 10, "in_chans": 3}
    (folder / TRAIN[2]).write_bytes(b"12345")
    with pytest.raises(DataError, match="data_batch_3.bin is damaged: 5 bytes"):
        load_data("cifar10", tmp_path)
    (folder / TRAIN[2]).unlink()
    with pytest.raises(DataError, match="data_batch_3.bin is missing"):
        load_data("cifar10", tmp_path)


def test_folders_of_images(tmp_path, records):
    pixels = records[0, :, 1:].astype(np.uint8).reshape(20, 32, 32, 3)
    for split in ("train", "test"):
        for k, name in enumerate(CLASSES):
            folder = tmp_path / "cifar10" / split / name
            folder.mkdir(parents=True)
            for j in range(2):
                Image.fromarray(pixels[2 * k + j]).save(folder / f"{j}.png")
    source = load_data("cifar10", tmp_path)
    assert source.train.labels.bincount().tolist() == [2] * 10
    first = int(source.train.labels[0])
    candidates = torch.from_numpy(pixels[2 * first : 2 * first + 2]).permute(0, 3, 1, 2)
    assert any(torch.equal(source.train.images[0], c) for c in candidates)
    assert source.train.labels.tolist() != sorted(source.train.labels.tolist())


def test_where_there_is_nothing(tmp_path):
    with pytest.raises(DataError, match="data_dir is missing"):
        load_data("cifar10")
    with pytest.raises(DataError, match="holds neither"):
        load_data("cifar10", tmp_path)
    (tmp_path / "cifar10" / "train").mkdir(parents=True)
    with pytest.raises(DataError, match="holds no CLASS"):
        load_data("cifar10", tmp_path)
