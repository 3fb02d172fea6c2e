"""The command line, as a user would call it."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from restpoint.zoo import ImageInput, create_model, load_card, save_pretrained
from restpoint.zoo.cli import main
from restpoint.zoo.files import PACKAGE_CHECKPOINTS
from restpoint.zoo.predict import predict_files, read_image
from restpoint.zoo.tables import comma_separated, markdown, table

COMMANDS = ["list", "info", "predict", "evaluate", "picture", "results", "demo", "train"]


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    paths = []
    for i, shape in enumerate([(6, 5), (12, 10, 3), (6, 5, 4)]):
        paths.append(str(tmp_path / f"{i}.png"))
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(paths[-1])
    return paths


def run(capsys, *argv):
    status = main(argv)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_list_as_table_and_json(tiny, capsys):
    status, out, _ = run(capsys, "list", "trial*")
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()] == ["name", "trial_bare", "trial_tiny", "trial_tiny.ones"]
    assert "accuracy 0.5" in out
    _, out, _ = run(capsys, "list", "trial*", "--pretrained", "--json")
    assert json.loads(out) == [
        {
            "name": "trial_tiny.ones",
            "family": "trial",
            "task": "image-classification",
            "data": "noise",
            "parameters": 55,
            "metrics": {"accuracy": 0.5},
        }
    ]


def test_a_list_of_nothing_says_so(tiny, capsys):
    status, out, err = run(capsys, "list", "none*", "nor*")
    assert (status, out) == (1, "")
    assert "no model matches none* nor*" in err


def test_info(tiny, capsys):
    status, out, _ = run(capsys, "info", "trial_tiny.ones")
    assert status == 0
    for part in ("A classifier of one convolution.", "weights.sha256", "data.licence", "CC0-1.0", "num_classes"):
        assert part in out
    _, out, _ = run(capsys, "info", "trial_tiny.ones", "--json")
    assert json.loads(out)["arguments"] == {"solver": {"$class": "Picard", "damping": 0.5}}
    status, out, _ = run(capsys, "info", "trial_bare", "--json")
    assert status == 0
    assert json.loads(out)["options"] == ["num_classes", "in_chans"]


def test_what_a_user_can_mend_is_one_line(tiny, home, capsys):
    status, out, err = run(capsys, "info", "trial_tini")
    assert (status, out) == (1, "")
    assert err == (
        "restpoint: There is no model 'trial_tini'. Did you mean 'trial_tiny'? restpoint.list_models() and "
        "`restpoint list` give all names.\n"
    )
    (home / "checkpoints" / "trial_tiny.ones.safetensors").write_bytes(b"")
    status, _, err = run(capsys, "predict", "trial_tiny.ones", "x.png")
    assert status == 1
    assert "truncated" in err


def test_predict_agrees_with_the_model(tiny, images, capsys):
    status, out, _ = run(capsys, "predict", "trial_tiny.ones", *images, "--json", "--top", "2")
    assert status == 0
    results = json.loads(out)
    for path, result in zip(images, results, strict=True):
        # By hand: grey, resized, scaled to [0, 1], normalised with mean .5 and standard deviation .25.
        grey = Image.open(path).convert("L").resize((5, 6), Image.Resampling.BILINEAR)
        pixels = (torch.tensor(np.array(grey)) / 255 - 0.5) / 0.25
        probabilities = tiny(pixels[None, None]).softmax(1)[0]
        best = probabilities.argsort(descending=True)[:2].tolist()
        assert result["file"] == path
        assert result["labels"] == ["abc"[i] for i in best]
        assert result["probabilities"] == pytest.approx(probabilities[best].tolist(), abs=1e-6)
    _, out, _ = run(capsys, "predict", "trial_tiny.ones", *images)
    assert [line.split()[0] for line in out.splitlines()] == ["file", *images]


def test_a_broken_file_is_named_and_stops_nothing(tiny, images, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(b"no image")
    Image.fromarray(np.zeros((6, 5), dtype=np.uint16)).save(tmp_path / "deep.png")
    files = [
        str(tmp_path / "absent.png"),
        images[0],
        str(tmp_path / "broken.png"),
        str(tmp_path / "deep.png"),
        images[1],
    ]
    status, out, err = run(capsys, "predict", "trial_tiny.ones", *files)
    assert status == 1
    assert [line.split()[0] for line in out.splitlines()] == ["file", images[0], images[1]]
    assert err.splitlines()[-1] == "restpoint: 3 of 5 files were skipped"
    for name, reason in (("absent", "No such file"), ("broken", "cannot identify"), ("deep", "more than 8 bits")):
        assert any(f"{name}.png: " in line and reason in line for line in err.splitlines())


def test_batches_do_not_change_the_answer(tiny, images):
    card = load_card("trial_tiny.ones")
    files = [images[i % 3] for i in range(7)]
    one, many = (list(predict_files(tiny, card, files, batch_size=size)) for size in (1, 4))
    assert [p.labels for p in one] == [p.labels for p in many]
    assert [p.file for p in many] == files


def test_a_card_that_cannot_predict_says_why(tiny, images, tmp_path, capsys):
    save_pretrained(create_model("trial_tiny"), tmp_path / "new")
    status, _, err = run(capsys, "predict", f"local-dir:{tmp_path / 'new'}", images[0])
    assert status == 1
    assert "its `input` is missing" in err
    save_pretrained(create_model("trial_bare"), tmp_path / "bare")
    status, _, err = run(capsys, "predict", f"local-dir:{tmp_path / 'bare'}", images[0])
    assert status == 1
    assert "trial_bare.local does not classify images: its task is regression" in err


def test_a_model_for_another_number_of_channels(images, tmp_path):
    assert read_image(images[0], ImageInput((3, 4, 7), (0.0,) * 3, (1.0,) * 3)).shape == (3, 4, 7)
    with pytest.raises(ValueError, match="takes 2 channels"):
        read_image(images[0], ImageInput((2, 4, 7), (0.0,) * 2, (1.0,) * 2))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    assert f"restpoint{'-train' if command == 'train' else ''} " in capsys.readouterr().out


def test_the_help_names_every_command(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert all(f"    {command} " in out for command in COMMANDS)


@pytest.mark.parametrize("call", ["", "lits", "list --famly x", "predict x", "predict x file --top 0"])
def test_a_wrong_call_is_status_two(call, capsys):
    with pytest.raises(SystemExit) as caught:
        main(call.split())
    assert caught.value.code == 2
    assert "usage: restpoint" in capsys.readouterr().err


def test_evaluate_sets_what_is_measured_beside_the_card(capsys):
    status, out, err = run(capsys, "evaluate", "ode_net_tiny.digits")
    assert status == 0
    # Another release of torch rounds otherwise.
    other = load_card("ode_net_tiny.digits").torch
    assert (f"of torch {other}; this is {torch.__version__}." in err) == (other != torch.__version__)
    assert out.splitlines()[0].split() == ["metric", "value", "card"]
    name, value, card = out.splitlines()[1].split()
    assert name == "accuracy"
    assert float(value) == pytest.approx(float(card), abs=2e-3)


def test_a_picture_is_drawn_again_as_its_card_has_it(tmp_path, capsys):
    status, out, _ = run(capsys, "picture", "conv_deq_tiny.digits", "--output", str(tmp_path / "new" / "a.png"))
    assert (status, out) == (0, f"wrote {tmp_path / 'new' / 'a.png'}\n")
    shipped = PACKAGE_CHECKPOINTS / load_card("conv_deq_tiny.digits").picture
    with Image.open(tmp_path / "new" / "a.png") as ours, Image.open(shipped) as theirs:
        assert ours.size == theirs.size
        assert np.abs(np.asarray(ours.convert("L"), float) - np.asarray(theirs.convert("L"), float)).mean() < 1


def test_a_model_without_data_or_drawing_says_so(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(capsys, "picture", "trial_tiny.ones")[0] == 1
    status, _, err = run(capsys, "picture", "bilstm_crf_small.ewt")
    assert status == 1
    assert "data-dir" in err
    assert not list(tmp_path.glob("*.png"))


def test_results_are_measured(capsys):
    status, out, err = run(capsys, "results", "conv_deq_tiny.*", "ode_net_tiny.*", "--json", "--batch", "2")
    assert status == 0
    assert "not measured" not in err
    rows = json.loads(out)
    assert [row["model"] for row in rows] == ["conv_deq_tiny.digits", "ode_net_tiny.digits"]
    for row in rows:
        card = load_card(row["model"])
        assert row["value"] == card.metrics["accuracy"]
        assert row["checkpoint"] == card.weights.size / 1024
        assert row["evaluations"] > 1
        assert row["milliseconds"] > 0
        assert 0 < row["memory"] < row["memory_backward"]
    for row in rows:
        assert row["memory_growth"] == pytest.approx(1, abs=0.1)


def test_results_of_data_that_are_not_here_say_so(tiny, capsys, tmp_path):
    status, out, err = run(capsys, "results", "trial_tiny.ones", "--json")
    assert status == 0
    assert "trial_tiny.ones is not measured: There is no data set 'noise'" in err
    (row,) = json.loads(out)
    assert (row["value"], row["milliseconds"], row["memory"]) == (0.5, None, None)
    for form, start in (("--csv", "model,data,parameters,"), ("--markdown", "# Results"), ("--batch=8", "model ")):
        _, out, _ = run(capsys, "results", "trial_tiny.ones", form)
        assert out.startswith(start)
        assert "trial_tiny.ones" in out
    status, out, _ = run(capsys, "results", "trial_tiny.ones", "--batch=8", "--write", str(tmp_path / "docs"))
    assert (status, out) == (0, "")
    assert (tmp_path / "docs" / "results.csv").read_text().startswith("model,data,parameters,")
    page = (tmp_path / "docs" / "results.md").read_text()
    assert page.startswith("# Results") and "--batch 8" in page and "| trial_tiny.ones |" in page
    status, out, err = run(capsys, "results", "none*")
    assert (status, out) == (1, "")
    assert "no pretrained model matches none*" in err


def test_info_of_an_architecture_names_its_weights(tiny, capsys):
    _, out, _ = run(capsys, "info", "trial_tiny", "--json")
    assert json.loads(out)["pretrained"] == ["trial_tiny.ones"]


def test_tables_align():
    rows = [{"name": "a", "n": 1234567, "x": None}, {"name": "long", "n": 8, "x": {"k": 0.123456}}]
    assert table(rows) == "name          n  x\na     1,234,567  -\nlong          8  k 0.1235"


def test_tables_for_documents():
    rows = [{"a|b": 1, "c": None}, {"a|b": 2.5, "c": "x,y"}]
    assert markdown(rows) == "| a\\|b | c |\n| ---: | --- |\n| 1 | - |\n| 2.5 | x,y |\n"
    assert comma_separated(rows) == 'a|b,c\n1,\n2.5,"x,y"\n'
