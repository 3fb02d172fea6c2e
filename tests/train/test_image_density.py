"""Whole numbers as images, and the task that measures the bits they take."""

import pytest
import torch

from restpoint.train.config import Config, DataConfig
from restpoint.train.data import DataError, load_data
from restpoint.train.picture import draw_picture
from restpoint.train.split import split_batches
from restpoint.train.tasks import ImageDensity
from restpoint.zoo import create_model


@pytest.fixture(scope="module")
def source():
    return load_data("digits_pixels")


@pytest.fixture
def flow():
    return create_model("test_image_flow", shape=(1, 8, 8), levels=17)


def test_pixels_are_the_images_own_numbers(source):
    training, held_out = split_batches(Config(data=DataConfig(name="digits_pixels", batch_size=100)), source)
    pixels, labels = next(iter(held_out))
    assert pixels.dtype == torch.uint8
    assert pixels.equal(load_data("digits").test.images[:500])
    assert labels.equal(load_data("digits").test.labels[:500])
    assert source.model_arguments == {"shape": (1, 8, 8), "levels": 17}
    assert len(training) == 11
    assert next(training.epoch(3, start=2))[0].equal(list(training.epoch(3))[2][0])
    assert not next(training.epoch(3))[0].equal(next(training.epoch(4))[0])
    _, validation = split_batches(Config(data=DataConfig(name="digits_pixels", validation=50)), source)
    assert next(iter(validation))[0].equal(load_data("digits").train.images[-50:])
    with pytest.raises(DataError, match=r"data.validation must lie in \[0, 1198\)"):
        source.batches(10, 10, 2000, 0, "cpu")


def test_bits_are_the_same_at_every_call_and_for_batches_of_any_size(source, flow):
    task = ImageDensity()
    before = torch.random.get_rng_state()
    whole = task.evaluate(flow, source.test_batches(120, 120))
    assert torch.random.get_rng_state().equal(before)
    assert whole == task.evaluate(flow, source.test_batches(100, 120))
    assert whole["images"] == 120
    # Its field begins as zero: the normal density of encoded pixels, without an error of a solve.
    torch.manual_seed(0)
    pixels, _ = next(iter(source.test_batches(100, 100)))
    with torch.no_grad():
        expected = flow.bits_per_dimension(flow.pixel_log_prob(pixels))
    found = task.evaluate(flow, source.test_batches(100, 100))
    assert found["bits_per_dimension"] == pytest.approx(float(expected.mean()), rel=1e-6)
    assert found["bits_error"] == pytest.approx(float(expected.std()) / 10, rel=1e-4)


@pytest.mark.parametrize("coupling", ["independent", "optimal"])
def test_matching_makes_the_bits_fewer(source, flow, coupling):
    task = ImageDensity(coupling=coupling)
    before = task.evaluate(flow, source.test_batches(50, 50))["bits_per_dimension"]
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.01)
    training, _ = source.batches(64, 64, 0, 0, "cpu")
    for step, batch in enumerate(training):
        optimizer.zero_grad()
        outcome = task.losses(flow, batch, step)
        outcome.loss.backward()
        optimizer.step()
    assert outcome.metrics["matching"] == float(outcome.loss.detach())
    assert task.evaluate(flow, source.test_batches(50, 50))["bits_per_dimension"] < before - 0.1


def test_samples_are_drawn_beside_images(source, flow):
    task = ImageDensity()
    picture = task.pictures(flow)["samples"]
    assert picture.shape == (1, 64, 64)
    assert picture.equal(task.pictures(flow)["samples"])
    figure = draw_picture(task, flow, source)
    assert [axis.get_title() for axis in figure.axes] == ["measured images", "samples of the flow"]


def test_an_unknown_coupling_is_refused():
    with pytest.raises(ValueError, match="coupling must be one of 'independent', 'optimal'; got 'ot'"):
        ImageDensity(coupling="ot")
