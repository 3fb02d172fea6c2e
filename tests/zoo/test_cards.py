"""Cards: what is written is what is read, and nothing else is read."""

import dataclasses
import json

import pytest

from restpoint.solvers import GMRES, Anderson, ConstantController, ImplicitAdjoint, Picard, PIDController
from restpoint.zoo import Card, CardError, Data, ImageInput, Published, Weights

SHA = "0123456789abcdef" * 4
CARD = Card(
    name="trial_tiny.ones",
    architecture="trial_tiny",
    arguments={
        "width": 4,
        "scale": 0.5,
        "norm": None,
        "flag": True,
        "channels": (24, 48),
        "inner": {"a": (1, 2)},
        "solver": Anderson(memory=3),
        "adjoint": ImplicitAdjoint(order=2),
    },
    task="image-classification",
    weights=Weights("trial_tiny.ones.safetensors", SHA, 1234),
    parameters=55,
    torch="2.15.0",
    data=Data("digits", "last third", "CC BY 4.0", "Alpaydin and Kaynak 1998"),
    input=ImageInput((1, 8, 8), (0.5,), (0.25,)),
    labels=("zero", "one"),
    metrics={"accuracy": 0.99, "evaluations": 8.0},
    published=(Published("accuracy", 0.98, "a paper, table 1"),),
    seed=0,
    command="restpoint-train --config deq.yaml",
    epochs=3,
    note="A tenth of the published epochs.",
    picture="trial_tiny.ones.png",
)


def test_a_card_survives_the_way_through_its_file(tmp_path):
    CARD.save(tmp_path / "card.json")
    assert Card.load(tmp_path / "card.json") == CARD


def test_the_fewest_fields_suffice():
    required = {f.name for f in dataclasses.fields(Card) if f.default is f.default_factory is dataclasses.MISSING}
    card = Card.from_dict({key: value for key, value in CARD.to_dict().items() if key in required})
    assert card.data is None
    assert card.metrics == {}


def changed(path, value):
    """CARD as JSON's types, with the value at the dotted `path` replaced, or removed where it is `...`."""
    plain = json.loads(CARD.to_json())
    *parents, last = path.split(".")
    place = plain
    for key in parents:
        place = place[key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return plain


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("metricks", {}, "unknown key metricks. Did you mean 'metrics'"),
        ("weights.sha265", SHA, "unknown key weights.sha265. Did you mean 'sha256'"),
        ("parameters", ..., "the key parameters is missing"),
        ("weights.size", ..., "the key weights.size is missing"),
        ("parameters", "many", "parameters must be of type int"),
        ("parameters", True, "parameters must be of type int"),
        ("seed", 0.5, "seed must be of type int"),
        ("weights", [], "weights must be an object"),
        ("labels", "ab", "labels must be a list"),
        ("input.shape", [1, 8], "input.shape must have 3 entries; got 2"),
        ("input.shape", [1, 8, 0], "input.shape must be positive"),
        ("input.mean", [0.5, 0.5], "input.mean must have one number for each of 1"),
        ("input.std", [0.0], "input.std must be positive"),
        ("metrics.accuracy", "high", "metrics.accuracy must be of type float"),
        ("published", [{"metric": "loss", "value": 1.0, "source": "x"}], "'loss' is not among the metrics"),
        ("name", "other.ones", "name must be 'trial_tiny', a dot and a tag"),
        ("name", "trial_tiny", "name must be 'trial_tiny', a dot and a tag"),
        ("name", "trial_tiny.../up", "name must be"),
        ("weights.size", 0, "weights.size must be a positive"),
        ("weights.sha256", "abc", "64 lower-case hexadecimal digits"),
        ("weights.sha256", SHA.upper(), "64 lower-case hexadecimal digits"),
        ("weights.file", "weights.pt", "ends in .safetensors"),
        ("weights.file", "../x.safetensors", "bare file name"),
        ("weights.file", "/etc/x.safetensors", "bare file name"),
        ("weights.file", "a\\x.safetensors", "bare file name"),
        ("weights.file", ".safetensors", "bare file name"),
        ("picture", "../x.png", "bare file name that ends in .png"),
        ("picture", "x.svg", "bare file name that ends in .png"),
        ("epochs", 1.5, "epochs must be of type int"),
        ("weights.source", "http://example.org/x.safetensors", "by https only"),
        ("weights.source", "ftp://localhost/x.safetensors", "by https only"),
        ("weights.source", "file:///etc/x.safetensors", "by https only"),
        ("weights.source", "https:/x.safetensors", "by https only"),
        ("weights.source", "hf:owner", "hf:OWNER/NAME@REVISION"),
        ("weights.source", "hf:owner/../name", "hf:OWNER/NAME@REVISION"),
        ("arguments.solver.$class", "Andersen", "exports no option class 'Andersen'"),
        ("arguments.solver.$class", "fixed_point", "exports no option class"),
        ("arguments.solver.$class", "__loader__", "exports no option class"),
        ("arguments.solver.$class", 3, "exports no option class"),
        ("arguments.solver.memry", 3, "arguments.solver: Anderson has no option 'memry'. Did you mean 'memory'"),
    ],
)
def test_what_is_not_valid_is_refused_by_name(tmp_path, path, value, message):
    (tmp_path / "card.json").write_text(json.dumps(changed(path, value)))
    with pytest.raises(CardError) as caught:
        Card.load(tmp_path / "card.json")
    assert message in str(caught.value)
    assert str(tmp_path / "card.json") in str(caught.value)


@pytest.mark.parametrize(("content", "message"), [(b"{", "not valid JSON"), (b"\xff\xfe", "JSON"), (b"[]", "object")])
def test_a_file_that_is_no_card_is_named(tmp_path, content, message):
    (tmp_path / "card.json").write_bytes(content)
    with pytest.raises(CardError, match=message):
        Card.load(tmp_path / "card.json")
    with pytest.raises(CardError, match=r"No card at .*absent\.json"):
        Card.load(tmp_path / "absent.json")


@pytest.mark.parametrize(
    "value", [object(), float("nan"), len, {1: 2}, {"$class": "Picard"}, [float("inf")], {"inner": b"x"}]
)
def test_an_argument_that_json_cannot_hold_is_refused_before_anything_is_written(tmp_path, value):
    card = dataclasses.replace(CARD, arguments={"strange": value})
    with pytest.raises(CardError, match="the argument strange"):
        card.save(tmp_path / "card.json")
    assert not list(tmp_path.iterdir())


def test_bounds_that_are_infinite_by_default_are_left_out():
    arguments = {"bounded": ConstantController(dt=0.1, max_step=1.0), "free": PIDController(per_sample=True)}
    card = dataclasses.replace(CARD, arguments=arguments)
    assert Card.from_dict(json.loads(card.to_json())).arguments == arguments


def test_options_inside_options_come_back_as_they_were():
    arguments = {"solvers": (Picard(), {"backward": ImplicitAdjoint(linear_solver=GMRES(), order=2)})}
    card = dataclasses.replace(CARD, arguments=arguments)
    assert Card.from_dict(json.loads(card.to_json())).arguments == arguments


def test_a_failed_write_leaves_the_old_card(tmp_path):
    CARD.save(tmp_path / "card.json")
    before = (tmp_path / "card.json").read_bytes()
    with pytest.raises(CardError):
        dataclasses.replace(CARD, arguments={"strange": object()}).save(tmp_path / "card.json")
    assert (tmp_path / "card.json").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["card.json"]
