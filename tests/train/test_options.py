"""What a run can be told besides what to train: types, parts of a batch, compilation, warm-up, looks inside."""

import dataclasses
import subprocess
import sys

import pytest
import torch
from torch import nn

from restpoint.models.deq import DEQ
from restpoint.models.flow import FFJORD
from restpoint.solvers import Anderson
from restpoint.train import Config, DataConfig, ModelConfig, TrainingError, WarmupConfig, train
from restpoint.train.checkpoint import read_tree
from restpoint.train.cli import _find_recipes, parse
from restpoint.train.tasks import DensityEstimation, ImageClassification
from restpoint.train.unrolled import unrolled
from restpoint.zoo import create_model


def config(folder, **changes):
    base = Config(
        model=ModelConfig(arguments={"channels": 4, "stem_channels": [4], "groups": 2, "max_steps": 8}),
        data=DataConfig(name="digits", batch_size=64, validation=900, eval_batch_size=900),
        epochs=1,
        threads=1,
        log_every=1,
        output=str(folder),
    )
    return dataclasses.replace(base, **changes)


def curves(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    found = {tag: [point.value for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    return found, events.Tags()["images"]


def test_a_batch_in_parts_is_the_batch(tmp_path):
    train(config(tmp_path / "whole"))
    train(config(tmp_path / "parts", accumulate=3))
    whole, parts = (curves(tmp_path / name)[0]["train/loss"] for name in ("whole", "parts"))
    assert parts == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("autocast", ["bfloat16", "float16"])
def test_half_precision_trains_close_to_full_precision(autocast, tmp_path):
    train(config(tmp_path / "full"))
    train(config(tmp_path / "half", autocast=autocast))
    full, half = (curves(tmp_path / name)[0] for name in ("full", "half"))
    assert half["train/loss"] == pytest.approx(full["train/loss"], rel=0.05)
    assert half["train/loss"] != full["train/loss"]
    scale = read_tree(tmp_path / "half" / "checkpoint.safetensors")["scaler"]
    assert bool(scale) == (autocast == "float16")


def test_warming_up_unrolls_the_cell_and_then_solves(tmp_path):
    train(config(tmp_path, warmup=WarmupConfig(steps=2, layers=3)))
    evaluations = curves(tmp_path)[0]["train/evaluations"]
    assert len(set(evaluations[:2])) == 1
    assert min(evaluations[2:]) > evaluations[0]


def test_an_unrolled_layer_applies_its_cell_so_many_times_and_is_restored():
    layer, x = (
        DEQ(lambda z, x: torch.tanh(0.9 * z + x), solver=Anderson(memory=3)),
        torch.randn(4, 3, dtype=torch.double),
    )
    x.requires_grad_()
    expected = torch.zeros_like(x)
    for _ in range(4):
        expected = torch.tanh(0.9 * expected + x)
    before = vars(layer).copy()
    with unrolled(nn.ModuleList([layer]), 4):
        found = layer(x)
    assert {k: v for k, v in vars(layer).items() if not k.startswith("_")} == {
        k: v for k, v in before.items() if not k.startswith("_")
    }
    torch.testing.assert_close(found, expected)
    (ours,) = torch.autograd.grad(found.sum(), x)
    (theirs,) = torch.autograd.grad(expected.sum(), x)
    torch.testing.assert_close(ours, theirs)


def test_looks_inside_leave_the_run_as_it_is(tmp_path):
    train(config(tmp_path / "plain"))
    train(config(tmp_path / "looked_at", diagnose_every=2))
    name = "conv_deq_tiny.digits.safetensors"
    assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "looked_at" / name).read_bytes()
    points = curves(tmp_path / "looked_at")[0]
    assert len(points["diagnosis/spectral_radius"]) == 2
    assert 0 < points["diagnosis/spectral_radius"][0] <= points["diagnosis/spectral_radius_max"][0]


def test_penalties_change_the_loss_by_their_weight():
    model = create_model("conv_deq_tiny", channels=4, stem_channels=(4,), groups=2)
    batch = torch.randn(8, 1, 8, 8), torch.arange(8)
    plain = ImageClassification().losses(model, batch, 0)
    penalised = ImageClassification(jacobian_weight=2.0).losses(model, batch, 0)
    assert float(penalised.loss.detach()) == pytest.approx(
        float(plain.loss.detach()) + 2 * penalised.metrics["jacobian"], rel=1e-5
    )
    penalised.loss.backward()
    assert model.deq.cell.conv1.weight.grad.abs().sum() > 0


def test_a_flow_in_the_plane_shows_its_samples():
    flow = FFJORD(hidden=(8,))
    before = torch.get_rng_state()
    pictures = DensityEstimation().pictures(flow)
    assert torch.get_rng_state().equal(before)
    assert pictures["samples"].shape == (1, 96, 96)
    assert 0 <= float(pictures["samples"].min()) < float(pictures["samples"].max()) == 1


def test_what_is_differentiated_twice_is_not_compiled(tmp_path):
    with pytest.raises(TrainingError, match="cannot differentiate compiled code twice"):
        train(config(tmp_path, compile=True, task=ImageClassification(growth_weight=1.0)))


@pytest.mark.exhaustive
def test_a_compiled_cell_trains_alike(tmp_path):
    # A process of its own: torch.compile warns, and would look into the checks of shapes that tests switch on.
    recipe = ["--config=conv_deq_tiny_digits.yaml", "--data.validation=900", "--epochs=1", "--task.growth_weight=0"]
    small = ["--model.arguments.channels=8", "--data.batch_size=64", "--log_every=1", f"--output={tmp_path / 'b'}"]
    command = [sys.executable, "-m", "restpoint.train", *recipe, *small, "--compile=true"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    train(parse(_find_recipes([*recipe, *small[:-1], f"--output={tmp_path / 'a'}"])))
    plain, compiled = (curves(tmp_path / name)[0]["train/loss"] for name in "ab")
    assert compiled == pytest.approx(plain, rel=1e-4)
