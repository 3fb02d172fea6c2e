"""Folders of images, and pretrained models that are tuned to them."""

import dataclasses
import logging
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from restpoint.train import Config, DataConfig, ModelConfig, OptimizerConfig, TrainingError, evaluate_model, train
from restpoint.train.cli import _find_recipes, main, parse
from restpoint.train.data import DataError, FolderBatches, ImageSet, MixedBatches, Source, load_data
from restpoint.train.data.augment import Affine
from restpoint.train.data.folder import ImageList
from restpoint.train.data.write_folder import main as write_folder
from restpoint.train.finetune import freeze
from restpoint.train.tasks import ImageClassification
from restpoint.zoo import Card, create_model, save_pretrained
from restpoint.zoo.cards import ImageInput

HOW = ImageInput((1, 8, 8), (0.3,), (0.4,))


def picture(path, value, size=(9, 7), mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size[1], size[0]), value, dtype=np.uint8)).convert(mode).save(path)


@pytest.fixture
def shades(tmp_path):
    """Three classes of grey, twenty images each, without a split."""
    for label, name in enumerate(("black", "grey", "white")):
        for i in range(20):
            picture(tmp_path / "shades" / name / f"{i:02d}.png", 30 + 80 * label + i)
    return tmp_path / "shades"


def test_a_folder_without_a_split_is_split_by_class(shades, caplog):
    source = load_data("image_folder", shades)
    assert source.classes == ("black", "grey", "white")
    assert np.bincount(source.train.labels).tolist() == [16] * 3
    assert np.bincount(source.test.labels).tolist() == [4] * 3
    assert not set(source.train.paths) & set(source.test.paths)
    assert load_data("image_folder", shades).test == source.test
    fitted = source.fitted((3, 4, 5), None)
    assert fitted.model_arguments == {"num_classes": 3, "in_chans": 3}
    assert fitted.how.mean == pytest.approx((0.474,) * 3, abs=0.02)
    assert source.fitted(None, HOW).how == HOW
    assert source.fitted((1, 6, 6), HOW).how == ImageInput((1, 6, 6), HOW.mean, HOW.std)
    images, labels = next(iter(FolderBatches(fitted.train, fitted.how, 10)))
    assert images.shape == (10, 3, 4, 5)
    assert labels.tolist() == [0] * 10


def test_broken_images_are_named_left_out_and_counted(shades, caplog):
    (shades / "grey" / "07.png").write_bytes((shades / "grey" / "07.png").read_bytes()[:40])
    (shades / "grey" / "notes.txt").write_text("no image, and none by its name")
    (shades / "white" / "x.jpg").write_text("no image")
    with caplog.at_level(logging.WARNING):
        source = load_data("image_folder", shades)
    assert sorted(path.name for path in source.broken) == ["07.png", "x.jpg"]
    assert str(shades / "grey" / "07.png") in caplog.text
    assert "2 of 61 images could not be read" in caplog.text
    assert len(source.train) + len(source.test) == 59


def test_folders_of_another_layout_are_refused(shades, tmp_path):
    def fails(folder, match):
        with pytest.raises(DataError, match=match):
            load_data("image_folder", folder)

    fails(None, "--data-dir")
    fails(tmp_path / "nowhere", "is missing")
    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", "is empty")
    picture(tmp_path / "loose" / "a.png", 3)
    fails(tmp_path / "loose", "no folder a class")
    shutil.copytree(shades, tmp_path / "halves" / "train")
    fails(tmp_path / "halves", "none of val/")
    shutil.copytree(shades, tmp_path / "halves" / "val")
    (tmp_path / "halves" / "val" / "grey").rename(tmp_path / "halves" / "val" / "gray")
    fails(tmp_path / "halves", "'gray', which train/ has not. Did you mean 'grey'")
    (tmp_path / "halves" / "val" / "gray").rename(tmp_path / "halves" / "val" / "grey")
    assert len(load_data("image_folder", tmp_path / "halves").test) == 60
    shutil.rmtree(shades / "black")
    shutil.rmtree(shades / "white")
    fails(shades, r"one class \(grey\) alone")
    (shades / "nothing").mkdir()
    fails(shades, "class 'nothing' in .* has no readable training image")


def test_labels_out_of_range_are_refused():
    images, labels = torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 2, 1])
    good, bad = ImageSet(images, labels % 2), ImageSet(images, labels)
    with pytest.raises(DataError, match="test image 1 has the label 2, and there are 2 classes"):
        Source("x", good, bad, ("a", "b"), (0.0,), (1.0,), "", "", "")


def test_random_transforms_are_functions_of_seed_epoch_and_image(shades):
    files = load_data("image_folder", shades).train
    options = {"scale": [0.3, 1.0], "hflip": 0.5, "auto_augment": "rand-m9"}

    def batches(**more):
        return FolderBatches(files, HOW, 8, shuffle=True, transform=options, augment=Affine(rotate=20), seed=1, **more)

    state = torch.get_rng_state()
    whole = list(batches().epoch(3))
    assert torch.get_rng_state().equal(state)
    assert len(whole) == 6
    later = list(batches(workers=1).epoch(3, start=4))
    assert all(a.equal(b) and c.equal(d) for (a, c), (b, d) in zip(whole[4:], later, strict=True))
    first, second = (next(batches().epoch(0, rank=rank, world=2)) for rank in (0, 1))
    one = next(batches().epoch(0))
    torch.testing.assert_close(torch.cat([first[0], second[0]]), one[0])
    assert torch.cat([first[1], second[1]]).equal(one[1])
    with pytest.raises(DataError, match="timm.data.create_transform"):
        FolderBatches(files, HOW, 8, transform={"hfilp": 0.5})
    with pytest.raises(DataError, match="do not fill one batch"):
        FolderBatches(ImageList(files.paths[:3], files.labels[:3]), HOW, 8, shuffle=True)


def test_mixed_batches_are_functions_of_seed_epoch_and_place(shades):
    plain = FolderBatches(load_data("image_folder", shades).train, HOW, 8, shuffle=True)
    mixed = MixedBatches(plain, {"mixup_alpha": 1.0}, classes=3, seed=2)
    assert (len(mixed), mixed.rows(0)) == (6, 8)
    whole, later = list(mixed.epoch(1)), list(mixed.epoch(1, start=5))
    assert whole[5][0].equal(later[0][0])
    torch.testing.assert_close(whole[0][1].sum(1), torch.ones(8))
    assert ((whole[0][1] > 0) & (whole[0][1] < 1)).any()
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3))
    outcome = ImageClassification(label_smoothing=0.1).losses(model, whole[0], 0)
    assert torch.isfinite(outcome.loss)
    with pytest.raises(DataError, match="timm.data.Mixup"):
        MixedBatches(plain, {"mixup_alhpa": 1.0}, classes=3)
    with pytest.raises(DataError, match="pairs"):
        next(mixed.epoch(0, rank=0, world=8))


def test_patterns_freeze_parameters_and_must_match():
    model = create_model("conv_deq_tiny", channels=4, stem_channels=(4,), groups=2)
    freeze(model, ["stem.*", "deq.cell.norm?.weight"])
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert {name.partition(".")[0] for name in frozen} == {"stem", "deq"}
    assert "deq.cell.norm1.weight" in frozen
    assert "deq.cell.norm1.bias" not in frozen
    with pytest.raises(TrainingError, match="Did you mean 'backbone'"):
        freeze(model, ["bakbone"])
    with pytest.raises(TrainingError, match="everything is frozen"):
        freeze(model, ["backbone", "classifier.*"])


@pytest.fixture
def pretrained(tmp_path):
    model = create_model("conv_deq_tiny", channels=4, stem_channels=(4,), groups=2, max_steps=8)
    save_pretrained(model, tmp_path / "model", input=HOW)
    return f"local-dir:{tmp_path / 'model'}", model.state_dict()


def tuned(tmp_path, shades, model, **changes):
    base = Config(
        name="conv_deq_tiny.shades",
        model=model if isinstance(model, ModelConfig) else ModelConfig(name=model, pretrained=True),
        data=DataConfig(name="image_folder", batch_size=8),
        optimizer=OptimizerConfig(lr=0.02),
        epochs=2,
        threads=1,
        data_dir=str(shades),
        output=str(tmp_path / "run"),
    )
    return dataclasses.replace(base, **changes)


def test_only_the_classifier_of_a_model_in_a_folder_is_trained(tmp_path, shades, pretrained):
    name, before = pretrained
    config = tuned(tmp_path, shades, ModelConfig(name=name, pretrained=True, freeze=["backbone"]))
    metrics = train(config)
    card = Card.load(tmp_path / "run" / "conv_deq_tiny.shades.json")
    assert (card.labels, card.input) == (("black", "grey", "white"), HOW)
    model = create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True)
    for key, value in model.state_dict().items():
        assert value.equal(before[key]) != key.startswith("classifier"), key
    assert evaluate_model(model, shades) == pytest.approx(metrics)


def test_layers_near_the_image_learn_slower(tmp_path, shades, pretrained):
    name, before = pretrained
    plain = OptimizerConfig(name="momentum", lr=0.01, clip=None, arguments={"momentum": 0.0})
    moved = []
    for decay in (1.0, 0.1):
        output = tmp_path / f"decay_{decay}"
        config = tuned(tmp_path, shades, name, optimizer=dataclasses.replace(plain, layer_decay=decay), epochs=1)
        train(dataclasses.replace(config, output=str(output), data=dataclasses.replace(config.data, batch_size=48)))
        model = create_model("conv_deq_tiny", checkpoint_path=output / "conv_deq_tiny.shades.safetensors",
                             channels=4, stem_channels=(4,), groups=2, num_classes=3)  # fmt: skip
        moved.append({key: float((value - before[key]).norm()) for key, value in model.state_dict().items()
                      if not key.startswith("classifier")})  # fmt: skip
    stem, cell = (moved[1][key] / moved[0][key] for key in ("stem.0.0.weight", "deq.cell.conv1.weight"))
    assert stem < 0.2 * cell < 0.2


def test_a_run_that_could_not_be_exported_or_has_too_few_classes_does_not_start(tmp_path, shades, pretrained):
    name, _ = pretrained
    with pytest.raises(TrainingError, match="give --name conv_deq_tiny.mine"):
        train(tuned(tmp_path, shades, name, name="my model"))
    with pytest.raises(TrainingError, match="has 2 classes, and the labels of image_folder go up to 2"):
        train(tuned(tmp_path, shades, ModelConfig(name, {"num_classes": 2}, pretrained=True)))


@pytest.mark.slow
def test_the_example_tells_odd_from_even_upside_down(tmp_path, caplog, capsys):
    assert write_folder([str(tmp_path / "digits")]) == 0
    with pytest.raises(SystemExit):
        write_folder([str(tmp_path / "digits")])
    assert "is not empty" in capsys.readouterr().err
    recipe = ["--config", "conv_deq_tiny_image_folder.yaml", "--data_dir", str(tmp_path / "digits")]
    config = parse(_find_recipes([*recipe, "--output", str(tmp_path / "run"), "--epochs", "2"]))
    with caplog.at_level(logging.INFO):
        metrics = train(config)
    assert "before: accuracy" in caplog.text
    assert metrics["accuracy"] > 0.85


def test_a_folder_that_is_missing_is_one_line_on_the_command_line(tmp_path, capsys):
    arguments = ["--config", "conv_deq_tiny_image_folder.yaml", "--output", str(tmp_path / "run")]
    assert main([*arguments, "--data-dir", str(tmp_path / "none")]) == 2
    assert "there is no folder" in capsys.readouterr().err
