"""Every linear solver on every kind of system, against torch.linalg.solve."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from restpoint.solvers.fixed_point import Anderson, Picard
from restpoint.solvers.linear import (
    CG,
    GMRES,
    LU,
    Auto,
    BiCGSTAB,
    Cholesky,
    FixedPointLinear,
    LinearOperator,
    LinearSolver,
    Neumann,
)
from restpoint.solvers.solution import Status

# A full GMRES space for the rotations; everything else suits the defaults.
GENERAL = [LU(), GMRES(), GMRES(3, max_steps=2000), BiCGSTAB(), Auto(), Auto(dense_size=1)]
CONTRACTIVE = [*GENERAL, Neumann(), FixedPointLinear(), FixedPointLinear(Picard())]
DEFINITE = [Cholesky(), CG()]
ITERATIVE = [GMRES(), BiCGSTAB(), CG(), Neumann(), FixedPointLinear()]
ALL = [*CONTRACTIVE, *DEFINITE]


def name(solver):
    return repr(solver).replace("rtol=None, atol=0.0, ", "")


def contraction(batch, n, dtype=torch.float64, radius=0.8, symmetric=False):
    """I - J with |J| = radius at the last sample, growing linearly over the batch: every next sample is harder."""
    j = torch.randn(batch, n, n, dtype=dtype)
    j = j + j.mT if symmetric else j
    j = j / torch.linalg.matrix_norm(j, 2).reshape(-1, 1, 1)
    return torch.eye(n, dtype=dtype) - j * torch.linspace(radius / batch, radius, batch, dtype=dtype).reshape(-1, 1, 1)


def rotations(angles, n=None):
    """Block-diagonal rotations of the plane: a spectrum on the unit circle."""
    blocks = [torch.tensor([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]]) for a in angles]
    return torch.block_diag(*blocks).double()


def operator(matrix):
    """Matrix-free, so that nothing can peek at the matrix."""
    return LinearOperator(
        lambda v: (matrix @ v.unsqueeze(2)).squeeze(2),
        lambda v: (matrix.mT @ v.unsqueeze(2)).squeeze(2),
        batch=len(matrix),
        size=matrix.shape[-1],
        dtype=matrix.dtype,
        device=matrix.device,
    )


def check(solution, matrix, b, error=1e-8, rtol=1e-10):
    assert solution.value.shape == b.shape
    assert solution.value.dtype == b.dtype
    assert solution.stats.status.tolist() == [Status.CONVERGED] * len(b)
    assert solution.converged.all()
    true = torch.linalg.vector_norm(b - (matrix @ solution.value.unsqueeze(2)).squeeze(2), dim=1)
    true = true / torch.linalg.vector_norm(b, dim=1).clamp_min(1e-300)
    torch.testing.assert_close(solution.stats.residual, true, rtol=1e-2, atol=20 * torch.finfo(b.dtype).eps)
    assert (solution.stats.residual <= rtol * 1.01 + 4 * torch.finfo(b.dtype).eps).all()
    torch.testing.assert_close(solution.value, torch.linalg.solve(matrix, b), rtol=error, atol=error)


@pytest.mark.parametrize("batch, n", [(5, 12), (1, 12), (4, 1), (1, 1), (3, 40)])
@pytest.mark.parametrize("solver", CONTRACTIVE, ids=name)
def test_nonsymmetric(solver, batch, n):
    matrix, b = contraction(batch, n), torch.randn(batch, n, dtype=torch.float64)
    check(solver.solve(operator(matrix), b), matrix, b)


@pytest.mark.parametrize("batch, n", [(5, 12), (1, 12), (4, 1), (1, 1), (3, 40)])
@pytest.mark.parametrize("solver", ALL, ids=name)
def test_symmetric_positive_definite(solver, batch, n):
    matrix, b = contraction(batch, n, symmetric=True), torch.randn(batch, n, dtype=torch.float64)
    check(solver.solve(operator(matrix), b), matrix, b)


@pytest.mark.parametrize("solver", ALL, ids=name)
def test_transpose(solver):
    matrix = contraction(4, 9, symmetric=solver in DEFINITE)
    b = torch.randn(4, 9, dtype=torch.float64)
    check(solver.solve(operator(matrix).T, b), matrix.mT, b)


@pytest.mark.parametrize("solver", ALL, ids=name)
def test_float32(solver):
    matrix, b = contraction(4, 20, torch.float32, symmetric=True), torch.randn(4, 20)
    check(solver.solve(operator(matrix), b), matrix, b, error=2e-4, rtol=1e-5)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("solver", ALL, ids=name)
def test_half_precision_is_solved_in_float32(solver, low):
    matrix, b = contraction(4, 20, torch.float32, symmetric=True), torch.randn(4, 20).to(low)
    solution = solver.solve(operator(matrix), b)
    assert solution.value.dtype == low
    assert solution.converged.all()
    torch.testing.assert_close(solution.value, torch.linalg.solve(matrix, b.float()).to(low), rtol=1e-2, atol=1e-2)
    # An operator in half precision gets its vectors in its own type.
    seen = set()

    def scale(v):
        seen.add(v.dtype)
        return 0.75 * v

    half = LinearOperator(scale, batch=4, size=20, dtype=low, device="cpu")
    solution = solver.solve(half, b.float())
    assert seen == {low}
    torch.testing.assert_close(solution.value, b.float() / 0.75, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("solver", ALL, ids=name)
def test_wide_range_of_scales(solver):
    """A gradient of 1e-30 has squares that underflow in float32; it is solved like any other."""
    matrix, b = contraction(5, 10, torch.float32, symmetric=True), torch.randn(5, 10)
    scale = torch.tensor([1e-30, 1e-20, 1.0, 1e20, 1e30]).unsqueeze(1)
    plain, scaled = solver.solve(operator(matrix), b), solver.solve(operator(matrix), b * scale)
    assert scaled.converged.all()
    torch.testing.assert_close(scaled.value / scale, plain.value, rtol=1e-4, atol=1e-4)
    assert (scaled.stats.steps - plain.stats.steps).abs().max() <= 1


@pytest.mark.parametrize("solver", [GMRES(), BiCGSTAB(), CG(), Neumann(), FixedPointLinear(Picard())], ids=name)
def test_samples_stop_one_by_one(solver):
    """Steps grow with the difficulty, and a sample's solution is what it would be alone."""
    matrix, b = contraction(5, 40, symmetric=True), torch.randn(5, 40, dtype=torch.float64)
    solution = solver.solve(operator(matrix), b)
    steps = solution.stats.steps
    assert (steps.diff() >= 0).all()
    assert steps[-1] >= steps[0] + 5
    for i in range(5):
        alone = solver.solve(operator(matrix[i : i + 1]), b[i : i + 1])
        assert alone.stats.steps.item() == steps[i]
        assert alone.stats.evaluations.item() == solution.stats.evaluations[i]
        torch.testing.assert_close(alone.value[0], solution.value[i], rtol=1e-12, atol=1e-12)


def test_evaluations_are_those_of_the_operator():
    matrix, b = contraction(1, 30), torch.randn(1, 30, dtype=torch.float64)
    for solver in [*ITERATIVE, LU(), GMRES(4)]:
        calls = 0

        def count(v):
            nonlocal calls
            calls += 1
            return (matrix @ v.unsqueeze(2)).squeeze(2)

        free = LinearOperator(count, batch=1, size=30, dtype=torch.float64, device="cpu")
        for x0 in (None, b):
            calls = 0
            solution = solver.solve(free, b, x0)
            assert solution.stats.evaluations.item() == calls, solver


@pytest.mark.parametrize("solver", ALL, ids=name)
@pytest.mark.parametrize("where", ["b", "matrix", "both", "infinity"])
def test_a_broken_sample_touches_no_other(solver, where):
    matrix, b = contraction(4, 12, symmetric=True), torch.randn(4, 12, dtype=torch.float64)
    bad_matrix, bad_b = matrix.clone(), b.clone()
    if where in ("b", "both"):
        bad_b[1, 3] = math.nan
    if where in ("matrix", "both"):
        bad_matrix[1] = math.nan
    if where == "infinity":
        bad_b[1, 3] = math.inf
    good, bad = solver.solve(operator(matrix), b), solver.solve(operator(bad_matrix), bad_b)
    others = [0, 2, 3]
    assert bad.stats.status.tolist() == [0, Status.NON_FINITE, 0, 0]
    assert bad.value[1].isnan().all()
    if isinstance(solver, FixedPointLinear):
        torch.testing.assert_close(bad.value[others], good.value[others], rtol=1e-13, atol=1e-13)
    else:
        assert torch.equal(bad.value[others], good.value[others])
    assert torch.equal(bad.stats.steps[others], good.stats.steps[others])


@pytest.mark.parametrize("solver", ALL, ids=name)
def test_zero_right_hand_side(solver):
    matrix, b = contraction(4, 12, symmetric=True), torch.randn(4, 12, dtype=torch.float64)
    b[2] = 0
    for x0 in (None, torch.randn_like(b)):
        solution = solver.solve(operator(matrix), b, x0)
        assert solution.converged.all()
        assert (solution.value[2] == 0).all()
        assert solution.stats.steps[2] == 0
        assert solution.stats.residual[2] == 0
        assert not solution.value[[0, 1, 3]].eq(0).any()
    solution = solver.solve(operator(matrix), torch.zeros_like(b))
    assert solution.converged.all()
    assert (solution.value == 0).all()


@pytest.mark.parametrize("solver", ITERATIVE, ids=name)
def test_warm_start(solver):
    matrix, b = contraction(4, 30, symmetric=True), torch.randn(4, 30, dtype=torch.float64)
    x = torch.linalg.solve(matrix, b)
    cold = solver.solve(operator(matrix), b)
    warm = solver.solve(operator(matrix), b, x + 1e-6 * torch.randn_like(x))
    check(warm, matrix, b)
    assert (warm.stats.steps < cold.stats.steps).all()
    done = solver.solve(operator(matrix), b, x)
    assert (done.stats.steps == 0).all()
    assert done.converged.all()
    broken = x.clone()
    broken[1, 0] = math.nan
    assert solver.solve(operator(matrix), b, broken).stats.status.tolist() == [0, Status.NON_FINITE, 0, 0]


@pytest.mark.parametrize("solver", [GMRES(), BiCGSTAB()], ids=name)
@pytest.mark.parametrize("angles", [[0.3], [1.0, 2.5], [0.2, 0.9, 1.6, 2.3, 3.0]], ids=len)
def test_rotations(solver, angles):
    """Eigenvalues all around the origin."""
    matrix = rotations(angles).expand(3, -1, -1)
    b = torch.randn(3, 2 * len(angles), dtype=torch.float64)
    check(solver.solve(operator(matrix), b), matrix, b)


def test_gmres_ends_within_n_steps_of_a_full_space():
    matrix, b = rotations([0.2, 0.9, 1.6, 2.3, 3.0]).expand(2, -1, -1), torch.randn(2, 10, dtype=torch.float64)
    solution = GMRES(10).solve(operator(matrix), b)
    check(solution, matrix, b)
    assert (solution.stats.steps <= 10).all()


def test_gmres_minimises_the_residual():
    """After k steps the residual is the least over the Krylov space, here found by least squares."""
    matrix, b = torch.randn(3, 15, 15, dtype=torch.float64), torch.randn(3, 15, dtype=torch.float64)
    krylov = [b]
    for k in range(1, 8):
        krylov.append((matrix @ krylov[-1].unsqueeze(2)).squeeze(2))
        images = torch.stack(krylov[1:], dim=2)
        least = b - (images @ torch.linalg.lstsq(images, b.unsqueeze(2)).solution).squeeze(2)
        solution = GMRES(rtol=0.0, max_steps=k).solve(operator(matrix), b)
        expected = torch.linalg.vector_norm(least, dim=1) / torch.linalg.vector_norm(b, dim=1)
        torch.testing.assert_close(solution.stats.residual, expected, rtol=1e-6, atol=0)


def test_gmres_stagnates_on_a_quarter_turn_without_enough_space():
    """r and A r are orthogonal: one dimension gets nowhere, two are exact."""
    matrix, b = rotations([math.pi / 2]).expand(1, -1, -1), torch.randn(1, 2, dtype=torch.float64)
    stuck = GMRES(1).solve(operator(matrix), b)
    assert stuck.stats.status.item() == Status.STAGNATED
    assert stuck.stats.steps.item() == 1
    check(GMRES(2).solve(operator(matrix), b), matrix, b)


def test_bicgstab_breakdown_is_a_status():
    """A skew-symmetric matrix has r^T A r = 0: the first pivot vanishes in one sample, the other goes on."""
    skew = torch.tensor([[0.0, -1.0], [1.0, 0.0]]).double()
    matrix, b = torch.stack([skew, torch.eye(2).double() + 0.3 * skew]), torch.randn(2, 2, dtype=torch.float64)
    solution = BiCGSTAB().solve(operator(matrix), b)
    assert solution.stats.status.tolist() == [Status.STAGNATED, Status.CONVERGED]
    torch.testing.assert_close(solution.value[1], torch.linalg.solve(matrix[1], b[1]))


def test_lucky_breakdown_of_gmres():
    """An eigenvector as right-hand side ends in one step, next to a sample that needs all."""
    matrix = contraction(2, 10, symmetric=True)
    b = torch.randn(2, 10, dtype=torch.float64)
    b[0] = torch.linalg.eigh(matrix[0]).eigenvectors[:, 4]
    for rtol in (1e-10, 1e-15):
        solution = GMRES(rtol=rtol).solve(operator(matrix), b)
        assert solution.stats.steps[0] == 1
        torch.testing.assert_close(solution.value, torch.linalg.solve(matrix, b))


@pytest.mark.parametrize("solver", [s for s in ALL if "Auto(dense_size=32" not in repr(s)], ids=name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["zero", "exact", "rounded"])
def test_a_singular_sample_is_noticed(solver, kind, dtype):
    """Its right-hand side is out of the range; the samples beside it are solved."""
    n = 8
    matrix = contraction(3, n, dtype, symmetric=True)
    if kind == "zero":
        matrix[1] = 0
    elif kind == "exact":
        matrix[1, :, 2] = matrix[1, 2, :] = 0
    else:
        values, vectors = torch.linalg.eigh(matrix[1])
        values[3] = 0
        matrix[1] = (vectors * values) @ vectors.mT
    b = torch.randn(3, n, dtype=dtype)
    solution = solver.solve(operator(matrix), b)
    status = solution.stats.status.tolist()
    assert status[0] == status[2] == Status.CONVERGED
    assert status[1] in (Status.STAGNATED, Status.NON_FINITE, Status.MAX_STEPS)
    others = torch.tensor([0, 2])
    torch.testing.assert_close(
        solution.value[others], torch.linalg.solve(matrix[others], b[others]), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("n", [2, 3, 30, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lu_notices_numerical_singularity_but_not_ill_conditioning(n, dtype):
    left, right = (torch.linalg.qr(torch.randn(20, n, n, dtype=dtype)).Q for _ in range(2))
    values = torch.ones(20, n, dtype=dtype)
    values[:10, -1] = 1e-3 if dtype == torch.float32 else 1e-10
    values[10:, -1] = 0
    matrix, b = left * values.unsqueeze(1) @ right, torch.randn(20, n, dtype=dtype)
    status = LU().solve(LinearOperator.from_matrix(matrix), b).stats.status
    assert (status[:10] == Status.CONVERGED).all()
    assert (status[10:] == Status.STAGNATED).all()


def test_cholesky_and_cg_notice_what_is_not_positive_definite():
    matrix = contraction(4, 10, symmetric=True)
    matrix[1] -= 1.5 * torch.eye(10)
    matrix[2] = -matrix[2]
    b = torch.randn(4, 10, dtype=torch.float64)
    for solver in (Cholesky(), CG()):
        status = solver.solve(operator(matrix), b).stats.status.tolist()
        assert status == [Status.CONVERGED, Status.STAGNATED, Status.STAGNATED, Status.CONVERGED]


def test_cholesky_notices_what_is_not_symmetric():
    matrix, b = contraction(3, 6), torch.randn(3, 6, dtype=torch.float64)
    assert (Cholesky().solve(operator(matrix), b).stats.status == Status.STAGNATED).all()


@pytest.mark.parametrize("radius", [1.05, 2.0, 1e4, 1e12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_neumann_notices_divergence(radius, dtype):
    n = 10
    j = torch.linalg.qr(torch.randn(2, n, n, dtype=dtype)).Q * torch.tensor([0.5, radius]).to(dtype).reshape(-1, 1, 1)
    b = torch.randn(2, n, dtype=dtype)
    matrix = torch.eye(n, dtype=dtype) - j
    solution = Neumann().solve(operator(matrix), b)
    assert solution.stats.status.tolist() == [Status.CONVERGED, Status.STAGNATED]
    # The best iterate is the start, whose residual is that of x = 0.
    assert (solution.value[1] == 0).all()
    assert solution.stats.residual[1] == 1
    assert solution.stats.steps[1] <= 10


def test_neumann_is_patient_with_a_matrix_far_from_normal():
    """|J^k| grows for eight steps before it falls."""
    n = 6
    j = 0.5 * torch.eye(n).double() + torch.diag(torch.full((n - 1,), 1.0).double(), 1)
    matrix, b = (torch.eye(n).double() - j).unsqueeze(0), torch.ones(1, n, dtype=torch.float64)
    b[0, : n - 1] = 0
    solution = Neumann(patience=20).solve(operator(matrix), b)
    check(solution, matrix, b, error=1e-6)
    assert Neumann(patience=2).solve(operator(matrix), b).stats.status.item() == Status.STAGNATED


def test_neumann_truncated():
    matrix, b = contraction(3, 8, radius=0.5), torch.randn(3, 8, dtype=torch.float64)
    j = torch.eye(8).double() - matrix
    term, total = b, torch.zeros_like(b)
    for k in range(1, 6):
        total, term = total + term, (j @ term.unsqueeze(2)).squeeze(2)
        solution = Neumann(rtol=0.0, max_steps=k).solve(operator(matrix), b)
        torch.testing.assert_close(solution.value, total)
        assert (solution.stats.evaluations == k).all()


@pytest.mark.parametrize("solver", ITERATIVE, ids=name)
def test_preconditioner(solver):
    """A badly scaled matrix, and its diagonal: fewer steps, the same residual."""
    n = 60
    diagonal = torch.logspace(0, 2, n, dtype=torch.float64)
    j = 0.2 * torch.randn(3, n, n, dtype=torch.float64) / n**0.5
    matrix, b = torch.diag(diagonal) + j + j.mT, torch.randn(3, n, dtype=torch.float64)
    solver = type(solver)(max_steps=400)
    plain = solver.solve(operator(matrix), b)
    better = solver.solve(operator(matrix), b, preconditioner=lambda v: v / diagonal)
    check(better, matrix, b)
    assert (better.stats.steps * 2 < plain.stats.steps).logical_or(~plain.converged).all()
    with pytest.raises(ValueError, match="LU is a direct solver and takes no preconditioner"):
        LU().solve(operator(matrix), b, preconditioner=lambda v: v)


def test_auto_gives_the_preconditioner_to_its_iterative_solver_only():
    matrix, b = contraction(2, 6), torch.randn(2, 6, dtype=torch.float64)
    check(Auto(dense_size=6).solve(operator(matrix), b, preconditioner=lambda v: v / 0), matrix, b)
    inverse = torch.linalg.inv(matrix)
    solution = Auto(dense_size=5).solve(
        operator(matrix), b, preconditioner=lambda v: (inverse @ v.unsqueeze(2)).squeeze(2)
    )
    assert (solution.stats.steps == 1).all()


@pytest.mark.parametrize("solver", ITERATIVE, ids=name)
def test_budget_and_tolerances(solver):
    kind = type(solver)
    matrix, b = contraction(3, 40, symmetric=True), torch.randn(3, 40, dtype=torch.float64)
    short = kind(max_steps=2).solve(operator(matrix), b)
    assert (short.stats.steps[1:] == 2).all()
    assert (short.stats.status[1:] == Status.MAX_STEPS).all()
    assert (short.stats.residual < 1).all()
    loose = kind(rtol=1e-2).solve(operator(matrix), b)
    assert loose.converged.all()
    assert (loose.stats.residual <= 1e-2).all()
    size = torch.linalg.vector_norm(b, dim=1)
    absolute = kind(rtol=0.0, atol=1e-3).solve(operator(matrix), b * 1e3)
    assert absolute.converged.all()
    assert (absolute.stats.residual * size * 1e3 <= 1e-3).all()
    assert (absolute.stats.steps > loose.stats.steps).all()
    # What is below the absolute tolerance is solved by zero.
    assert (kind(atol=1e3).solve(operator(matrix), b).value == 0).all()


@pytest.mark.parametrize("solver", [GMRES(), BiCGSTAB(), CG()], ids=name)
def test_a_tolerance_below_rounding_stagnates(solver):
    matrix, b = contraction(3, 30, torch.float32, symmetric=True), torch.randn(3, 30)
    solution = type(solver)(rtol=1e-12).solve(operator(matrix), b)
    assert (solution.stats.status == Status.STAGNATED).all()
    assert (solution.stats.residual < 1e-6).all()
    assert (solution.stats.steps < 200).all()


@pytest.mark.parametrize("solver", ALL, ids=name)
def test_vmap(solver):
    """Over the right-hand side, over the matrix, and over both; each example is what it is alone."""
    matrices = torch.stack([contraction(3, 10, symmetric=True, radius=r) for r in (0.3, 0.8)])
    rights = torch.randn(2, 3, 10, dtype=torch.float64)
    rights[1, 0] = 0

    def solve(matrix, b):
        solution = solver.solve(operator(matrix), b)
        return solution.value, solution.stats.steps, solution.stats.status

    for dims in ((0, 0), (None, 0), (0, None)):
        values, steps, status = torch.func.vmap(solve, in_dims=dims)(
            matrices if dims[0] == 0 else matrices[0], rights if dims[1] == 0 else rights[0]
        )
        assert (status == Status.CONVERGED).all()
        for i in range(2):
            matrix = matrices[i if dims[0] == 0 else 0]
            b = rights[i if dims[1] == 0 else 0]
            value, alone, _ = solve(matrix, b)
            torch.testing.assert_close(values[i], value, rtol=1e-9, atol=1e-9)
            if isinstance(solver, (GMRES, CG, BiCGSTAB, Neumann)):
                assert torch.equal(steps[i], alone)


@pytest.mark.parametrize("solver", ALL, ids=name)
def test_nothing_is_recorded(solver):
    matrix = contraction(2, 5, symmetric=True).requires_grad_()
    b = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    assert not solver.solve(operator(matrix), b).value.requires_grad
    assert not solver.solve(LinearOperator.from_matrix(matrix), b).value.requires_grad

    def inner(b):
        return (solver.solve(operator(matrix.detach()), b).value * b).sum()

    # Inside torch.func.grad the solution is a constant.
    detached = b.detach()
    expected = torch.linalg.solve(matrix.detach(), detached)
    torch.testing.assert_close(torch.func.grad(inner)(detached), expected, rtol=1e-7, atol=1e-7)


def test_an_operator_that_returns_its_argument():
    b = torch.randn(3, 7, dtype=torch.float64)
    identity = LinearOperator(lambda v: v, lambda v: v, batch=3, size=7, dtype=torch.float64, device="cpu")
    for solver in ALL:
        solution = solver.solve(identity, b)
        torch.testing.assert_close(solution.value, b)
        assert (solution.stats.steps <= 1).all()


def test_options_are_checked():
    for kind in (GMRES, CG, BiCGSTAB, Neumann, FixedPointLinear):
        with pytest.raises(ValueError, match="rtol must be finite and not negative"):
            kind(rtol=-1.0)
        with pytest.raises(ValueError, match="atol must be finite and not negative"):
            kind(atol=math.nan)
        with pytest.raises(ValueError, match="max_steps must be an integer of at least 1"):
            kind(max_steps=0)
        with pytest.raises(TypeError, match="Did you mean 'max_steps'"):
            kind(max_step=3)
    with pytest.raises(ValueError, match="restart must be an integer"):
        GMRES(0)
    with pytest.raises(ValueError, match="restart must be an integer"):
        GMRES(restart=2.0)
    with pytest.raises(ValueError, match="patience"):
        Neumann(patience=0)
    with pytest.raises(ValueError, match="dense_size"):
        Auto(dense_size=0)
    with pytest.raises(TypeError, match="write dense=LU\\(\\)"):
        Auto(dense=LU)
    with pytest.raises(TypeError, match="solver must be one of"):
        FixedPointLinear(GMRES())
    with pytest.raises(TypeError, match="abstract"):
        LinearSolver()
    assert FixedPointLinear(Anderson()).solver == Anderson()
    assert hash(GMRES()) == hash(GMRES())


def test_shapes_are_checked():
    matrix, b = contraction(3, 5), torch.randn(3, 5, dtype=torch.float64)
    for solver in ALL:
        with pytest.raises(ValueError, match=r"b: expected shape \(batch, n\) = \(3, 5\)"):
            solver.solve(operator(matrix), b[:, :4])
        with pytest.raises(ValueError, match=r"b: expected dtype torch.float64 .* got torch.float32"):
            solver.solve(operator(matrix), b.float())
        with pytest.raises(ValueError, match="x0: expected dtype"):
            solver.solve(operator(matrix), b, b.float())
        with pytest.raises(ValueError, match="b: expected device"):
            solver.solve(operator(matrix), b.to("meta"))


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    batch=st.integers(1, 4),
    n=st.integers(1, 9),
    restart=st.integers(1, 9),
    rtol=st.sampled_from([1e-4, 1e-8, 1e-11]),
)
def test_gmres_never_claims_what_is_not_so(seed, batch, n, restart, rtol):
    """Any matrix, singular ones included: a status of convergence is a true residual below the tolerance."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randint(-2, 3, (batch, n, n), generator=generator).double()
    b = torch.randint(-2, 3, (batch, n), generator=generator).double()
    for solver in (GMRES(restart, rtol=rtol, max_steps=60), BiCGSTAB(rtol=rtol), CG(rtol=rtol), LU()):
        solution = solver.solve(operator(matrix), b)
        residual = torch.linalg.vector_norm(b - (matrix @ solution.value.unsqueeze(2)).squeeze(2), dim=1)
        limit = (1e-9 if isinstance(solver, LU) else rtol) * torch.linalg.vector_norm(b, dim=1) * 1.001
        assert (residual <= limit)[solution.converged].all()
        assert (
            solution.stats.steps <= solver.max_steps if not isinstance(solver, LU) else solution.stats.steps <= 1
        ).all()
        finite = solution.stats.status != Status.NON_FINITE
        assert (solution.stats.residual[finite] <= 1 + 1e-12).logical_or(solution.stats.residual[finite].isnan()).all()
