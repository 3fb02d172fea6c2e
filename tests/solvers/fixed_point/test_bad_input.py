"""Bad input: every message says what is wrong and where."""

import math
import warnings

import jaxtyping
import numpy as np
import pytest
import torch

from restpoint.solvers import (
    Anderson,
    Broyden,
    CheckpointAdjoint,
    ImplicitAdjoint,
    MaxStepsWarning,
    Newton,
    NonFiniteWarning,
    PhantomAdjoint,
    Picard,
    ReversibleAdjoint,
    StateError,
    Status,
    fixed_point,
    root,
)
from restpoint.solvers.diagnose import compare_adjoints

Z = torch.zeros(3, 2)


@pytest.fixture(autouse=True)
def _as_outside_of_tests(monkeypatch):
    """Types are not checked by beartype, which would see some of this first."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


class TestInitialValue:
    @pytest.mark.parametrize(
        ("z0", "message"),
        [
            (torch.zeros(0, 2), r"z0: the batch is empty \(shape \(0, 2\)\)"),
            (torch.zeros(3, 2, dtype=torch.int64), r"z0: expected a floating-point dtype, got torch.int64"),
            (torch.zeros(3, 2, dtype=torch.bool), r"z0: expected a floating-point dtype, got torch.bool"),
            (torch.tensor(1.0), r"z0: expected a leading batch dimension, got a tensor of shape \(\)"),
            (torch.zeros(3, 0), r"z0: a sample of the initial value holds no numbers"),
            ((), r"z0: expected a tensor or a structure of tensors, got \(\)"),
            ((Z, torch.zeros(4, 2)), r"z0\[1\]: expected a batch of 3 as in the first tensor, got 4"),
            ({"a": Z, "b": torch.zeros(3, dtype=torch.int32)}, r"z0\['b'\]: .*int32"),
            ((Z, 1.0), r"z0\[1\]: expected a tensor, got float"),
            ((Z, Z.to("meta")), r"z0\[1\]: expected device cpu, got meta"),
        ],
    )
    def test_that_does_not_fit(self, z0, message):
        with pytest.raises(StateError, match=message):
            fixed_point(lambda z: z, z0)

    def test_root_calls_it_x0(self):
        with pytest.raises(StateError, match="x0: expected a floating-point dtype"):
            root(lambda x: x, torch.zeros(2, dtype=torch.int64))

    def test_that_is_not_finite_has_a_status(self):
        z0 = Z.clone()
        z0[1, 0] = torch.nan
        solution = fixed_point(lambda z: 0.5 * z + 1, z0)
        assert solution.stats.status.tolist() == [Status.CONVERGED, Status.NON_FINITE, Status.CONVERGED]


class TestFunction:
    """What it returns is held against the initial value."""

    @pytest.mark.parametrize(
        ("f", "message"),
        [
            (lambda z: z[:, :1], r"f\(z\): expected shape \(batch, 2\), got \(3, 1\)"),
            (lambda z: z.sum(), r"f\(z\): expected shape \(batch, 2\), got \(\)"),
            (lambda z: z[:2], r"f\(z\): expected a batch of 3 as in the initial value, got 2"),
            (lambda z: z.double(), r"f\(z\): expected dtype torch.float32 as in the initial value, got torch.float64"),
            (lambda z: z.to("meta"), r"f\(z\): expected device cpu, got meta"),
            (lambda z: (z, z), r"structure of the initial value, a tensor, got \(tensor, tensor\)"),
            (lambda z: None, r"f\(z\): expected a tensor, got NoneType"),
            (lambda z: 1.0, r"f\(z\): expected a tensor, got float"),
            (lambda z: z.mul_(0.5), r"f\(z\): the function changed the state that it was given, in place"),
        ],
    )
    @pytest.mark.parametrize("solver", [Picard(), Anderson(), Broyden(), Newton()], ids=lambda s: type(s).__name__)
    def test_that_changes_what_it_is_given(self, f, message, solver):
        z0 = torch.ones_like(Z)
        with torch.no_grad(), pytest.raises(StateError, match=message):
            fixed_point(f, z0, solver=solver)
        assert (z0 == 1).all(), "the initial value was overwritten"

    def test_a_leaf_of_the_wrong_shape_is_named(self):
        with pytest.raises(StateError, match=r"f\(z\)\['b'\]: expected shape \(batch, 4\), got \(3, 5\)"):
            fixed_point(lambda z: {"a": z["a"], "b": torch.zeros(3, 5)}, {"a": Z, "b": torch.zeros(3, 4)})

    def test_root_calls_it_residual(self):
        with pytest.raises(StateError, match=r"residual\(x\): expected shape"):
            root(lambda x: x[:, :1], Z)

    def test_a_batch_of_one_is_not_broadcast(self):
        """z0 of one row and inputs of four would run, with the residual of four rows in one."""
        x = torch.rand(4, 2)
        with pytest.raises(StateError, match="expected a batch of 1 as in the initial value, got 4"):
            fixed_point(lambda z, x: 0.5 * z + x, torch.zeros(1, 2), (x,))

    def test_a_parameter_of_a_wider_type(self):
        w = torch.eye(2, dtype=torch.float64)
        with pytest.raises(StateError, match=r"f\(z\): expected dtype torch.float32 .* got torch.float64"):
            fixed_point(lambda z, x: 0.5 * z + x @ w, Z, (torch.zeros(3, 2, dtype=torch.float64),))

    def test_an_error_of_its_own_comes_through(self):
        with pytest.raises(ZeroDivisionError):
            fixed_point(lambda z: z / (1 // 0), Z)


class TestOptions:
    @pytest.mark.parametrize("which", ["rtol", "atol"])
    @pytest.mark.parametrize("value", [-1e-3, float("nan"), float("inf"), "1e-3", None])
    def test_tolerances(self, which, value):
        with pytest.raises(ValueError, match=f"{which} must be a finite number that is not negative; got"):
            fixed_point(lambda z: z, Z, **{which: value})

    @pytest.mark.parametrize("value", [0, -1, 2.5, True, "10"])
    def test_max_steps(self, value):
        with pytest.raises(ValueError, match="max_steps must be an integer of at least 1; got"):
            fixed_point(lambda z: z, Z, max_steps=value)

    def test_throw(self):
        with pytest.raises(ValueError, match="throw must be True, False or 'warn'; got 'raise'"):
            fixed_point(lambda z: z, Z, throw="raise")

    def test_a_warning_is_of_the_worst_sample_and_points_at_the_line_of_the_caller(self):
        x = torch.tensor([[0.9, 1.0], [0.8, 1.0], [torch.nan, 1.0]])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fixed_point(lambda z, x: x[:, :1] * z + 1, Z, (x,), throw="warn", max_steps=2, rtol=1e-9)
            fixed_point(lambda z, x: x[:, :1] * z + 1, Z[:2], (x[:2],), throw="warn", max_steps=2, rtol=1e-9)
        assert [each.category for each in caught] == [NonFiniteWarning, MaxStepsWarning]
        assert [each.filename for each in caught] == [__file__] * 2

    def test_args_that_are_no_tuple(self):
        with pytest.raises(TypeError, match="args must be a tuple of what follows the state; got Tensor"):
            fixed_point(lambda z, x: z, Z, Z)

    @pytest.mark.parametrize("solver", ["anderson", "andersn", Anderson, 5])
    def test_solver(self, solver):
        with pytest.raises(TypeError, match="solver must be") as error:
            fixed_point(lambda z: z, Z, solver=solver)
        assert "Anderson()" in str(error.value)
        if isinstance(solver, str):
            assert "Did you mean 'Anderson'?" in str(error.value)

        else:
            assert "TwoState" not in str(error.value)

    @pytest.mark.parametrize("adjoint", ["implicit", ImplicitAdjoint, CheckpointAdjoint, ReversibleAdjoint, 5])
    def test_adjoint(self, adjoint):
        with pytest.raises(TypeError, match="adjoint must be") as error:
            fixed_point(lambda z: z, Z, adjoint=adjoint)
        if isinstance(adjoint, type):
            assert f"write adjoint={adjoint.__name__}()" in str(error.value)
        else:
            for choice in ("ImplicitAdjoint()", "CheckpointAdjoint()", "ReversibleAdjoint()"):
                assert choice in str(error.value)
            assert "Steps" not in str(error.value)

    def test_function(self):
        with pytest.raises(TypeError, match="f must be a function of the state and args; got 3"):
            fixed_point(3, Z)
        with pytest.raises(TypeError, match="residual must be a function"):
            root(None, Z)

    def test_adjoints_to_compare(self):
        with pytest.raises(TypeError, match="adjoints must be a dictionary.*got list"):
            compare_adjoints(lambda z, x: 0.5 * z + x, Z, (Z,), adjoints=[ImplicitAdjoint()])
        with pytest.raises(TypeError, match=r"adjoints\['a'\] must be one of .*CheckpointAdjoint\(\)"):
            compare_adjoints(lambda z, x: 0.5 * z + x, Z, (Z,), adjoints={"a": "implicit"})

    @pytest.mark.parametrize("number", [np.float32, np.float64])
    @pytest.mark.parametrize("integer", [np.int64, np.int32])
    def test_numbers_of_numpy_are_numbers(self, number, integer):
        solution = fixed_point(
            lambda z: 0.5 * z + 1, Z, solver=Anderson(memory=integer(3), damping=number(0.5)), rtol=number(0.0),
            atol=number(0.0), max_steps=integer(5),
        )  # fmt: skip
        assert (solution.stats.steps == 5).all()

    def test_a_solver_that_an_adjoint_cannot_take(self):
        with pytest.raises(ValueError, match=r"ReversibleAdjoint brings its own iteration.*got Anderson"):
            fixed_point(lambda z: z, Z, solver=Anderson(), adjoint=ReversibleAdjoint())
        with pytest.raises(ValueError, match=r"ReversibleAdjoint brings its own iteration.*got Picard\(damping=1.0\)"):
            fixed_point(lambda z: z, Z, solver=Picard(), adjoint=ReversibleAdjoint())
        w = torch.ones(2, requires_grad=True)
        with pytest.raises(ValueError, match=r"reuse='start'.*Broyden\(\)"):
            fixed_point(lambda z: 0.5 * z + w, Z, solver=Anderson(), adjoint=ImplicitAdjoint(reuse="start"))

    @pytest.mark.parametrize("problem", [fixed_point, root])
    @pytest.mark.parametrize(
        "adjoint", [ReversibleAdjoint(), ImplicitAdjoint(reuse="start")], ids=["reversible", "reuse"]
    )
    def test_no_solver_is_what_the_adjoint_needs(self, problem, adjoint):
        w = torch.ones(2, requires_grad=True)
        value = problem(lambda z: 0.5 * z + (-w if problem is root else w), Z, adjoint=adjoint).value
        value.sum().backward()
        assert w.grad.abs().sum() > 0

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: Picard(damping=0.0), r"Picard: damping must be in \(0, 2\]; got 0.0"),
            (lambda: Picard(damping=2.5), "Picard: damping"),
            (lambda: Anderson(memory=0), "Anderson: memory must be an integer of at least 1; got 0"),
            (lambda: Anderson(memory=2.5), "Anderson: memory must be an integer.*got 2.5"),
            (lambda: Anderson(memory="5"), "Anderson: memory must be an integer.*got '5'"),
            (lambda: Anderson(regularization=math.nan), "Anderson: regularization must be finite"),
            (lambda: Broyden(memory=2.5), "Broyden: memory must be an integer.*got 2.5"),
            (lambda: Broyden(growth=math.nan), "Broyden: growth must be at least 1; got nan"),
            (lambda: PhantomAdjoint(steps=2.5), "PhantomAdjoint: steps must be an integer.*got 2.5"),
            (lambda: CheckpointAdjoint(segments=1.5), "CheckpointAdjoint: segments must be an integer.*got 1.5"),
            (lambda: Picard(damping="1"), "Picard: damping must be.*got '1'"),
            (lambda: Anderson(kind="III"), "Anderson: kind must be 'I' or 'II'; got 'III'"),
            (lambda: Anderson(damping=0.0), "Anderson: damping"),
            (lambda: Anderson(regularization=-1.0), "Anderson: regularization must be finite and not negative"),
            (lambda: Anderson(restart=1.0), "Anderson: restart must be above 1"),
            (lambda: Broyden(memory=0), "Broyden: memory must be an integer of at least 1; got 0"),
            (lambda: Broyden(growth=0.5), "Broyden: growth must be at least 1"),
            (lambda: ImplicitAdjoint(order=3), "ImplicitAdjoint: order must be 1 or 2; got 3"),
            (lambda: ImplicitAdjoint(reuse="all"), "ImplicitAdjoint: reuse must be .*; got 'all'"),
            (lambda: PhantomAdjoint(steps=0), "PhantomAdjoint: steps must be an integer of at least 1; got 0"),
            (lambda: PhantomAdjoint(damping=1.5), "PhantomAdjoint: damping"),
            (
                lambda: CheckpointAdjoint(segments=0),
                "CheckpointAdjoint: segments must be an integer of at least 1; got 0",
            ),
            (lambda: ReversibleAdjoint(drift=0.0), "ReversibleAdjoint: drift must be positive; got 0.0"),
        ],
    )
    def test_out_of_range(self, make, message):
        with pytest.raises(ValueError, match=message):
            make()

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: Anderson(memry=3), r"Anderson has no option 'memry'. Did you mean 'memory'\? Its options: memory"),
            (lambda: Picard(damp=0.5), r"Picard has no option 'damp'. Did you mean 'damping'\?"),
            (lambda: Broyden(linesearch=True), r"Did you mean 'line_search'\?"),
            (lambda: Newton(solver=None), r"Newton has no option 'solver'"),
            (lambda: ImplicitAdjoint(linear_sovler=None), r"Did you mean 'linear_solver'\?"),
            (lambda: PhantomAdjoint(step=1), r"Did you mean 'steps'\?"),
            (lambda: Newton(linear_solver="lu"), r"linear_solver must be one of .*LU\(\).*got 'lu'"),
            (lambda: ImplicitAdjoint("gmres"), r"linear_solver must be one of .*got 'gmres'. Did you mean 'GMRES'\?"),
        ],
    )
    def test_unknown(self, make, message):
        with pytest.raises(TypeError, match=message):
            make()

    def test_an_unknown_option_of_the_call_is_refused(self):
        with pytest.raises(TypeError, match=r"fixed_point has no argument 'f_sovler'. Did you mean 'solver'"):
            fixed_point(lambda z: z, Z, f_sovler=Anderson())

    def test_solvers_cannot_be_changed(self):
        with pytest.raises(AttributeError):
            Anderson().memory = 3
