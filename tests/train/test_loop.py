"""Training runs, small enough for a test: they learn, they can be resumed, and they end in files that load."""

import dataclasses
import logging

import pytest
import torch

from restpoint.train import Config, DataConfig, ModelConfig, OptimizerConfig, TrainingError, evaluate_model, train
from restpoint.train.cli import _find_recipes, parse
from restpoint.train.data import DATASETS, Affine, DataError, ImageSet, Source
from restpoint.train.tasks import ImageClassification, Outcome
from restpoint.zoo import Card, CardError, CheckpointError, Published, create_model, load_card
from restpoint.zoo.watch import effort, watched
from restpoint.zoo.weights import load_state, read_weights

SMALL = {"channels": 8, "stem_channels": [8], "groups": 2, "max_steps": 15, "rtol": 1e-3}


@pytest.fixture(autouse=True)
def corners(monkeypatch):
    """A data set that is learnt in seconds: which of four corners is bright?"""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(160) % 4
    images = torch.randint(0, 120, (160, 1, 5, 5), dtype=torch.uint8, generator=generator)
    for image, label in zip(images, labels.tolist(), strict=True):
        image[0, 3 * (label // 2) :, 3 * (label % 2) :][:2, :2] += 100
    data = ImageSet(images, labels)
    source = Source(
        "corners", data.take(slice(128)), data.take(slice(128, None)), tuple("abcd"), (0.3,), (0.2,), "first 128 train",
        "CC0-1.0", "made up",
    )  # fmt: skip
    monkeypatch.setitem(DATASETS, "corners", lambda folder: source)


def config(folder, **changes):
    base = Config(
        name="conv_deq_tiny.corners",
        model=ModelConfig(arguments=dict(SMALL), training={"adjoint": {"$class": "PhantomAdjoint", "steps": 2}}),
        data=DataConfig(name="corners", batch_size=16, augment=Affine(shift=0.5)),
        optimizer=OptimizerConfig(lr=0.01, warmup_epochs=0.5),
        task=ImageClassification(label_smoothing=0.05, growth_weight=1.0, growth_every=2, growth_powers=1),
        epochs=1,
        ema=0.9,
        threads=1,
        log_every=2,
        output=str(folder),
    )
    return dataclasses.replace(base, **changes)


def curves(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [point.value for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_a_run_learns_reports_and_exports(tmp_path):
    data = DataConfig(name="corners", validation=32, batch_size=16)
    metrics = train(config(tmp_path, epochs=4, data=data), "restpoint-train --config x.yaml")
    points = curves(tmp_path)
    expected = {"loss", "accuracy", "lr", "evaluations", "residual", "converged", "skipped", "growth"}
    expected |= {"memory_gb", "examples_per_second"}
    assert expected <= {tag.removeprefix("train/") for tag in points}
    assert points["eval/accuracy"][-1] == pytest.approx(metrics["accuracy"])
    assert metrics["accuracy"] > 0.8
    assert set(metrics) == {
        "accuracy", "cross_entropy", "evaluations", "evaluations_max", "residual_max", "converged",
    }  # fmt: skip

    card = Card.load(tmp_path / "conv_deq_tiny.corners.json")
    assert card.metrics == metrics
    assert card.command == "restpoint-train --config x.yaml"
    assert card.input.shape == (1, 5, 5)
    assert card.labels == tuple("abcd")
    assert "32 training images were set aside" in card.data.split
    assert "adjoint" not in card.arguments
    assert (card.epochs, card.note, card.published, card.picture) == (4, "", (), "")
    model = create_model(card.architecture, **card.arguments)
    load_state(model, read_weights(tmp_path / card.weights.file, card.weights), "test")
    assert evaluate_model(model, data="corners")["accuracy"] > 0.8


def test_the_solves_of_any_model_have_curves(tmp_path):
    model = ModelConfig("ode_net_tiny", arguments={"stem_channels": [4], "groups": 2})
    name = "ode_net_tiny.corners"
    metrics = train(config(tmp_path, epochs=1, name=name, model=model, task=ImageClassification(), log_every=1))
    points = curves(tmp_path)
    assert points["train/evaluations"][-1] > 1
    assert points["train/adjoint_evaluations"][-1] >= 0
    assert points["train/residual"][-1] <= 1  # in units of the tolerance
    assert points["train/converged"][-1] == metrics["converged"] == 1
    assert metrics["evaluations_max"] >= metrics["evaluations"] > 1


def test_several_solves_are_counted_together_and_the_model_is_left_as_it_was():
    model = create_model("test_ode_convnext", num_classes=3, in_chans=1).eval()
    images = torch.randn(2, 1, 16, 16)
    with watched(model) as solves:
        model(images)
    alone = model.solve(images)
    assert len(solves) == len(alone) > 1
    evaluations, converged = effort(solves)
    assert evaluations.tolist() == sum(solution.stats.evaluations for solution in alone).tolist()
    assert converged.all()
    assert not any("solve" in vars(layer) for layer in model.modules())


def test_what_the_literature_says_and_a_picture_come_along(tmp_path):
    published = [Published("accuracy", 0.9, "a paper, table 1")]
    train(config(tmp_path, epochs=1, published=published, note="One epoch of a hundred."))
    card = Card.load(tmp_path / "conv_deq_tiny.corners.json")
    assert (card.epochs, card.note, list(card.published)) == (1, "One epoch of a hundred.", published)
    assert (tmp_path / card.picture).read_bytes().startswith(b"\x89PNG")


def test_a_figure_for_another_metric_is_refused_in_words(tmp_path):
    published = [Published("acuracy", 0.9, "a paper")]
    with pytest.raises(CardError, match="'acuracy' is not among the metrics accuracy"):
        train(config(tmp_path, epochs=1, published=published))


def test_the_shipped_recipe_lowers_the_loss_on_the_digits(tmp_path):
    recipe = parse(_find_recipes(["--config", "conv_deq_tiny_digits.yaml", "--output", str(tmp_path)]))
    recipe.epochs, recipe.log_every, recipe.data.validation = 2, 1, 900
    train(recipe)
    losses = curves(tmp_path)["train/cross_entropy"]
    assert sum(losses[-3:]) < 0.95 * sum(losses[:3])


def test_the_test_set_is_looked_at_once(tmp_path):
    train(config(tmp_path / "test", epochs=3))
    assert len(curves(tmp_path / "test")["eval/accuracy"]) == 1
    train(config(tmp_path / "validation", epochs=3, data=DataConfig(name="corners", validation=32, batch_size=16)))
    assert len(curves(tmp_path / "validation")["eval/accuracy"]) == 3


def test_the_adjoints_statistics_are_reported(tmp_path):
    train(config(tmp_path, model=ModelConfig(arguments=dict(SMALL)), ema=None))
    points = curves(tmp_path)
    assert min(points["train/adjoint_evaluations"]) > 0
    assert max(points["train/adjoint_residual"]) < 0.1


def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path):
    train(config(tmp_path / "whole", epochs=3))

    class Interrupted(Exception):
        pass

    class Stops(ImageClassification):
        def losses(self, model, batch, step):
            if step == 19:  # in the third epoch
                raise Interrupted
            return super().losses(model, batch, step)

    options = {f.name: getattr(config("").task, f.name) for f in dataclasses.fields(ImageClassification)}
    with pytest.raises(Interrupted):
        train(config(tmp_path / "parts", epochs=3, task=Stops(**options)))
    with pytest.raises(TrainingError, match="holds a run already"):
        train(config(tmp_path / "parts", epochs=3))
    train(config(tmp_path / "parts", epochs=3, resume=True))
    name = "conv_deq_tiny.corners.safetensors"
    assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def test_a_damaged_or_foreign_checkpoint_is_refused(tmp_path):
    train(config(tmp_path))
    wider = ModelConfig(arguments={**SMALL, "channels": 16})
    with pytest.raises(CheckpointError, match="another model"):
        train(config(tmp_path, epochs=2, resume=True, model=wider))
    saved = tmp_path / "checkpoint.safetensors"
    saved.write_bytes(saved.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="not a whole checkpoint"):
        train(config(tmp_path, epochs=2, resume=True))


class Faulty(ImageClassification):
    """A loss that is NaN at some steps, and at others finite with a gradient that is not."""

    def losses(self, model, batch, step):
        outcome = super().losses(model, batch, step)
        if step in (1, 2):
            return Outcome(outcome.loss * float("nan"), {})
        if step == 4:
            return Outcome(outcome.loss + 0 * (model.get_classifier().bias.sum() * 0).sqrt(), {})
        return outcome


def test_steps_without_a_finite_loss_or_gradient_are_skipped_and_counted(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        metrics = train(config(tmp_path, task=Faulty()))
    assert curves(tmp_path)["train/skipped"][-1] == 3
    assert caplog.text.count("skipped") == 3
    assert metrics["cross_entropy"] < 10
    with pytest.raises(TrainingError, match="2 steps in a row"):
        train(config(tmp_path / "impatient", task=Faulty(), patience=2))


def test_supervised_intermediate_states_take_part_in_the_loss():
    torch.manual_seed(0)
    model = create_model("conv_deq_tiny", supervise=2, **{**SMALL, "stem_channels": (8,)})
    batch = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])
    plain = ImageClassification().losses(model, batch, 0).loss
    supervised = ImageClassification(correction=0.5).losses(model, batch, 0).loss
    # Near the start all states give about the same cross-entropy.
    assert supervised.item() == pytest.approx(2 * plain.item(), rel=0.1)


def test_a_model_that_is_no_equilibrium_model_is_trained_by_its_logits():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    batch = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])
    outcome = ImageClassification(growth_weight=1.0).losses(model, batch, 0)
    assert outcome.solutions == []
    assert set(evaluate_model(model, data="digits", limit=20)) == {"accuracy", "cross_entropy"}


def test_what_cannot_be_trained_or_evaluated_is_said(tmp_path):
    with pytest.raises(TrainingError, match="no option 'chanels'"):
        train(config(tmp_path / "a", model=ModelConfig(arguments={"chanels": 3})))
    with pytest.raises(DataError, match="validation"):
        train(config(tmp_path / "b", data=DataConfig(name="corners", validation=5000)))
    with pytest.raises(DataError, match="give data="):
        evaluate_model(torch.nn.Linear(2, 2))
    with pytest.raises(DataError, match="There is no task"):
        evaluate_model(torch.nn.Linear(2, 2), data="digits", task="image-classificaton")


def test_fine_tuning_starts_from_the_zoos_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("RESTPOINT_HOME", str(tmp_path / "home"))
    train(config(tmp_path / "home" / "checkpoints", name="conv_deq_tiny.mine"))
    pretrained = ModelConfig(name="conv_deq_tiny.mine", pretrained=True)
    metrics = train(config(tmp_path / "tuned", model=pretrained, optimizer=OptimizerConfig(lr=1e-6)))
    assert metrics["accuracy"] == pytest.approx(load_card("conv_deq_tiny.mine").metrics["accuracy"], abs=0.05)
    assert Card.load(tmp_path / "tuned" / "conv_deq_tiny.corners.json").arguments["channels"] == 8


def test_the_shipped_digits_are_as_good_as_their_card_says_to_the_last_digit():
    card = load_card("conv_deq_tiny.digits")
    measured = evaluate_model("conv_deq_tiny.digits")
    assert measured["accuracy"] == card.metrics["accuracy"] >= 0.985
    assert measured["converged"] == 1.0
