"""Samples stop one by one, and none touches another."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from restpoint.solvers import Anderson, Broyden, Newton, Picard, Status, fixed_point, root
from tests.solvers.problems import SOLVERS, name

D = torch.float64
N = 12
CORE = [
    Picard(),
    Picard(0.8),
    Anderson(),
    Anderson(kind="I"),
    Anderson(memory=2),
    Broyden(),
    Broyden(memory=2),
    Newton(),
]
G = torch.Generator().manual_seed(1)
W = torch.randn(N, N, generator=G, dtype=D)
W = W * (0.8 / torch.linalg.matrix_norm(W, 2))
X = torch.randn(6, N, generator=G, dtype=D)


def f(z, x):
    return torch.tanh(z @ W.to(z.dtype) + x)


def solve(x, solver, z0=None, function=f, **options):
    z0 = torch.zeros_like(x) if z0 is None else z0
    options = {"rtol": 1e-9, "max_steps": 200} | options
    with torch.no_grad():
        return fixed_point(function, z0, (x,), solver=solver, **options)


def with_one_hard_row(z, x):
    """A slow, nearly undamped rotation where x is large, for which no short memory is long enough."""
    turn = torch.ones(N, dtype=D)
    turn[0] = -1
    return torch.where(x[:, :1] > 50, 0.985 * z.roll(1, dims=1) * turn + 0.01 * x, f(z, x))


BAD = {
    "nan": lambda x: x.index_fill(0, torch.tensor([2]), torch.nan),
    "inf": lambda x: x.index_fill(0, torch.tensor([2]), torch.inf),
    "one nan": lambda x: x.index_put((torch.tensor([2]), torch.tensor([1])), torch.tensor(torch.nan, dtype=D)),
}
OTHERS = [0, 1, 3, 4, 5]


@pytest.mark.parametrize("solver", SOLVERS, ids=name)
class TestBadRow:
    @pytest.mark.parametrize("bad", BAD)
    def test_broken_input(self, solver, bad):
        alone, among = solve(X[OTHERS], solver), solve(BAD[bad](X), solver)
        if bad != "inf":  # of which tanh makes a one
            assert among.stats.status[2] == Status.NON_FINITE
        torch.testing.assert_close(among.value[OTHERS], alone.value, rtol=1e-12, atol=1e-12)
        assert torch.equal(among.stats.steps[OTHERS], alone.stats.steps)
        assert among.converged[OTHERS].all()
        assert torch.isfinite(among.value).all(), "a broken row keeps its best iterate"

    def test_broken_on_the_way(self, solver):
        """The row is fine at first; its best iterate comes back, not a NaN."""

        def later(z, x):
            out = f(z, x)
            return torch.where((x[:, :1] > 50) & (z[:, :1].abs() > 0.5), torch.nan, out)

        x = X.clone()
        x[2] = 100.0
        alone, among = solve(X[OTHERS], solver), solve(x, solver, function=later)
        assert among.stats.status[2] == Status.NON_FINITE
        torch.testing.assert_close(among.value[OTHERS], alone.value, rtol=1e-12, atol=1e-12)
        assert torch.equal(among.stats.steps[OTHERS], alone.stats.steps)
        assert torch.isfinite(among.value[2]).all()

    def test_exploding(self, solver):
        def mixed(z, x):
            return torch.where(x[:, :1] > 50, 10 * z * z.abs() + x, f(z, x))

        x = X.clone()
        x[2] = 100.0
        alone, among = solve(X[OTHERS], solver), solve(x, solver, function=mixed)
        torch.testing.assert_close(among.value[OTHERS], alone.value, rtol=1e-12, atol=1e-12)
        assert torch.equal(among.stats.steps[OTHERS], alone.stats.steps)

    def test_hard(self, solver):
        """A row that needs ten times as many steps lets the others end when they would."""

        x = X.clone()
        x[2] = 100.0
        alone, among = solve(X[OTHERS], solver), solve(x, solver, function=with_one_hard_row)
        torch.testing.assert_close(among.value[OTHERS], alone.value, rtol=1e-12, atol=1e-12)
        assert torch.equal(among.stats.steps[OTHERS], alone.stats.steps)
        assert among.stats.steps[2] > alone.stats.steps.max() or isinstance(solver, Newton)


class TestWhenRowsEnd:
    """At the same evaluation whatever the others do."""

    def test_stagnation(self):
        rate = torch.tensor([[-1.0], [0.8], [0.75], [0.1]], dtype=D)
        f = lambda z, rate: rate * z + 1  # noqa: E731
        options = {"solver": Picard(), "rtol": 1e-6, "max_steps": 300}
        together = fixed_point(f, torch.full_like(rate, 3.0), (rate,), **options)
        alone = fixed_point(f, torch.full((1, 1), 3.0, dtype=D), (rate[:1],), **options)
        assert together.stats.status.tolist() == [Status.STAGNATED] + 3 * [Status.CONVERGED]
        assert together.stats.steps[0] == alone.stats.steps[0]

    def test_an_infinite_residual(self):
        f = lambda x, k: torch.exp(k * x) - 2  # noqa: E731
        k = torch.tensor([[1.0], [1e5]], dtype=D)
        x0 = torch.ones(2, 1, dtype=D)
        together = root(f, x0, (k,), solver=Newton(line_search=False))
        alone = root(f, x0[1:], (k[1:],), solver=Newton(line_search=False))
        assert together.stats.status.tolist() == [Status.CONVERGED, Status.NON_FINITE]
        assert together.stats.steps[1] == alone.stats.steps[0] == 0


class TestCompaction:
    """Finished samples are taken out and cost nothing more."""

    @staticmethod
    def counting(function=f):
        rows = []

        def counted(z, *args):
            rows.append(len(z))
            return function(z, *args)

        return counted, rows

    @pytest.mark.parametrize("solver", [Picard(), Anderson(), Broyden()], ids=name)
    def test_one_hard_row_does_not_make_the_others_pay(self, solver):
        x = X.repeat(5, 1)
        x[7] = 100.0
        counted, rows = self.counting(with_one_hard_row)
        solution = solve(x, solver, function=counted, max_steps=300)
        spent, needed = sum(rows), int(solution.stats.evaluations.sum())
        assert rows[0] == 30
        assert rows[-1] == 1
        assert needed <= spent <= needed / 0.75 + 30
        assert spent < 0.6 * 30 * len(rows)

    @pytest.mark.parametrize("solver", CORE, ids=name)
    def test_changes_no_result(self, solver):
        x = X * torch.tensor([1e-3, 0.1, 1, 1, 3, 30], dtype=D).unsqueeze(1)
        compacted = solve(x, solver)
        # What is closed over, and a trajectory, keep the rows together.
        together = fixed_point(
            lambda z: f(z, x), torch.zeros_like(x), solver=solver, rtol=1e-9, max_steps=200, trajectory=True
        )
        torch.testing.assert_close(compacted.value, together.value, rtol=1e-11, atol=1e-12)
        assert torch.equal(compacted.stats.steps, together.stats.steps)
        assert torch.equal(compacted.stats.status, together.stats.status)

    def test_evaluations_are_those_that_a_row_took_part_in(self):
        x = X * torch.tensor([1e-3, 0.1, 1, 1, 3, 30], dtype=D).unsqueeze(1)
        seen = torch.zeros(6, dtype=torch.int64)

        def counted(z, x, row):
            seen.index_add_(0, row, torch.ones_like(row))
            return f(z, x)

        with torch.no_grad():
            solution = fixed_point(counted, torch.zeros_like(x), (x, torch.arange(6)), solver=Picard(), rtol=1e-9)
        # A finished row may still take part until enough others have finished, too.
        assert (seen >= solution.stats.evaluations).all()
        assert seen.sum() <= 1.34 * solution.stats.evaluations.sum()

    def test_a_closure_over_samples_is_noticed(self):
        """f gets x through args and another per-sample tensor by itself: nothing can be taken out."""
        x = X * torch.tensor([1e-3, 0.1, 1, 1, 3, 30], dtype=D).unsqueeze(1)
        b = torch.linspace(-1, 1, 6, dtype=D).unsqueeze(1)
        counted, rows = self.counting(lambda z, x: f(z, x + b))
        solution = solve(x, Picard(), function=counted)
        expected = solve(x + b, Picard())
        torch.testing.assert_close(solution.value, expected.value, rtol=1e-12, atol=1e-12)
        assert solution.converged.all()
        assert rows[-1] == 6

    def test_a_closure_that_happens_to_broadcast_is_noticed(self):
        """All rows but one finish at once; that one alone would be broadcast against what f closes over."""
        x = torch.cat([torch.zeros(5, N, dtype=D), X[:1]])
        b = torch.zeros(6, N, dtype=D)
        b[-1] = 0.5
        solution = solve(x, Picard(), function=lambda z, x: f(z, x + b))
        torch.testing.assert_close(solution.value, solve(x + b, Picard()).value, rtol=1e-12, atol=1e-12)

    def test_coupled_rows_are_noticed(self):
        def coupled(z, x):
            return torch.tanh(0.5 * z @ W + 0.3 * z.mean(dim=0, keepdim=True) + x)

        counted, rows = self.counting(coupled)
        x = X * torch.tensor([1e-3, 0.1, 1, 1, 3, 30], dtype=D).unsqueeze(1)
        solution = solve(x, Picard(), function=counted, rtol=1e-11)
        assert rows[-1] == 6
        torch.testing.assert_close(solution.value, coupled(solution.value, x), rtol=1e-8, atol=1e-8)

    def test_a_random_function_is_noticed(self):
        counted, rows = self.counting(lambda z, x: 0.5 * z + x + 1e-3 * torch.rand_like(z))
        x = X * torch.tensor([1e-6, 0.1, 1, 1, 3, 1e6], dtype=D).unsqueeze(1)
        solve(x, Picard(), function=counted, rtol=1e-3)
        assert sum(n != 6 for n in rows) <= 1, "tried once, and given up"

    def test_a_function_that_asserts_its_batch_is_let_be(self):
        def strict(z, x):
            assert len(z) == 6, "only six will do"
            return f(z, x)

        x = X * torch.tensor([1e-3, 0.1, 1, 1, 3, 30], dtype=D).unsqueeze(1)
        assert solve(x, Picard(), function=strict).converged.all()

    def test_batch_normalisation_that_needs_two_rows_is_let_be(self):
        norm = torch.nn.BatchNorm1d(N, affine=False, track_running_stats=False).double()
        x = X * torch.tensor([0, 0, 0, 0, 0, 1.0], dtype=D).unsqueeze(1)
        solution = solve(x, Picard(), function=lambda z, x: 0.2 * norm(z + x))
        torch.testing.assert_close(solution.value, 0.2 * norm(solution.value + x), rtol=1e-7, atol=1e-7)

    @pytest.mark.parametrize("solver", CORE, ids=name)
    def test_also_for_roots(self, solver):
        x = X * torch.tensor([1e-3, 0.1, 1, 1, 3, 30], dtype=D).unsqueeze(1)
        with torch.no_grad():
            solution = root(lambda z, x: 0.8 * (z - f(z, x)), torch.zeros_like(x), (x,), solver=solver, max_steps=200)
            expected = solve(x, Newton())
        torch.testing.assert_close(solution.value, expected.value, rtol=1e-4, atol=1e-5)


def rows_of(draw_seed, batch, n, dtype=D):
    g = torch.Generator().manual_seed(draw_seed)
    scale = 10 ** (3 * torch.rand(batch, 1, generator=g, dtype=D) - 2)
    return (scale * torch.randn(batch, n, generator=g, dtype=D)).to(dtype)


@settings(max_examples=15)
@given(seed=st.integers(0, 10_000), batch=st.integers(1, 9), which=st.integers(0, len(CORE) - 1))
def test_a_sample_does_not_depend_on_its_batch(seed, batch, which):
    x = rows_of(seed, batch, N)
    together = solve(x, CORE[which])
    for row in range(batch):
        alone = solve(x[row : row + 1], CORE[which])
        torch.testing.assert_close(together.value[row], alone.value[0], rtol=1e-10, atol=1e-11)
        assert together.stats.steps[row] == alone.stats.steps[0]


@settings(max_examples=15)
@given(seed=st.integers(0, 10_000), batch=st.integers(2, 9), which=st.integers(0, len(CORE) - 1))
def test_the_order_of_samples_does_not_matter(seed, batch, which):
    x = rows_of(seed, batch, N)
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(seed))
    straight, permuted = solve(x, CORE[which]), solve(x[order], CORE[which])
    torch.testing.assert_close(straight.value[order], permuted.value, rtol=1e-10, atol=1e-11)
    assert torch.equal(straight.stats.steps[order], permuted.stats.steps)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 10_000), exponent=st.integers(-40, 40), which=st.integers(0, len(CORE) - 1),
    single=st.booleans(),
)  # fmt: skip
def test_units_do_not_matter(seed, exponent, which, single):
    """The state measured in units that are powers of two: every step is the same, to the last bit."""
    dtype = torch.float32 if single else D
    if single:
        exponent = exponent // 2
    x, unit = rows_of(seed, 4, N, dtype), 2.0**exponent
    options = {"rtol": 1e-5 if single else 1e-9}
    plain = solve(x, CORE[which], **options)
    scaled = solve(x, CORE[which], function=lambda z, x: unit * f(z / unit, x), **options)
    torch.testing.assert_close(scaled.value / unit, plain.value, rtol=0, atol=0)
    assert torch.equal(scaled.stats.steps, plain.stats.steps)
    assert torch.equal(scaled.stats.residual, plain.stats.residual)


@pytest.mark.parametrize("solver", [Picard(), Anderson(), Broyden()])
def test_a_row_that_others_move_away_from_its_rest_point_runs_again(solver):
    # The first row rests at once, while the second still moves, and the first's rest point with it.
    def f(z):
        return torch.stack([0.5 * z[0] + z[1], 0.9 * z[1] + 0.1 * torch.tanh(1 - z[1]) + 0.1])

    solution = fixed_point(f, torch.zeros(2, 3, dtype=torch.float64), solver=solver, rtol=1e-6, max_steps=400)
    assert solution.converged.all()
    residual = (f(solution.value) - solution.value).norm(dim=1) / solution.value.norm(dim=1)
    assert residual.max() < 3e-6
