"""compare_adjoints: the order of the errors, the counts, and what happens where something fails."""

import functools

import pytest
import torch
from torch import nn

from restpoint.solvers import (
    LU,
    ImplicitAdjoint,
    JacobianFreeAdjoint,
    PhantomAdjoint,
    Picard,
    SolverError,
    UnrollAdjoint,
)
from restpoint.solvers.diagnose import compare_adjoints
from restpoint.solvers.linear import Neumann


class Cell(nn.Module):
    def __init__(self, n=10, radius=0.8):
        super().__init__()
        self.linear = nn.Linear(n, n)
        self.register_buffer("gain", torch.tensor(1.0))
        with torch.no_grad():
            self.linear.weight.copy_(radius * torch.linalg.qr(torch.randn(n, n))[0])

    def forward(self, z, x):
        return torch.tanh(self.gain * self.linear(z) + x)


@pytest.fixture(scope="module")
def compared():
    torch.manual_seed(0)
    cell = Cell()
    state = {name: tensor.clone() for name, tensor in cell.state_dict().items()}
    table = compare_adjoints(cell, torch.zeros(4, 10), (torch.randn(4, 10),), repeats=1, rtol=1e-6, max_steps=80)
    return cell, state, table


def test_the_order_of_the_errors(compared):
    errors = {row["adjoint"]: row["error"] for row in compared[2].rows}
    for exact in ("implicit (LU)", "implicit (GMRES)", "implicit (Neumann)", "unroll", "checkpoint"):
        assert errors[exact] < 1e-4
        assert 100 * errors[exact] < errors["phantom (5 steps)"]
    assert 2 * errors["phantom (5 steps)"] < errors["Jacobian-free"]
    assert errors["Jacobian-free"] < 1
    assert errors["SHINE"] < 1
    assert errors["unroll"] == pytest.approx(errors["checkpoint"], rel=1e-3)


def test_cosine_and_error_tell_the_same_story(compared):
    for row in compared[2].rows:
        # |g - g*|^2 >= |g*|^2 sin^2 of the angle between them.
        assert (1 - row["cosine"] ** 2) <= row["error"] ** 2 + 1e-9
        assert row["cosine"] > 0.5


def test_counts(compared):
    rows = {row["adjoint"]: row for row in compared[2].rows}
    assert rows["Jacobian-free"]["backward"] == 1
    assert rows["phantom (5 steps)"]["backward"] == 5
    assert rows["phantom (5 steps)"]["forward"] == rows["Jacobian-free"]["forward"] + 4
    # A derivative product through each evaluation but the last, which only measured; a checkpoint evaluates again.
    assert rows["unroll"]["backward"] in (rows["unroll"]["forward"], rows["unroll"]["forward"] - 1)
    assert rows["checkpoint"]["backward"] > 1.5 * rows["unroll"]["backward"]
    assert rows["reversible"]["memory"] < rows["unroll"]["memory"]
    assert all(row["seconds"] > 0 and row["memory"] > 0 for row in rows.values())


def test_the_function_is_as_it_was(compared):
    cell, state, _ = compared
    assert all(p.grad is None for p in cell.parameters())
    for name, tensor in cell.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, state[name])


def test_table_and_plot(compared, tmp_path):
    table = compared[2]
    lines = str(table).splitlines()
    assert lines[0].split() == [
        "adjoint", "error", "cosine", "memory", "forward", "backward", "seconds", "residual", "solver",
    ]  # fmt: skip
    assert [line.split("  ")[0].split(" [")[0] for line in lines[1 : len(table.rows) + 1]] == [
        row["adjoint"] for row in table.rows
    ]
    table.plot(tmp_path / "adjoints.png")
    assert (tmp_path / "adjoints.png").read_bytes().startswith(b"\x89PNG")


def test_a_float64_reference_can_be_met():
    x = torch.randn(3, 6, dtype=torch.float64)
    w = (0.5 * torch.randn(6, 6, dtype=torch.float64)).requires_grad_()
    table = compare_adjoints(
        lambda z, x: torch.tanh(z @ w.T / 2 + x),
        torch.zeros_like(x),
        (x,),
        adjoints={"implicit": ImplicitAdjoint(LU()), "unroll": UnrollAdjoint()},
        loss=lambda z: (z**3).sum(),
        rtol=1e-13,
        max_steps=200,
        repeats=1,
    )
    assert all(row["error"] < 1e-10 for row in table.rows)
    assert w.dtype == torch.float64


def test_the_solver_is_the_one_that_was_given():
    x = torch.randn(3, 4)
    chosen = {"implicit": ImplicitAdjoint(), "reuse": ImplicitAdjoint(reuse="start"), "one-step": JacobianFreeAdjoint()}
    table = compare_adjoints(
        lambda z, x: 0.5 * torch.cos(z) + x, torch.zeros(3, 4), (x,), adjoints=chosen, solver=Picard(), repeats=1
    )
    assert [row["solver"].partition("(")[0] for row in table.rows] == ["Picard", "Broyden", "Picard"]


def test_trees_and_what_f_names_are_turned_to_float64():
    helper = Cell(4, 0.5)
    frozen = torch.eye(4)

    def f(z, x, scale):
        return {"a": helper(z["b"], x) @ frozen, "b": 0.5 * z["a"] * scale}

    state = {"a": torch.zeros(2, 4), "b": torch.zeros(2, 4)}
    partial = functools.partial(f, scale=torch.tensor(0.9))
    table = compare_adjoints(
        partial, state, (torch.randn(2, 4),), adjoints={"implicit": ImplicitAdjoint()}, rtol=1e-6, repeats=1
    )
    assert table.rows[0]["error"] < 1e-5
    assert helper.linear.weight.dtype == frozen.dtype == torch.float32


def test_a_backward_solve_that_fails_is_a_note_and_not_a_number():
    # Nowhere near a contraction: Anderson finds the rest point, Neumann's series diverges.
    w = torch.tensor([[0.0, -3.0], [3.0, 0.0]])
    table = compare_adjoints(
        lambda z, x: z @ w.T + x,
        torch.zeros(2, 2),
        (torch.randn(2, 2),),
        adjoints={"series": ImplicitAdjoint(Neumann()), "direct": ImplicitAdjoint(LU())},
        repeats=1,
    )
    series, direct = table.rows
    assert series["error"] > 0.1
    assert "did not reach its tolerance" in series["note"]
    assert "[1] " in str(table)
    assert direct["error"] < 1e-5
    assert direct["note"] == ""


def test_without_a_rest_point_there_is_no_reference():
    with pytest.raises(SolverError, match="did not converge"):
        compare_adjoints(lambda z, x: z + 1 + x**2, torch.zeros(2, 2), (torch.ones(2, 2),), repeats=1)


def test_a_function_that_stays_in_float32_is_told_what_to_do():
    hidden = [torch.eye(3)]
    with pytest.raises(TypeError, match="cannot be evaluated in float64.*give f and args in float64"):
        compare_adjoints(lambda z, x: 0.1 * z @ hidden[0] + x, torch.zeros(2, 3), (torch.ones(2, 3),))
    with pytest.raises(TypeError, match="it returned float32"):
        compare_adjoints(lambda z, x: (0.1 * z + x).float(), torch.zeros(2, 3), (torch.ones(2, 3),))


def test_bad_input():
    with pytest.raises(ValueError, match="nothing that could be differentiated"):
        compare_adjoints(lambda z: z * 0.5, torch.ones(2, 3))
    with pytest.raises(ValueError, match="repeats must be at least 1; got 0"):
        compare_adjoints(torch.tanh, torch.ones(2, 3), repeats=0)


def test_phantom_gradients_close_in_with_their_steps():
    torch.manual_seed(1)
    cell = Cell(8, 0.6).double()
    x = torch.randn(4, 8, dtype=torch.float64)
    chosen = {str(k): PhantomAdjoint(steps=k, damping=1.0) for k in (1, 2, 4, 8, 16)}
    rows = compare_adjoints(cell, torch.zeros_like(x), (x,), adjoints=chosen, rtol=1e-10, repeats=1).rows
    errors = [row["error"] for row in rows]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-2 * errors[0]
