"""Data sets, augmentation, and batches that can be resumed."""

import gzip

import numpy as np
import pytest
import torch

from restpoint.train.data import DATASETS, Affine, Batches, DataError, ImageSet, load_data
from restpoint.train.data.mnist import FILES, read_idx


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(int(n).to_bytes(4, "big") for n in array.shape)
    return header + array.tobytes()


def image_set(n=10, side=6):
    return ImageSet(torch.randint(0, 256, (n, 1, side, side), dtype=torch.uint8), torch.arange(n) % 3)


def test_a_third_of_the_digits_is_held_out_as_scikit_learn_splits():
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    source, bunch = load_data("digits"), load_digits()
    assert (len(source.train), len(source.test)) == (1198, 599)
    parts = train_test_split(bunch.images, test_size=1 / 3, stratify=bunch.target, random_state=0)
    for part, images in zip((source.train, source.test), parts, strict=True):
        assert sorted(x.tobytes() for x in part.images.double().numpy()) == sorted(x.tobytes() for x in images)
    pixels = source.train.images / 16
    assert source.mean[0] == pytest.approx(float(pixels.mean()), abs=1e-4)
    assert source.std[0] == pytest.approx(float(pixels.std()), abs=1e-4)


def test_unknown_data_get_a_suggestion():
    with pytest.raises(DataError, match="Did you mean 'mnist'"):
        load_data("mnits")
    assert {"digits", "mnist"} <= set(DATASETS)


@pytest.mark.parametrize("packed", [False, True])
def test_idx_files(tmp_path, packed):
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    path = tmp_path / ("a.gz" if packed else "a")
    path.write_bytes(gzip.compress(idx(array)) if packed else idx(array))
    assert np.array_equal(read_idx(path).numpy(), array)


@pytest.mark.parametrize("content", [b"", b"\0\0\x0d\1\0\0\0\1aaaa", b"PK\3\4", idx(np.zeros((2, 3), np.uint8))[:-1]])
def test_damaged_idx_files(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(DataError, match="not an IDX file|damaged"):
        read_idx(tmp_path / "a")


def write_mnist(folder, count=None):
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for images, labels, full in FILES.values():
        n = count or full
        (raw / images).write_bytes(idx(np.zeros((n, 28, 28), np.uint8)))
        (raw / labels).write_bytes(idx(np.arange(n, dtype=np.uint8) % 10))
    return raw


def test_mnist_is_read_from_the_standard_layout(tmp_path):
    raw = write_mnist(tmp_path)
    source = load_data("mnist", tmp_path)
    assert source.train.images.shape == (60_000, 1, 28, 28)
    assert len(source.test) == 10_000
    labels = np.full(10_000, 11, np.uint8)
    (raw / "t10k-labels-idx1-ubyte").write_bytes(idx(labels))
    with pytest.raises(DataError, match="label 11"):
        load_data("mnist", tmp_path)


def test_mnist_of_another_size_or_without_a_folder(tmp_path):
    write_mnist(tmp_path, 20)
    with pytest.raises(DataError, match=r"expected \(60000, 28, 28\)"):
        load_data("mnist", tmp_path)
    with pytest.raises(DataError, match="--data-dir"):
        load_data("mnist")


def test_batches_are_normalised_complete_and_in_order():
    data = image_set()
    batches = Batches(data, (0.5,), (0.25,), 4)
    parts = list(batches)
    assert [len(labels) for _, labels in parts] == [4, 4, 2]
    assert len(batches) == 3
    images = torch.cat([images for images, _ in parts])
    torch.testing.assert_close(images, (data.images / 255 - 0.5) / 0.25)
    assert torch.equal(torch.cat([labels for _, labels in parts]), data.labels)


def test_an_epoch_can_be_entered_anywhere():
    def batches(seed=1):
        return Batches(image_set(20), (0.5,), (0.5,), 4, shuffle=True, augment=Affine(10, 0.1, 0.1, 1), seed=seed)

    torch.manual_seed(3)
    one = batches()
    torch.manual_seed(3)
    other = batches()
    whole = list(one.epoch(2))
    torch.rand(5)  # the global generator plays no part
    for (a, i), (b, j) in zip(whole[3:], other.epoch(2, start=3), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(i, j)
    assert not torch.equal(whole[0][0], next(one.epoch(3))[0])
    torch.manual_seed(3)
    assert not torch.equal(whole[0][0], next(batches(seed=2).epoch(2))[0])


def test_shuffled_batches_hold_every_image_once():
    data = ImageSet(torch.arange(12, dtype=torch.uint8).view(12, 1, 1, 1), torch.arange(12))
    labels = torch.cat([labels for _, labels in Batches(data, (0.0,), (1.0,), 3, shuffle=True).epoch(0)])
    assert sorted(labels.tolist()) == list(range(12))
    assert labels.tolist() != list(range(12))


def test_batches_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        Batches(image_set(), (0.5,), (0.5,), 0)
    with pytest.raises(ValueError, match="do not fill one batch"):
        Batches(image_set(3), (0.5,), (0.5,), 4, shuffle=True)


def test_affine_changes():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(4, 2, 9, 7)
    torch.testing.assert_close(Affine()(images, generator), images, atol=1e-5, rtol=1e-5)
    centred = torch.zeros(500, 1, 9, 9)
    centred[:, :, 4, 4] = 1.0
    shifted = Affine(shift=2.0)(centred, generator)
    torch.testing.assert_close(shifted.sum((1, 2, 3)), torch.ones(500), atol=1e-4, rtol=1e-4)
    ticks = torch.arange(9.0) - 4
    moved = (shifted.sum((1, 2)) * ticks).sum(1)
    assert moved.abs().max() <= 2.0 + 1e-4
    assert moved.abs().max() > 1.8
    turned = Affine(rotate=90.0)(torch.eye(9).expand(300, 1, 9, 9), generator)
    assert turned[:, 0, 4, 4].min() > 0.9  # the centre stays
    assert turned[:, 0, 0, 0].min() < 0.1  # the corners move
    with pytest.raises(TypeError, match="no option 'rotation'"):
        Affine(rotation=3)
