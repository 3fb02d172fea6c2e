"""Linear operators: what they are made of and what they become."""

import pytest
import torch

from restpoint.solvers.linear import LU, LinearOperator


def parts(batch=3, n=5):
    matrix, v = torch.randn(batch, n, n).double(), torch.randn(batch, n).double()
    kind = {"batch": batch, "size": n, "dtype": torch.float64, "device": "cpu"}
    return matrix, v, kind


def times(matrix, v):
    return (matrix @ v.unsqueeze(2)).squeeze(2)


def test_from_matrix():
    matrix, v, _ = parts()
    operator = LinearOperator.from_matrix(matrix)
    torch.testing.assert_close(operator.matvec(v), times(matrix, v))
    torch.testing.assert_close(operator.rmatvec(v), times(matrix.mT, v))
    torch.testing.assert_close(operator.T.matvec(v), times(matrix.mT, v))
    assert operator.dense() is matrix
    assert torch.equal(operator.T.dense(), matrix.mT)
    assert torch.equal(operator.T.T.dense(), matrix)
    assert operator.assembled


def test_from_one_matrix_for_all():
    matrix, v, _ = parts()
    operator = LinearOperator.from_matrix(matrix[0], 3)
    torch.testing.assert_close(operator.matvec(v), times(matrix[0], v))
    assert operator.dense().shape == (3, 5, 5)
    with pytest.raises(ValueError, match=r"shared by all samples: say by how many \(batch=...\)"):
        LinearOperator.from_matrix(matrix[0])
    with pytest.raises(ValueError, match="holds a batch of 3, expected 4"):
        LinearOperator.from_matrix(matrix, 4)
    with pytest.raises(ValueError, match=r"\(batch, n, n\) or \(n, n\); got \(1, 3, 5, 5\)"):
        LinearOperator.from_matrix(matrix.unsqueeze(0))


def test_dense_uses_whichever_map_is_there_or_preferred():
    matrix, _, kind = parts()
    calls = []

    def matvec(v):
        calls.append("matvec")
        return times(matrix, v)

    def rmatvec(v):
        calls.append("rmatvec")
        return times(matrix.mT, v)

    for operator, expected in [
        (LinearOperator(matvec, **kind), "matvec"),
        (LinearOperator(None, rmatvec, **kind), "rmatvec"),
        (LinearOperator(matvec, rmatvec, **kind), "rmatvec"),
        (LinearOperator(matvec, rmatvec, assemble_with="matvec", **kind), "matvec"),
    ]:
        for one, dense in ((operator, matrix), (operator.T, matrix.mT), (operator.T.T, matrix)):
            calls.clear()
            torch.testing.assert_close(one.dense(), dense)
            # The same one of the two, however often the operator was transposed.
            assert calls == [expected] * 5


def test_a_missing_map_says_so():
    matrix, v, kind = parts()
    operator = LinearOperator(lambda v: times(matrix, v), **kind)
    with pytest.raises(NotImplementedError, match="no rmatvec: pass rmatvec="):
        operator.rmatvec(v)
    with pytest.raises(NotImplementedError, match="no matvec"):
        operator.T.matvec(v)
    assert (operator.forward, operator.backward, operator.assembled) == (True, False, False)
    # A direct solver needs no more than the map that is there.
    torch.testing.assert_close(LU().solve(operator.T, v).value, torch.linalg.solve(matrix.mT, v))
    assert LU().solve(operator.T, v).stats.evaluations.tolist() == [5, 5, 5]
    assert LU().solve(LinearOperator.from_matrix(matrix), v).stats.evaluations.tolist() == [0, 0, 0]


def test_bad_arguments():
    matrix, _, kind = parts()
    with pytest.raises(ValueError, match="needs matvec, rmatvec or both"):
        LinearOperator(None, **kind)
    with pytest.raises(ValueError, match="batch and size must be at least 1; got batch=0"):
        LinearOperator(lambda v: v, **{**kind, "batch": 0})
    with pytest.raises(ValueError, match="real floating-point; got torch.int64"):
        LinearOperator(lambda v: v, **{**kind, "dtype": torch.int64})
    with pytest.raises(ValueError, match=r"dense must have shape \(3, 5, 5\); got \(2, 5, 5\)"):
        LinearOperator(lambda v: v, dense=matrix[:2], **kind)
    with pytest.raises(ValueError, match="assemble_with must be 'matvec' or 'rmatvec'; got 'jvp'"):
        LinearOperator(lambda v: v, assemble_with="jvp", **kind)


def test_repr():
    _, _, kind = parts()
    text = repr(LinearOperator(lambda v: v, **kind))
    assert text == "LinearOperator(matvec, batch=3, size=5, dtype=torch.float64, device='cpu')"
