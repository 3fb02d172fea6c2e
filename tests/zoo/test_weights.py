"""Weights: found, verified at every load, and refused by name where they do not fit."""

import pickle

import pytest
import safetensors.torch
import torch
from torch import nn

from restpoint.zoo import CheckpointError
from restpoint.zoo.files import write_atomically
from restpoint.zoo.weights import find_weights, load_state, pack_weights, read_weights


@pytest.fixture
def packed(tmp_path):
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    content, weights = pack_weights(model, "w.safetensors")
    (tmp_path / "w.safetensors").write_bytes(content)
    return model, tmp_path / "w.safetensors", weights


def test_a_state_dict_survives_the_way_through_its_file(packed):
    model, path, weights = packed
    state = read_weights(path, weights)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert weights.size == path.stat().st_size


def test_every_single_byte_is_verified(packed):
    _, path, weights = packed
    content = path.read_bytes()
    for position in range(0, len(content), 7):
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        with pytest.raises(CheckpointError, match=r"corrupt.*Delete .* again"):
            read_weights(path, weights)


def test_a_longer_file_is_corrupt_too(packed):
    _, path, weights = packed
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(CheckpointError, match="corrupt"):
        read_weights(path, weights)


@pytest.mark.parametrize("kept", [0, 1, 8, 100, -1])
def test_a_truncated_file_says_so(packed, kept):
    _, path, weights = packed
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=rf"truncated: {path.stat().st_size} bytes of {weights.size}"):
        read_weights(path, weights)
    with pytest.raises(CheckpointError, match="not a whole .safetensors file"):
        read_weights(path)


def test_a_missing_file_names_every_place_that_was_searched(packed, tmp_path):
    _, path, weights = packed
    assert find_weights(weights, [tmp_path / "nowhere", tmp_path]) == path
    path.unlink()
    with pytest.raises(CheckpointError, match=r"w\.safetensors.*nowhere.*RESTPOINT_HOME"):
        find_weights(weights, [tmp_path / "nowhere", tmp_path])
    with pytest.raises(CheckpointError, match="No such file"):
        read_weights(path)


def test_a_pickle_is_never_opened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    for name in ("w.pt", "w.pth", "w.bin", "w.safetensors"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(CheckpointError, match=r"\.safetensors"):
            read_weights(tmp_path / name)


def test_what_does_not_fit_is_named_with_its_shapes_and_nothing_is_copied():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = {
        "0.weight": torch.ones(2, 4),
        "0.bias": torch.ones(2),
        "1.weight": torch.ones(2, 2),
        "2.bias": torch.ones(1),
    }
    with pytest.raises(CheckpointError) as caught:
        load_state(model, state, "The weights of x")
    for part in (
        "The weights of x does not fit Sequential",
        "0.weight (2, 4), in the model (2, 3)",
        "1.bias",
        "2.bias",
    ):
        assert part in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_wholly_different_architecture_gives_a_readable_error():
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(50)])
    with pytest.raises(CheckpointError, match="100 missing: .*and 92 more") as caught:
        load_state(model, {"x": torch.ones(1)}, "x")
    assert len(str(caught.value)) < 600


def test_tied_weights_and_views_can_be_saved(tmp_path):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    model.register_buffer("view", torch.arange(6.0).reshape(2, 3).T)
    content, _ = pack_weights(model, "w.safetensors")
    state = safetensors.torch.load(content)
    load_state(model, state, "tied")
    assert torch.equal(state["view"], model.view)
    assert torch.equal(state["0.weight"], state["1.weight"])


def test_a_state_that_is_no_tensor_is_refused():
    class Odd(nn.Linear):
        def get_extra_state(self):
            return {"steps": 3}

        def set_extra_state(self, state):
            pass

    with pytest.raises(CheckpointError, match="_extra_state"):
        pack_weights(Odd(2, 2), "w.safetensors")


def test_a_write_that_fails_leaves_the_old_content_and_no_litter(tmp_path):
    write_atomically(tmp_path / "deep" / "file", b"old")
    with pytest.raises(TypeError):
        write_atomically(tmp_path / "deep" / "file", "no bytes")
    assert [(p.name, p.read_bytes()) for p in (tmp_path / "deep").iterdir()] == [("file", b"old")]
