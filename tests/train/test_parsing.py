"""Dependency trees from files to a checkpoint that predicts."""

import json

import pytest
import torch

from restpoint.train import evaluate_model, train
from restpoint.train.config import Config, DataConfig, ModelConfig, OptimizerConfig
from restpoint.train.data import DataError, load_data
from restpoint.train.tasks import DependencyParsing
from restpoint.zoo import create_model
from restpoint.zoo.cli import main
from restpoint.zoo.parse import Parsed

# Word, part of speech, head, relation.
PATTERNS = [
    "the DET 2 det|dog NOUN 3 nsubj|sees VERB 0 root|a DET 5 det|cat NOUN 3 obj",
    "a DET 2 det|cat NOUN 3 nsubj|barks VERB 0 root|! PUNCT 3 punct",
    "the DET 2 det|dog NOUN 4 nsubj:pass|was AUX 4 aux:pass|seen VERB 0 root",
    "the DET 2 det|dog NOUN 0 root",
]


def conllu(patterns):
    lines = []
    for pattern in patterns:
        for i, entry in enumerate(pattern.split("|"), 1):
            word, tag, head, relation = entry.split()
            lines.append("\t".join([str(i), word, word, tag, "_", "_", head, relation, "_", "_"]))
        lines.append("")
    return "\n".join(lines) + "\n"


@pytest.fixture
def folder(tmp_path):
    for part, count in (("train", 10), ("dev", 1), ("test", 2)):
        (tmp_path / f"en_ewt-ud-{part}.conllu").write_text(conllu(PATTERNS * count))
    return tmp_path


def test_the_data_set(folder):
    source = load_data("ud_english_ewt_trees", folder)
    assert source.classes == ("aux", "det", "nsubj", "obj", "punct", "root")
    assert source.model_arguments == {"num_relations": 6}
    assert source.test.tags[2].tolist() == [[2, 1], [4, 2], [4, 0], [0, 5]]
    words, trees = source.test.take(slice(2)).padded()
    assert trees.shape == (*words.shape[:2], 2)
    assert (trees[1, 4:] == -1).all()
    with pytest.raises(DataError, match="ud_english_ewt_trees: give the folder"):
        load_data("ud_english_ewt_trees")


@pytest.mark.parametrize(
    "pattern, message",
    [
        ("a DET 2 det|dog NOUN 1 root", "heads of sentence 1 of the dev set are no tree"),
        ("a DET 0 det|dog NOUN 0 root", "heads of sentence 1 of the dev set are no tree"),
        ("a DET 3 det|dog NOUN 0 root", "heads of sentence 1 of the dev set are no tree"),
        ("a DET _ det|dog NOUN 0 root", "'a' has the head '_' and relation 'det'"),
        ("a DET 2 detx|dog NOUN 0 root", "'a' has the head '2' and relation 'detx'"),
    ],
)
def test_damaged_trees(folder, pattern, message):
    (folder / "en_ewt-ud-dev.conllu").write_text(conllu([pattern]))
    with pytest.raises(DataError, match=message):
        load_data("ud_english_ewt_trees", folder)


def test_scores_count_heads_and_relations():
    class Fixed(torch.nn.Module):
        def decode(self, words):
            return torch.tensor([[[2, 0], [0, 1], [2, 2]], [[0, 1], [1, 0], [-1, -1]]])

        def log_likelihood(self, words, trees):
            return torch.tensor([-2.0, -3.0])

    words = torch.ones(2, 3, 4, dtype=torch.uint8)
    words[1, 2] = 0
    trees = torch.tensor([[[2, 0], [0, 1], [2, 0]], [[2, 1], [0, 0], [-1, -1]]])
    found = DependencyParsing().evaluate(Fixed(), [(words, trees)])
    assert found == {"las": 2 / 5, "uas": 3 / 5, "sentences": 1 / 2, "nll": 1.0}


def test_from_files_to_a_tree(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RESTPOINT_HOME", str(tmp_path / "home"))
    sizes = {
        "arc_dim": 12, "relation_dim": 8, "vocabulary": 8, "word_dim": 8, "byte_dim": 8, "filters": 4, "hidden": 12,
        "layers": 1, "dropout": 0.0, "word_dropout": 0.0,
    }  # fmt: skip
    config = Config(
        name="biaffine_small.trial",
        model=ModelConfig("biaffine_small", sizes),
        data=DataConfig("ud_english_ewt_trees", batch_size=4, eval_batch_size=4),
        optimizer=OptimizerConfig(lr=0.03),
        task=DependencyParsing(),
        epochs=14,
        ema=0.9,
        threads=1,
        data_dir=str(folder),
        output=str(tmp_path / "home" / "checkpoints"),
    )
    metrics = train(config, "restpoint-train")
    assert (metrics["las"], metrics["uas"], metrics["sentences"]) == (1, 1, 1)
    assert metrics["nll"] < 0.3
    model = create_model("biaffine_small.trial", pretrained=True)
    assert evaluate_model(model, folder)["nll"] == pytest.approx(metrics["nll"], rel=1e-4)
    assert main(["predict", "biaffine_small.trial", "the dog sees a cat", "the dog"]) == 0
    first, second = capsys.readouterr().out.split("\n\n")
    assert [line.rsplit("  ", 1)[0] for line in first.splitlines()] == [
        "sees",
        "├─ dog",
        "│  └─ the",
        "└─ cat",
        "   └─ a",
    ]
    assert second.startswith("dog  root ")
    assert main(["predict", "biaffine_small.trial", "--json", "a cat barks !"]) == 0
    (parsed,) = json.loads(capsys.readouterr().out)
    assert parsed["heads"] == [2, 3, 0, 3]
    assert parsed["relations"] == ["det", "nsubj", "root", "punct"]
    assert main(["predict", "biaffine_small.trial", ""]) == 1


def test_trees_as_text():
    parsed = Parsed("", ("a", "b", "c", "d"), (2, 0, 2, 3), ("x", "root", "y", "z"), (0.5, 1.0, 0.25, 1.0))
    assert parsed.drawn() == "b  root 100.0%\n├─ a  x 50.0%\n└─ c  y 25.0%\n   └─ d  z 100.0%"
