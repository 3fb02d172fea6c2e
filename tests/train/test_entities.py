"""Names from files to a checkpoint, and how finding them is scored."""

import pytest
import torch

from restpoint.models.tagging import bilstm_crf_entities, encode_words
from restpoint.models.tagging.entities import bio_moves, spans
from restpoint.train import evaluate_model, train
from restpoint.train.config import Config, DataConfig, ModelConfig, OptimizerConfig
from restpoint.train.data import DataError, load_data
from restpoint.train.data.wnut17 import KINDS, read_columns
from restpoint.train.tasks import EntityRecognition
from restpoint.zoo import create_model
from restpoint.zoo.cli import main

PATTERNS = [
    "Anne/B-person Lee/I-person saw/O Rome/B-location",
    "in/O Rome/B-location ./O",
    "Anne/B-person saw/O it/O",
]
SMALL = {"vocabulary": 8, "word_dim": 8, "byte_dim": 8, "filters": 4, "hidden": 12, "dropout": 0.1, "word_dropout": 0.1}


def columns(sentences):
    return "\n\t\n".join("\n".join(e.replace("/", "\t") for e in s.split()) for s in sentences) + "\n"


@pytest.fixture
def folder(tmp_path):
    for part, count in (("train", 12), ("dev", 1), ("test", 2)):
        (tmp_path / f"wnut17-{part}.conll").write_text(columns(PATTERNS * count))
    return tmp_path


@pytest.mark.parametrize(
    "tags, expected",
    [
        ([], []),
        ([0, 0], []),
        ([1, 2, 0, 3], [(0, 2, 0), (3, 4, 1)]),
        ([1, 1, 2], [(0, 1, 0), (1, 3, 0)]),
        # As the shared tasks read what is not well-formed: a name begins where another kind goes on, or none.
        ([2, 2, 4, 0, 4], [(0, 2, 0), (2, 3, 1), (4, 5, 1)]),
        ([1, 4, 4], [(0, 1, 0), (1, 3, 1)]),
    ],
)
def test_spans(tags, expected):
    assert spans(tags) == expected


def test_the_data_set(folder):
    source = load_data("wnut17", folder)
    assert (len(source.train), len(source.dev), len(source.test)) == (36, 3, 6)
    assert source.classes[:3] == ("O", "B-corporation", "I-corporation")
    assert len(source.classes) == 1 + 2 * len(KINDS)
    code = {tag: i for i, tag in enumerate(source.classes)}
    assert source.test.tags[0].tolist() == [code["B-person"], code["I-person"], 0, code["B-location"]]
    with pytest.raises(DataError, match="wnut17: give the folder"):
        load_data("wnut17")
    # What goes on with what did not begin, begins.
    (folder / "wnut17-dev.conll").write_text(columns(["a/O Lee/I-person b/I-location"]))
    assert load_data("wnut17", folder).dev.tags[0].tolist() == [0, code["B-person"], code["B-location"]]


@pytest.mark.parametrize(
    "content, message",
    [
        ("dog\tO\ncat\n", "line 2: expected a word, a tab and O, B-KIND or I-KIND; got 'cat'"),
        ("dog\tX-person\n", "line 1"),
        ("\tO\n\tO\nx", "line 1"),
        ("\n\n", "holds no sentence"),
        (None, "cannot be read"),
    ],
)
def test_damaged_files(tmp_path, content, message):
    path = tmp_path / "x.conll"
    if content is not None:
        path.write_text(content if not content.startswith("\tO") else content.replace("\tO", " \t O", 1)[1:])
    with pytest.raises(DataError, match=message):
        read_columns(path)


def test_names_of_another_kind(folder):
    (folder / "wnut17-test.conll").write_text("dog\tB-animal\n")
    with pytest.raises(DataError, match="'dog' is tagged 'B-animal'; the kinds of names are corporation, "):
        load_data("wnut17", folder)


def test_only_well_formed_tags_have_a_probability():
    torch.manual_seed(0)
    model = bilstm_crf_entities(**SMALL, num_tags=5).eval()
    words = encode_words([["a", "b", "c"], ["d"]])
    for path in model.distribution(words).sample(200).flatten(0, 1).tolist():
        before = 0
        for tag in (t for t in path if t >= 0):
            assert tag % 2 or tag == 0 or before in (tag, tag - 1)
            before = tag
    likelihoods = model.log_likelihood(words, torch.tensor([[1, 2, 0], [2, -1, -1]]))
    assert likelihoods.isfinite().tolist() == [True, False]
    likelihoods[0].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    every = [[0], *[[t] for t in range(1, 5)]]
    total = model.log_likelihood(words[1:, :1].expand(5, -1, -1), torch.tensor(every)).exp().sum()
    torch.testing.assert_close(total, torch.ones(()))
    with pytest.raises(ValueError, match="odd number of tags"):
        bio_moves(4)


def test_a_name_counts_where_all_of_it_is_right():
    class Fixed(torch.nn.Module):
        def decode(self, words):
            return torch.tensor([[1, 2, 0, 3], [1, 0, 0, -1]])

        def log_likelihood(self, words, tags):
            return torch.tensor([-3.0, -4.0])

    tags = torch.tensor([[1, 2, 0, 1], [1, 2, 0, -1]])
    found = EntityRecognition().evaluate(Fixed(), [(torch.ones(2, 4, 3, dtype=torch.uint8), tags)])
    assert found == pytest.approx({"f1": 1 / 3, "precision": 1 / 3, "recall": 1 / 3, "accuracy": 5 / 7, "nll": 1.0})


def test_from_files_to_names(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RESTPOINT_HOME", str(tmp_path / "home"))
    config = Config(
        name="bilstm_crf_entities.trial",
        model=ModelConfig("bilstm_crf_entities", SMALL),
        data=DataConfig("wnut17", batch_size=4, eval_batch_size=4),
        optimizer=OptimizerConfig(lr=0.03),
        task=EntityRecognition(),
        epochs=6,
        ema=0.9,
        threads=1,
        data_dir=str(folder),
        output=str(tmp_path / "home" / "checkpoints"),
    )
    metrics = train(config, "restpoint-train")
    assert (metrics["f1"], metrics["accuracy"]) == (1, 1)
    model = create_model("bilstm_crf_entities.trial", pretrained=True)
    assert evaluate_model(model, folder)["nll"] == pytest.approx(metrics["nll"], rel=1e-4)
    assert main(["predict", "bilstm_crf_entities.trial", "Anne saw Rome"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [line[:2] for line in lines] == [["Anne", "B-person"], ["saw", "O"], ["Rome", "B-location"]]
    # Another model starts from this one's encoder, and has a head of its own.
    torch.manual_seed(1)
    other, words = bilstm_crf_entities(**SMALL).eval(), encode_words([["Anne", "saw", "Rome"]])
    EntityRecognition(encoder="bilstm_crf_entities.trial").prepare(other, load_data("wnut17", folder))
    assert torch.equal(other.encode(words), model.eval().encode(words))
    assert not torch.equal(other.emissions.weight, model.emissions.weight)
    with pytest.raises(ValueError, match="Linear has no start_from"):
        EntityRecognition(encoder="bilstm_crf_entities.trial").prepare(torch.nn.Linear(1, 1), None)
