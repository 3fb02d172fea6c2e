"""Sparse products with learnt entries, and graphs."""

import pytest
import torch

from restpoint.models.graph import Graph, Pattern


def pattern():
    return Pattern.of(torch.tensor([2, 0, 0, 1, 2, 0]), torch.tensor([1, 3, 0, 2, 0, 3]), (4, 5))


def dense(pattern, values):
    return torch.zeros(pattern.shape, dtype=values.dtype).index_put((pattern.row, pattern.column), values)


def test_entries_are_sorted_and_counted_once():
    found = pattern()
    assert len(found) == 5
    assert found.row.tolist() == [0, 0, 1, 2, 2]
    assert found.column.tolist() == [0, 3, 2, 0, 1]
    assert found.starts.tolist() == [0, 2, 3, 5, 5]
    back, order = found.transposed
    values = torch.arange(5.0)
    torch.testing.assert_close(dense(back, values[order]), dense(found, values).T)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")
def test_products_equal_dense_ones_to_every_order():
    found, generator = pattern(), torch.Generator().manual_seed(0)
    values = torch.randn(5, generator=generator, dtype=torch.float64, requires_grad=True)
    x = torch.randn(5, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(found.matmul(values, x), dense(found, values) @ x)
    assert torch.autograd.gradcheck(found.matmul, (values, x), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(found.matmul, (values, x))


def test_softmax_adds_up_to_one_along_rows():
    found, generator = pattern(), torch.Generator().manual_seed(0)
    scores = 100 * torch.randn(5, 2, generator=generator, dtype=torch.float64)
    shares = found.softmax(scores)
    expected = torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(found.sum_rows(shares), expected)
    torch.testing.assert_close(shares[:2], scores[:2].softmax(0))
    scores = (scores / 100).requires_grad_()
    assert torch.autograd.gradcheck(found.softmax, (scores,))


@pytest.mark.parametrize(
    ("row", "column", "said"),
    [
        ([0, 4], [0, 1], "row: entry 1 is 4; there are 4, 0 to 3"),
        ([0, -1], [0, 1], "row: entry 1 is -1"),
        ([0], [9], "column: entry 0 is 9"),
        ([0.5], [1], "expected one list of integers"),
        ([0, 1], [1], "equally long; got 2 and 1"),
    ],
)
def test_broken_patterns_say_where(row, column, said):
    with pytest.raises(ValueError, match=said):
        Pattern.of(torch.tensor(row), torch.tensor(column), (4, 5))


def test_broken_operands_say_what_was_expected():
    with pytest.raises(ValueError, match="expected 5 values"):
        pattern().matmul(torch.ones(4), torch.ones(5, 2))
    with pytest.raises(ValueError, match="expected a matrix of 5 rows"):
        pattern().matmul(torch.ones(5), torch.ones(4, 2))


def test_weights_and_their_perron_eigenvalue(graph):
    matrix = dense(graph.looped, graph.weights)
    torch.testing.assert_close(matrix, matrix.T)
    assert (matrix.diagonal() > 0).all()
    assert abs(graph.perron - float(torch.linalg.eigvalsh(matrix)[-1])) < 1e-9
    torch.testing.assert_close(graph.read(torch.eye(8, dtype=torch.float64)), dense(graph.entries, graph.values))


def test_the_bound_holds_where_edges_go_one_way():
    generator = torch.Generator().manual_seed(0)
    for nodes in (3, 7, 20):
        edges = torch.randint(nodes, (2, 2 * nodes), generator=generator)
        graph = Graph.of(edges, torch.ones(nodes, 1, dtype=torch.float64))
        largest = float(torch.linalg.eigvals(dense(graph.looped, graph.weights)).abs().max())
        assert largest <= graph.perron + 1e-12


@pytest.mark.parametrize(
    ("edges", "features", "said"),
    [
        (torch.zeros(3, 4, dtype=torch.int64), torch.ones(5, 2), "must have two rows"),
        (torch.tensor([[0], [5]]), torch.ones(5, 2), "entry 0 is 5"),
        (torch.tensor([[0], [1]]), torch.ones(5), "must be a matrix"),
    ],
)
def test_broken_graphs_say_what_is_wrong(edges, features, said):
    with pytest.raises(ValueError, match=said):
        Graph.of(edges, features)
