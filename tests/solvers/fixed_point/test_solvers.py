"""Every fixed-point method on every problem, and what all of them have in common."""

import copy
import pickle

import pytest
import torch

from restpoint.solvers import (
    Anderson,
    Broyden,
    Newton,
    Picard,
    Solution,
    SolverError,
    Status,
    UnrollAdjoint,
    fixed_point,
    root,
)
from restpoint.solvers.solution import MaxStepsWarning, NonFiniteWarning
from tests.solvers.problems import CASES, SOLVERS, name

D = torch.float64


def solve(case, solver=None, **options):
    problem = root if case.root else fixed_point
    return problem(lambda z, x: case.f(z, x, case.parameter), case.z0, (case.x,), solver=solver, **options)


@pytest.mark.parametrize("case", CASES, ids=name)
@pytest.mark.parametrize("solver", SOLVERS, ids=name)
class TestMatrix:
    def test_value_in_float64(self, case, solver):
        with torch.no_grad():
            solution = solve(case, solver, rtol=1e-11, max_steps=600)
        torch.testing.assert_close(solution.value, case.reference(), rtol=1e-9, atol=1e-9)
        assert solution.converged.all()
        assert (solution.stats.status == Status.CONVERGED).all()
        assert (solution.stats.residual <= 1e-11).all()
        assert (solution.stats.steps < solution.stats.evaluations).all()

    def test_value_in_float32(self, case, solver):
        with torch.no_grad():
            solution = solve(case.to(torch.float32), solver, rtol=1e-5, max_steps=600)
        assert solution.value.dtype == torch.float32
        assert solution.converged.all()
        # A residual of 1e-5 at a spectral radius of .9 leaves an error ten times as large.
        torch.testing.assert_close(solution.value.double(), case.reference(), rtol=3e-4, atol=3e-4)


@pytest.mark.parametrize("solver", SOLVERS, ids=name)
class TestEveryMethod:
    def test_first_step_is_picard_and_takes_one_evaluation(self, solver):
        """One step is an ordinary case, not a return of z0."""
        case = CASES[0]
        with torch.no_grad():
            solution = solve(case, solver, max_steps=1, rtol=1e-12)
            image = case.f(case.z0, case.x, case.parameter)
        assert (solution.stats.status == Status.MAX_STEPS).all()
        assert (solution.stats.steps == 1).all()
        if not isinstance(solver, Newton):
            damping = getattr(solver, "damping", 1.0)
            torch.testing.assert_close(solution.value, damping * image, rtol=1e-14, atol=1e-14)
            assert (solution.stats.evaluations == 1).all()

    @pytest.mark.parametrize("case", CASES[:2], ids=name)
    def test_two_steps_are_nearer_than_one(self, case, solver):
        reference = case.reference()
        with torch.no_grad():
            errors = [(solve(case, solver, max_steps=k, rtol=1e-12).value - reference).norm() for k in (1, 2)]
        assert errors[1] < errors[0] or errors[1] < 1e-13
        assert errors[0] < reference.norm()

    def test_trajectory_is_what_was_done(self, solver):
        case = CASES[0]
        with torch.no_grad():
            solution = solve(case, solver, rtol=1e-9, max_steps=200, trajectory=True)
        path = solution.trajectory
        assert path.shape == (int(solution.stats.steps.max()) + 1, *case.x.shape)
        torch.testing.assert_close(path[0], case.z0)
        for row, steps in enumerate(solution.stats.steps.tolist()):
            # A row that has converged rests where it is.
            assert (path[steps:, row] == solution.value[row]).all()

    def test_a_start_at_the_answer_costs_one_evaluation(self, solver):
        case = CASES[1]
        reference = case.reference()
        solution = fixed_point(
            lambda z, x: case.f(z, x, case.parameter), reference, (case.x,), solver=solver, rtol=1e-10
        )
        assert (solution.stats.evaluations == 1).all()
        assert (solution.stats.steps == 0).all()
        torch.testing.assert_close(solution.value, reference, rtol=0, atol=0)

    def test_a_warm_start_takes_fewer_evaluations(self, solver):
        """Also where the problem has changed a little, as between steps of training."""
        case = CASES[0]
        moved = case.parameter + 1e-6 * torch.randn_like(case.parameter)
        with torch.no_grad():
            cold = solve(case, solver, rtol=1e-9, max_steps=200)
            again = fixed_point(
                lambda z, x: case.f(z, x, case.parameter), cold, (case.x,), solver=solver, rtol=1e-9, max_steps=200
            )
            near = fixed_point(
                lambda z, x: case.f(z, x, moved), cold, (case.x,), solver=solver, rtol=1e-9, max_steps=200
            )
            value = fixed_point(
                lambda z, x: case.f(z, x, moved), cold.value, (case.x,), solver=solver, rtol=1e-9, max_steps=200
            )
        assert (again.stats.evaluations == 1).all()
        assert near.converged.all()
        assert (near.stats.evaluations < cold.stats.evaluations).all()
        # What a solver remembers beside the value does not make it worse.
        assert near.stats.evaluations.sum() <= value.stats.evaluations.sum() + len(case.x)

    def test_options_survive_copies_and_pickling(self, solver):
        assert copy.deepcopy(solver) == solver
        assert pickle.loads(pickle.dumps(solver)) == solver  # noqa: S301

    def test_runs_exactly_max_steps_without_a_tolerance(self, solver):
        case = CASES[0]
        calls = []

        def f(z, x):
            calls.append(len(z))
            return case.f(z, x, case.parameter)

        with torch.no_grad():
            solution = fixed_point(f, case.z0, (case.x,), solver=solver, rtol=0.0, max_steps=7)
        assert (solution.stats.steps == 7).all()
        if not isinstance(solver, Newton):
            assert calls == [4] * 7

    def test_nothing_is_remembered_between_calls(self, solver):
        case = CASES[0]
        with torch.no_grad():
            first, second = (solve(case, solver, rtol=1e-8, max_steps=100) for _ in range(2))
        assert torch.equal(first.value, second.value)
        assert torch.equal(first.stats.evaluations, second.stats.evaluations)


class TestThrow:
    f = staticmethod(lambda z, x: torch.tanh(0.9 * z + x))
    x = torch.linspace(0.1, 1, 3, dtype=D).unsqueeze(1)

    def test_an_exception_names_the_worst_sample_and_what_to_change(self):
        with pytest.raises(SolverError, match=r"fixed_point: 3 of 3 samples did not converge") as error:
            fixed_point(self.f, torch.zeros_like(self.x), (self.x,), solver=Picard(), max_steps=2, throw=True)
        message = str(error.value)
        assert "sample 0" in message
        assert "max_steps" in message
        assert "2 steps" in message
        assert isinstance(error.value.solution, Solution)
        assert error.value.solution.value.shape == (3, 1)

    def test_a_warning_has_the_category_of_the_status(self):
        with pytest.warns(MaxStepsWarning, match="did not converge"):
            fixed_point(self.f, torch.zeros_like(self.x), (self.x,), max_steps=1, throw="warn")
        x = self.x * torch.nan
        with pytest.warns(NonFiniteWarning, match="sample 0, met a NaN"):
            fixed_point(self.f, torch.zeros_like(x), (x,), throw="warn")

    def test_nothing_is_raised_where_all_is_well_or_nobody_asked(self):
        assert fixed_point(self.f, torch.zeros_like(self.x), (self.x,), throw=True).converged.all()
        assert not fixed_point(self.f, torch.zeros_like(self.x), (self.x,), max_steps=1).converged.any()

    def test_root_calls_itself_root(self):
        with pytest.raises(SolverError, match=r"root: 1 of 1"):
            root(lambda x: x**2 + 1, torch.ones(1, 1, dtype=D), max_steps=5, throw=True)


class TestStatuses:
    def test_a_map_without_a_rest_point_ends_in_order(self):
        solution = fixed_point(lambda z: z + 1, torch.zeros(2, 1, dtype=D), solver=Picard(), max_steps=20)
        assert (solution.stats.status == Status.MAX_STEPS).all()
        assert (solution.stats.residual > 0).all()

    def test_an_exploding_map_is_non_finite_and_returns_something_finite(self):
        solution = fixed_point(lambda z: 1e30 * z + 1, torch.zeros(2, 1), solver=Picard(), max_steps=20)
        assert (solution.stats.status == Status.NON_FINITE).all()
        assert torch.isfinite(solution.value).all()

    def test_a_map_that_goes_round_stagnates(self):
        solution = fixed_point(lambda z: -z, torch.ones(2, 1, dtype=D), solver=Picard(), max_steps=500)
        assert (solution.stats.status == Status.STAGNATED).all()
        assert (solution.stats.evaluations < 100).all()

    def test_a_non_contractive_map_with_a_rest_point_is_solved_by_the_accelerated_methods(self):
        f = lambda z, x: -3 * z + x  # noqa: E731
        x = torch.ones(2, 1, dtype=D)
        for solver in (Anderson(), Broyden(), Newton()):
            solution = fixed_point(f, torch.zeros_like(x), (x,), solver=solver, rtol=1e-9)
            assert solution.converged.all()
            torch.testing.assert_close(solution.value, x / 4)
        assert not fixed_point(f, torch.zeros_like(x), (x,), solver=Picard()).converged.any()

    def test_what_ran_out_of_steps_has_its_best_iterate(self):
        """The residual grows on the way: the iterate with the smallest one comes back, not the last."""
        f = lambda z: 1.5 * z + torch.where(z > 100, 1e6, 1.0)  # noqa: E731
        solution = fixed_point(f, torch.zeros(1, 1, dtype=D), solver=Picard(), max_steps=30)
        assert solution.value.item() == 0.0

    def test_steps_and_evaluations_of_newton_are_told_apart(self):
        solution = root(lambda x: x**2 - 2, torch.ones(1, 5, dtype=D), rtol=1e-12)
        assert solution.stats.steps.item() == 5
        assert solution.stats.evaluations.item() == 6 + 5 * 5

    def test_report_says_that_all_is_well(self):
        solution = fixed_point(lambda z: 0.5 * z + 1, torch.zeros(3, 1, dtype=D))
        assert solution.report() == "all 3 samples converged"


class TestLineSearch:
    """A step that leaves the domain of the function is halved, as one that makes the residual grow."""

    x0 = torch.tensor([[10.0], [2.0], [100.0], [-1.0]], dtype=D)
    c = torch.tensor([[1.0], [1.0], [0.5], [1.0]], dtype=D)

    @staticmethod
    def residual(x, c):
        return torch.log(x) - c

    @pytest.mark.parametrize("solver", [Newton(), Broyden()], ids=name)
    def test_comes_back_from_a_nan(self, solver):
        solution = root(self.residual, self.x0, (self.c,), solver=solver, rtol=1e-10, max_steps=100)
        # The last sample starts outside, from where there is no way back.
        assert solution.stats.status.tolist() == 3 * [Status.CONVERGED] + [Status.NON_FINITE]
        torch.testing.assert_close(solution.value[:3], self.c[:3].exp())
        for row in range(3):
            alone = root(
                self.residual, self.x0[row, None], (self.c[row, None],), solver=solver, rtol=1e-10, max_steps=100
            )
            assert alone.stats.steps[0] == solution.stats.steps[row]
            torch.testing.assert_close(alone.value[0], solution.value[row], rtol=1e-12, atol=0)

    @pytest.mark.parametrize("solver", [Newton(line_search=False), Broyden(line_search=False)], ids=name)
    def test_may_be_switched_off(self, solver):
        solution = root(self.residual, self.x0, (self.c,), solver=solver, rtol=1e-10, max_steps=100)
        assert solution.stats.status[0] == Status.NON_FINITE

    def test_gives_up_in_the_end(self):
        """Only the starting point itself is in the domain."""
        x0 = torch.zeros(1, 1, dtype=D)
        for solver in (Newton(), Broyden()):
            solution = root(lambda x: torch.where(x == 0, x + 1, torch.nan), x0, solver=solver, max_steps=100)
            assert solution.stats.status.item() == Status.NON_FINITE
            assert solution.value.item() == 0
            assert solution.stats.steps.item() < 12


class TestInitialValue:
    def test_is_neither_changed_nor_returned(self):
        z0 = torch.zeros(2, 3, dtype=D)
        for adjoint in (None, UnrollAdjoint()):
            for steps in (1, 50):
                solution = fixed_point(lambda z: 0.5 * z + 1, z0, max_steps=steps, adjoint=adjoint)
                solution.value.add_(1)
                assert (z0 == 0).all()

    def test_may_be_the_answer_and_still_is_not_returned_itself(self):
        z0 = torch.ones(2, 3, dtype=D)
        value = fixed_point(lambda z: z, z0).value
        value.add_(1)
        assert (z0 == 1).all()

    def test_may_be_made_in_inference_mode(self):
        with torch.inference_mode():
            z0 = torch.zeros(2, 3)
        assert fixed_point(lambda z: 0.5 * z + 1, z0).converged.all()

    def test_that_is_not_finite_breaks_its_own_row_only(self):
        z0 = torch.tensor([[0.0], [torch.inf], [torch.nan]], dtype=D)
        solution = fixed_point(lambda z: 0.5 * z + 1, z0)
        assert solution.stats.status.tolist() == [Status.CONVERGED, Status.NON_FINITE, Status.NON_FINITE]


@pytest.mark.parametrize("solver", [Anderson(), Newton(), Broyden()], ids=name)
def test_inference_mode_computes_what_no_grad_does(solver):
    case = CASES[0]
    with torch.no_grad():
        plain = solve(case, solver, rtol=1e-10)
    with torch.inference_mode():
        # An argument that is made inside, too.
        inside = fixed_point(
            lambda z, x: case.f(z, x, case.parameter), case.z0, (case.x * 1,), solver=solver, rtol=1e-10
        )
    assert torch.equal(plain.value, inside.value)
    assert torch.equal(plain.stats.steps, inside.stats.steps)
