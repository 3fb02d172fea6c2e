"""Networks: reading GraphML, paths, demands, and capacities that are learnt from what arrives."""

import itertools

import pytest
import torch

from restpoint import create_model
from restpoint.train.data import DataError, load_data
from restpoint.train.data.traffic import read_graphml, shortest_paths
from restpoint.train.tasks import TrafficFlow

# Abilene's cables, and one that is doubled.
CABLES = ((0, 1), (0, 2), (1, 10), (2, 9), (3, 4), (3, 6), (4, 5), (4, 6), (5, 8), (6, 7), (7, 8), (7, 10), (8, 9),
          (9, 10), (0, 1))  # fmt: skip


def write(folder, cables=CABLES, nodes=12):
    path = folder / "graphml" / "Abilene.graphml"
    path.parent.mkdir(exist_ok=True)
    parts = [f'<node id="{n}"><data key="d33">city {n}</data></node>' for n in range(nodes)]
    parts += [f'<edge source="{a}" target="{b}"/>' for a, b in cables]
    path.write_text(
        '<graphml xmlns="http://graphml.graphdrawing.org/xmlns">'
        '<key attr.name="label" attr.type="string" for="node" id="d33"/>'
        f'<graph edgedefault="undirected">{"".join(parts)}</graph></graphml>'
    )
    return path


def test_reads_the_largest_connected_part(tmp_path):
    nodes, edges = read_graphml(write(tmp_path))
    assert nodes == tuple(f"city {n}" for n in range(11))
    assert set(edges) == {pair for a, b in CABLES for pair in ((a, b), (b, a))}
    for text, message in (("<graphml", "cannot be read"), ("<graphml/>", "holds no graph")):
        (tmp_path / "x.graphml").write_text(text)
        with pytest.raises(DataError, match=message):
            read_graphml(tmp_path / "x.graphml")
    with pytest.raises(DataError, match="holds no link"):
        read_graphml(write(tmp_path, cables=()))


def test_shortest_paths_against_all_paths(tmp_path):
    _, edges = read_graphml(write(tmp_path))
    joined = set(edges)

    def every(path, target):
        if path[-1] == target:
            yield path
            return
        for node in set(range(11)) - set(path):
            if (path[-1], node) in joined:
                yield from every((*path, node), target)

    for source, target in itertools.islice(itertools.permutations(range(11), 2), 0, 110, 17):
        paths = sorted(every((source,), target), key=len)
        found = shortest_paths(11, edges, source, target, 4)
        assert [len(p) for p in found] == [len(p) for p in paths[:4]]
        assert set(found) <= set(paths)
        assert len(set(found)) == len(found)


def test_learns_capacities_from_what_arrives(tmp_path):
    write(tmp_path)
    source = load_data("traffic_abilene", tmp_path)
    assert source.model_arguments["pairs"] == 40
    model, task = create_model("traffic", **source.model_arguments), TrafficFlow()
    task.prepare(model, source)
    before = task.evaluate(model, source.test_batches(8, 8))
    optimiser = torch.optim.Adam(model.parameters(), lr=0.1)
    batches, _ = source.batches(8, 8, 0, 0, "cpu")
    for batch in itertools.islice(batches.epoch(), 30):
        optimiser.zero_grad()
        task.losses(model, batch, 0).loss.backward()
        optimiser.step()
    after = task.evaluate(model, source.test_batches(8, 8))
    assert after["explained"] > 0.8 > before["explained"]
    assert after["capacity_median"] < 0.2 < before["capacity_median"]
    with pytest.raises(ValueError, match="routing: expected shape"):
        model.fit(torch.zeros(2, 2), torch.zeros(2, 2))
    with torch.no_grad():
        assert len(task.draw(model, source).axes) == 2
    with pytest.raises(DataError, match="there is no"):
        load_data("traffic_abilene", tmp_path / "other")
    with pytest.raises(DataError, match="data_dir"):
        load_data("traffic_abilene")
