"""Treebanks, batches of sentences, and a tagger from files to a checkpoint."""

import pytest
import torch

from restpoint.train import evaluate_model, train
from restpoint.train.config import Config, DataConfig, ModelConfig, OptimizerConfig
from restpoint.train.data import DataError, SentenceBatches, TaggedSet, load_data
from restpoint.train.data.conllu import UPOS, read_conllu
from restpoint.train.tasks import SequenceTagging
from restpoint.zoo import create_model

WORDS = {"dog": "NOUN", "cat": "NOUN", "sees": "VERB", "barks": "VERB", "the": "DET", "a": "DET", "!": "PUNCT"}
PATTERNS = ["the dog sees a cat", "a cat barks !", "the cat sees the dog !", "a dog barks", "the dog"]


def conllu(sentences):
    lines = []
    for sentence in sentences:
        lines.append(f"# text = {sentence}")
        for i, word in enumerate(sentence.split(), 1):
            lines.append("\t".join([str(i), word, word, WORDS[word], *["_"] * 6]))
        lines.append("")
    return "\n".join(lines) + "\n"


@pytest.fixture
def folder(tmp_path):
    for part, count in (("train", 8), ("dev", 1), ("test", 2)):
        (tmp_path / f"en_ewt-ud-{part}.conllu").write_text(conllu(PATTERNS * count))
    return tmp_path


def test_reading_words_and_tags(tmp_path):
    path = tmp_path / "x.conllu"
    path.write_text(
        "# newdoc\n1-2\tdon't\t_\t_\t_\t_\t_\t_\t_\t_\n1\tdo\tdo\tAUX\t_\t_\t_\t_\t_\t_\n"
        "2\tn't\tnot\tPART\t_\t_\t_\t_\t_\t_\n2.1\tgo\tgo\tVERB\t_\t_\t_\t_\t_\t_\n\n\n"
        "1\tGo\tgo\tVERB\t_\t_\t_\t_\t_\t_\n"
    )
    found = [[(columns[1], columns[3]) for columns in sentence] for sentence in read_conllu(path)]
    assert found == [[("do", "AUX"), ("n't", "PART")], [("Go", "VERB")]]


@pytest.mark.parametrize(
    "content, message",
    [
        ("1\tdog\tdog\tNOUN\n", "line 1: expected 10 columns, got 4"),
        ("\n1\tdog\tdog\tNN\t_\t_\t_\t_\t_\t_\n", "line 2: 'NN' is no universal part of speech of 'dog'"),
        ("# nothing\n\n", "holds no sentence"),
        (b"\xff\xfe", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_damaged_files(tmp_path, content, message):
    path = tmp_path / "x.conllu"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        read_conllu(path)


def test_the_data_set(folder):
    source = load_data("ud_english_ewt", folder)
    assert (len(source.train), len(source.dev), len(source.test)) == (40, 5, 10)
    assert source.classes == UPOS
    assert source.train.tags[0].tolist() == [UPOS.index(WORDS[w]) for w in PATTERNS[0].split()]
    assert source.model_arguments == {"num_tags": 17}
    assert "40 / 5 / 10" in source.split
    assert len(source.batches(4, 4, 3, 0, "cpu")[1].data) == 3
    with pytest.raises(DataError, match="give the folder"):
        load_data("ud_english_ewt")


def test_batches_are_functions_of_seed_and_epoch():
    lengths = [1 + i % 7 for i in range(43)]
    data = TaggedSet(
        tuple(torch.full((n, 3), 1 + i, dtype=torch.uint8) for i, n in enumerate(lengths)),
        tuple(torch.full((n,), i) for i, n in enumerate(lengths)),
    )
    batches = SentenceBatches(data, 4, shuffle=True, seed=3)
    epoch = list(batches.epoch(2))
    assert len(epoch) == len(batches) == 10
    seen = [int(row[0]) for _, tags in epoch for row in tags]
    assert len(set(seen)) == 40
    for words, tags in epoch:
        assert ((words[..., 0] == 0) == (tags < 0)).all()
        assert (words[..., 0].long() - 1 == tags)[tags >= 0].all()
    # About equally long: far less padding than in random batches.
    assert sum(int((tags < 0).sum()) for _, tags in epoch) < 0.15 * sum(lengths)
    assert all(a[1].equal(b[1]) for a, b in zip(epoch[6:], batches.epoch(2, start=6), strict=True))
    parts = [list(batches.epoch(2, rank=r, world=2)) for r in range(2)]
    assert sorted(int(row[0]) for part in parts for _, tags in part for row in tags) == sorted(seen)
    assert [int(row[0]) for _, tags in batches.epoch(3) for row in tags] != seen
    assert [len(tags) for _, tags in SentenceBatches(data, 4)] == [4] * 10 + [3]
    with pytest.raises(ValueError, match="do not fill one batch"):
        SentenceBatches(data, 44, shuffle=True)
    with pytest.raises(ValueError, match="at least 1"):
        SentenceBatches(data, 0)


def test_from_files_to_a_checkpoint(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("RESTPOINT_HOME", str(tmp_path / "home"))
    sizes = {"vocabulary": 8, "word_dim": 8, "byte_dim": 8, "filters": 4, "hidden": 12, "layers": 1, "dropout": 0.1}
    config = Config(
        name="bilstm_crf_small.trial",
        model=ModelConfig("bilstm_crf_small", sizes),
        data=DataConfig("ud_english_ewt", batch_size=4, eval_batch_size=4),
        optimizer=OptimizerConfig(lr=0.02),
        task=SequenceTagging(),
        epochs=6,
        ema=0.9,
        threads=1,
        data_dir=str(folder),
        output=str(tmp_path / "home" / "checkpoints"),
    )
    metrics = train(config, "restpoint-train")
    assert metrics["accuracy"] == 1
    assert metrics["sentences"] == 1
    assert metrics["nll"] < 0.2
    model = create_model("bilstm_crf_small.trial", pretrained=True)
    assert model.vocabulary.fitted
    card = model.blueprint.card
    assert card.labels == UPOS
    again = evaluate_model(model, folder)
    assert again["accuracy"] == metrics["accuracy"]
    assert again["nll"] == pytest.approx(metrics["nll"])
    ((words, tags, _),) = model.tag(["A dog sees the cat!"])
    assert [card.labels[t] for t in tags] == [WORDS[w.lower()] for w in words]
