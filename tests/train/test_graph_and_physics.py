"""Citation networks and simulated mechanics: their loaders, and a run of each from recipe to card."""

import dataclasses

import numpy as np
import pytest
import torch

from restpoint.models.physics import UnstructuredODE
from restpoint.train.config import Config, DataConfig, ModelConfig, OptimizerConfig
from restpoint.train.data import DATASETS, DataError, load_data
from restpoint.train.data.physics import HORIZONS, SEEN, Pendulum, TwoBodies
from restpoint.train.evaluate import evaluate_model
from restpoint.train.loop import train
from restpoint.train.picture import draw_picture, to_png
from restpoint.train.split import split_batches
from restpoint.train.tasks import NodeClassification, TrajectoryRegression
from restpoint.zoo import Card, create_model


def write_graph(folder, **changes):
    """A graph of 14 nodes and 8 words, in two parts of 7, whose labels are 0 to 6 twice."""
    generator = np.random.default_rng(0)
    pairs = np.array([(i, j) for i in range(14) for j in range(14) if i != j and i % 7 == j % 7])
    words = [np.sort(generator.choice(8, size=3, replace=False)) for _ in range(14)]
    content = {
        "x_indptr": np.arange(0, 45, 3, dtype=np.int32), "x_indices": np.concatenate(words).astype(np.int32),
        "x_data": np.ones(42, dtype=np.float32), "x_shape": np.array([14, 8]), "edge_index": pairs.T.astype(np.int32),
        "y": (np.arange(14) % 7).astype(np.int8), "train": np.arange(7), "val": np.arange(7, 10),
        "test": np.arange(10, 14),
    }  # fmt: skip
    np.savez(folder / "planetoid-cora.npz", **{**content, **changes})


@pytest.fixture
def folder(tmp_path):
    write_graph(tmp_path)
    return tmp_path


def test_a_graph_is_read_and_split(folder):
    source = load_data("cora", folder)
    assert source.model_arguments == {"num_classes": 7, "features": 8}
    assert (len(source.graph), len(source.graph.edges), len(source.graph.looped)) == (14, 14, 28)
    dense = source.graph.read(torch.eye(8))
    torch.testing.assert_close(dense.sum(1), torch.ones(14))
    training, measured = source.batches(1, 1, 2, 0, "cpu")
    graph, labels, mask = next(iter(training))
    assert mask.nonzero().flatten().tolist() == list(range(7))
    assert next(iter(measured))[2].nonzero().flatten().tolist() == [7, 8]
    assert next(iter(source.test_batches(1)))[2].nonzero().flatten().tolist() == [10, 11, 12, 13]
    assert training.rows(0) == len(labels) == len(graph)
    with pytest.raises(DataError, match="the split has 3 nodes for validation; 4 wanted"):
        source.batches(1, 1, 4, 0, "cpu")
    with pytest.raises(DataError, match="cannot be shared by 2 processes"):
        next(training.epoch(0, 0, 1, 2))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"edge_index": np.array([[0, 3], [1, 14]], dtype=np.int32)}, "is broken: row: entry 1 is 14"),
        ({"edge_index": np.zeros((3, 2), dtype=np.int32)}, "another layout|is broken|do not fit"),
        ({"x_indices": np.full(42, 8, dtype=np.int32)}, "is broken: column: entry 0 is 8"),
        ({"x_indices": np.zeros(42, dtype=np.int32)}, "is there twice"),
        ({"x_indptr": np.arange(0, 42, 3, dtype=np.int32)}, "do not fit each other"),
        ({"x_data": np.full(42, np.nan, dtype=np.float32)}, "not finite"),
        ({"y": np.full(14, 9, dtype=np.int8)}, "labels 9 to 9"),
        ({"y": np.full(14, -1, dtype=np.int8)}, "labels -1"),
        ({"val": np.array([0, 1])}, "overlap"),
        ({"test": np.array([99])}, "nodes that do not exist"),
    ],
)
def test_broken_graph_files_say_what_is_wrong(tmp_path, changes, said):
    write_graph(tmp_path, **changes)
    with pytest.raises(DataError, match=said):
        load_data("cora", tmp_path)


def test_missing_and_damaged_graph_files(tmp_path):
    with pytest.raises(DataError, match="give the folder that holds planetoid-cora.npz"):
        load_data("cora")
    with pytest.raises(DataError, match="is missing, damaged"):
        load_data("cora", tmp_path)
    write_graph(tmp_path)
    path = tmp_path / "planetoid-cora.npz"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(DataError, match="is missing, damaged"):
        load_data("cora", tmp_path)
    write_graph(tmp_path)
    with np.load(path) as held:
        fewer = {key: held[key] for key in held.files if key != "y"}
    np.savez(path, **fewer)
    with pytest.raises(DataError, match="'y'"):
        load_data("cora", tmp_path)


@pytest.mark.parametrize("system", [Pendulum(), TwoBodies()], ids=["pendulum", "two bodies"])
def test_fields_are_hamiltons_equations_of_the_energies(system):
    state = system.draw(5, torch.Generator().manual_seed(0)).requires_grad_()
    (gradient,) = torch.autograd.grad(system.energy(state).sum(), state)
    of_q, of_p = gradient.split(system.degrees, dim=1)
    torch.testing.assert_close(system.field(torch.zeros(()), state.detach()), torch.cat([of_p, -of_q], dim=1))
    long = system.simulate(state.detach(), torch.linspace(0, 30, 11, dtype=torch.float64))
    energy = system.energy(long)
    torch.testing.assert_close(energy, energy[:, :1].expand(-1, 11), rtol=1e-7, atol=1e-7)


def test_pieces_of_trajectories_are_a_function_of_seed_and_epoch():
    source = load_data("pendulum")
    training, measured = source.batches(4, 10, 3, 0, "cpu")
    seen, times, states = next(training.epoch(1, 2))
    again = next(training.epoch(1, 2))
    assert torch.equal(states, again[2])
    assert not torch.equal(states, next(training.epoch(2, 2))[2])
    assert states.shape == (4, 16, 2)
    assert torch.equal(seen, states[:, :SEEN])
    assert len(times) == 16
    assert times[1] == pytest.approx(3 / 44)
    halves = [next(training.epoch(1, 2, rank, 2))[2] for rank in range(2)]
    assert torch.equal(torch.cat(halves), states)
    long = next(iter(measured))[2]
    assert long.shape == (3, 44 * HORIZONS + 1, 2)
    with pytest.raises(DataError, match="26 trajectories to choose by wanted; there are 25"):
        source.batches(4, 10, 26, 0, "cpu")


def test_a_recipe_may_ask_for_longer_pieces_of_trajectories():
    source, lengths = load_data("pendulum"), []
    for length in (None, 45):
        config = Config(data=DataConfig(name="pendulum", batch_size=2, length=length))
        training, measured = split_batches(config, source)
        lengths.append(next(iter(training))[2].shape[1])
        assert next(iter(measured))[2].shape[1] == HORIZONS * 44 + 1
    assert lengths == [source.piece, 45]


def test_the_truth_has_no_error():
    source = load_data("pendulum")
    batches = source.test_batches(2, 2)
    truth = torch.nn.Module()
    truth.forward = lambda seen, times: next(iter(batches))[2]
    found = TrajectoryRegression().evaluate(truth, batches)
    assert found.keys() == {"energy_drift", "energy_mse", "trajectory_mse", "trajectory_mse_long"}
    assert max(found.values()) < 1e-6


def test_where_momenta_are_not_seen_they_are_not_learnt():
    states = torch.randn(2, 6, 2)
    model = UnstructuredODE(hidden=(4,))
    model.forward = lambda seen, times: states + torch.tensor([0.0, 1.0])
    batch = (states[:, :SEEN], tuple(range(6)), states)
    assert float(TrajectoryRegression().losses(model, batch, 0).loss) == pytest.approx(0.5)
    model.sees_momenta = False
    assert float(TrajectoryRegression().losses(model, batch, 0).loss) == 0


def run(tmp_path, name, data, task, data_dir=None, **arguments):
    config = Config(
        name=f"{name}.{data}", model=ModelConfig(name, arguments), data=DataConfig(data, batch_size=8),
        optimizer=OptimizerConfig(lr=0.01), task=task, epochs=1, threads=1, output=str(tmp_path / "run"),
        data_dir=None if data_dir is None else str(data_dir),
    )  # fmt: skip
    metrics = train(config)
    card = Card.load(tmp_path / "run" / f"{config.name}.json")
    model = create_model(name, checkpoint_path=tmp_path / "run" / card.weights.file, **card.arguments)
    again = evaluate_model(model, data_dir, data=data, task=task.kind)
    assert again == pytest.approx(metrics)
    png = to_png(draw_picture(task, model, load_data(data, data_dir)))
    assert png[1:4] == b"PNG"
    return metrics


@pytest.mark.parametrize("name", ["test_ignn", "test_grand"])
def test_a_run_on_nodes(folder, tmp_path, name):
    write_graph(folder, test=np.arange(7, 14), val=np.arange(0))
    metrics = run(tmp_path, name, "cora", NodeClassification(), folder)
    assert 0 <= metrics["accuracy"] <= 1


def test_a_run_on_trajectories(tmp_path, monkeypatch):
    short = dataclasses.replace(load_data("pendulum"), name="short", observations=6, piece=5, counts=(4, 2, 2), steps=2)
    monkeypatch.setitem(DATASETS, "short", lambda data_dir: short)
    metrics = run(tmp_path, "test_hamiltonian", "short", TrajectoryRegression())
    assert metrics["energy_drift"] > 0
