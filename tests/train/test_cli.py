"""Recipes, overrides, and what the command says to a misspelt key."""

import json

import pytest
import yaml

from restpoint.train.cli import RECIPES, UsageError, command_line, main, parse
from restpoint.train.config import Config
from restpoint.train.data import Affine
from restpoint.train.tasks import ImageClassification


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_is_valid_and_named_after_its_model(recipe):
    config = parse([f"--config={recipe}"])
    assert isinstance(config, Config)
    # A model may have a second recipe, whose name says what is different.
    assert f"{recipe.stem}_".startswith(f"{config.name.replace('.', '_')}_")
    assert config.name.partition(".")[0] == config.model.name.partition(".")[0]


def test_defaults_recipe_and_overrides(tmp_path):
    assert parse([]) == Config()
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        yaml.safe_dump(
            {
                "name": "a.b",
                "model": {"name": "a", "arguments": {"solver": {"$class": "Anderson", "memory": 4}, "widths": [1, 2]}},
                "data": {"augment": {"rotate": 5}},
                "task": {"class_path": "ImageClassification", "init_args": {"label_smoothing": 0.1}},
            }
        )
    )
    config = parse(
        ["--config", str(recipe), "--optimizer.lr=0.5", "--task.growth_weight", "2", "--data.augment.shift", "1.5",
         "--model.arguments.width", "3"]
    )  # fmt: skip
    assert config.optimizer.lr == 0.5
    assert config.task == ImageClassification(label_smoothing=0.1, growth_weight=2.0)
    assert config.data.augment == Affine(rotate=5.0, shift=1.5)
    assert config.model.arguments == {"solver": {"$class": "Anderson", "memory": 4}, "widths": [1, 2], "width": 3}


@pytest.mark.parametrize(
    "arguments, meant",
    [
        (["--epoch", "3"], "epochs"),
        (["--optimizer.weightdecay", "3"], "weight_decay"),
        (["--data.batchsize", "3"], "batch_size"),
        (["--optimiser.lr", "3"], "optimizer"),
        (["--task.class_path", "EntityRecognition", "--epoch", "3"], "epochs"),
        (["--task.label_smothing", "3"], "label_smoothing"),
        ("epoch: 3", "epochs"),
        ("model: {nam: x}", "name"),
        ("task: {class_path: ImageClassification, init_args: {growth_wait: 1}}", "growth_weight"),
        (["--task.class_path", "ImageClasification"], "ImageClassification"),
        (["--task", "DensityEstimaton"], "DensityEstimation"),
        ("task: {class_path: SudokuSolvin}", "SudokuSolving"),
    ],
)
def test_unknown_keys_get_a_suggestion(arguments, meant, tmp_path):
    if isinstance(arguments, str):
        (tmp_path / "r.yaml").write_text(arguments)
        arguments = ["--config", str(tmp_path / "r.yaml")]
    with pytest.raises(UsageError, match=f"Did you mean '{meant}'"):
        parse(arguments)


@pytest.mark.parametrize("content", [b"\x89PNG\xff\x00", b"name: [a\nmodel: }"])
def test_a_recipe_that_is_no_yaml_is_refused(content, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_bytes(content)
    with pytest.raises(UsageError, match="config"):
        parse([f"--config={recipe}"])


def test_metrics_are_printed_as_json_where_they_are_asked_for(tmp_path, capsys):
    small = "--model.arguments.channels 4 --model.arguments.groups 2 --model.arguments.stem-channels [4]"
    line = f"--json {small} --data.validation 1000 --epochs 1 --threads 1 --output {tmp_path / 'run'}"
    assert main(line.split()) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert 0 < metrics["accuracy"] < 1
    card = json.loads((tmp_path / "run" / "conv_deq_tiny.digits.json").read_text())
    assert card["metrics"]["accuracy"] == pytest.approx(metrics["accuracy"])
    assert "--json" not in card["command"]


def test_a_recipe_without_its_option_is_recognised():
    with pytest.raises(UsageError, match="A recipe is given as --config digits.yaml"):
        parse(["digits.yaml"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--epochs 0", "epochs must be at least 1; got 0"),
        ("--accumulate 0", "accumulate must be at least 1"),
        ("--log-every 0", "log_every must be at least 1"),
        ("--threads 0", "threads must be at least 1"),
        ("--warmup.steps 3 --warmup.layers 0", "warmup.layers must be at least 1; got 0"),
        ("--data.batch-size 4 --accumulate 8", "A batch of 4 cannot be cut into 8 parts in each of 1 processes"),
        ('--model.arguments {"solver":{"$class":"Andersen"}}', "no option class 'Andersen'. Did you mean 'Anderson'"),
        ("--data.batch-size 0", "data.batch_size must be at least 1"),
        ("--data.batch-size 5000", "cannot be cut into batches as the recipe says: 1198 training images do not fill"),
        ("--data.validation -1", "data.validation must not be negative"),
        ("--optimizer.lr 0", "optimizer.lr must be positive"),
        ("--optimizer.name adamww", "timm has no optimiser 'adamww'. Did you mean 'adamw'"),
        ("--optimizer.schedule cosin", "there is no 'cosin'. Did you mean 'cosine'"),
        ("--ema 1.5", r"ema must lie in [0, 1); got 1.5"),
        ("--device cupu", "torch knows no 'cupu'"),
        ("--device cuda:99", "cuda:99 is not here"),
        ("--data-dir absent", "data_dir: there is no folder absent"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_computed(arguments, message, tmp_path, capsys):
    assert main([*arguments.split(), f"--output={tmp_path / 'run'}"]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.safetensors"))


def test_values_of_another_type_are_refused():
    with pytest.raises(UsageError, match="epochs"):
        parse(["--epochs", "many"])


def test_the_command_prints_its_configuration_and_finds_its_recipes(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--config", "conv_deq_tiny_digits.yaml", "--data.batch-size", "7", "--print-config"])
    assert stop.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["data"]["batch_size"] == 7
    assert printed["name"] == "conv_deq_tiny.digits"
    with pytest.raises(SystemExit, match="Did you mean 'conv_deq_tiny_digits.yaml'"):
        main(["--config", "conv_deq_tiny_digit.yaml"])
    assert main(["--epoch", "3"]) == 2
    assert "Did you mean 'epochs'" in capsys.readouterr().err


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "example: restpoint-train --config" in capsys.readouterr().out


def test_the_command_on_a_card_names_no_place_of_this_machine():
    line = command_line(
        [
            "--config",
            "/home/me/train/recipes/r.yaml",
            "--data_dir",
            "/home/me/data",
            "--output=/home/me/runs",
            "--seed",
            "1",
        ]
    )
    assert line == "restpoint-train --config r.yaml --data-dir DATA_DIR --seed 1"
    assert command_line(["--config=/x/r.yaml", "--data_dir=/y", "--output", "/z"]) == (
        "restpoint-train --config=r.yaml --data-dir DATA_DIR"
    )
