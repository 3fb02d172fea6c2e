import hypothesis
import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from restpoint.solvers import (
    project_box,
    project_isotonic,
    project_l1_ball,
    project_l2_ball,
    project_simplex,
    sparsemax,
)

# Forward-mode differentiation makes torch load decompositions that it scripts.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")

D = torch.float64


def points_of(*shape, seed=0):
    return torch.randn(*shape, dtype=D, generator=torch.Generator().manual_seed(seed)) * 1.5


# Each with a description of its set, on one vector: constraints that are non-negative inside.
RADIUS = 0.7
SETS = {
    "simplex": (lambda x: project_simplex(x, RADIUS), lambda p: np.append(p, [RADIUS - p.sum(), p.sum() - RADIUS])),
    "box": (lambda x: project_box(x, -0.3, 0.6), lambda p: np.concatenate([p + 0.3, 0.6 - p])),
    "l1": (lambda x: project_l1_ball(x, RADIUS), None),
    "l2": (lambda x: project_l2_ball(x, RADIUS), lambda p: np.array([RADIUS**2 - p @ p])),
    "isotonic": (project_isotonic, lambda p: np.diff(p)),
    "antitonic": (lambda x: project_isotonic(x, increasing=False), lambda p: -np.diff(p)),
}
# With every differentiable argument.
SIGNATURES = {
    "simplex": (project_simplex, lambda: (points_of(3, 5), torch.tensor([[0.5], [1.0], [2.0]], dtype=D))),
    "box": (project_box, lambda: (points_of(3, 5), -torch.rand(5, dtype=D) - 0.1, torch.rand(3, 1, dtype=D) + 0.1)),
    "l1": (project_l1_ball, lambda: (points_of(3, 5), torch.tensor([[0.5], [1.0], [20.0]], dtype=D))),
    "l2": (project_l2_ball, lambda: (points_of(3, 5), torch.tensor([[0.5], [1.0], [20.0]], dtype=D))),
    "isotonic": (project_isotonic, lambda: (points_of(3, 5), torch.rand(3, 5, dtype=D) + 0.5)),
}


@pytest.mark.parametrize("name", SETS)
class TestSets:
    def test_against_a_general_solver(self, name):
        project, constraint = SETS[name]
        for x in points_of(4, 5):
            target = x.numpy()
            if constraint is None:
                # |p|_1 <= r with p split into two non-negative parts.
                found = scipy.optimize.minimize(
                    lambda v, target=target: ((v[:5] - v[5:] - target) ** 2).sum(),
                    np.full(10, 0.01),
                    bounds=[(0, None)] * 10,
                    constraints={"type": "ineq", "fun": lambda v: RADIUS - v.sum()},
                    options={"ftol": 1e-13, "maxiter": 500},
                )
                nearest = found.x[:5] - found.x[5:]
            else:
                found = scipy.optimize.minimize(
                    lambda p, target=target: ((p - target) ** 2).sum(),
                    np.zeros(5) if name != "simplex" else np.full(5, RADIUS / 5),
                    constraints={"type": "ineq", "fun": constraint},
                    options={"ftol": 1e-13, "maxiter": 500},
                )
                nearest = found.x
            torch.testing.assert_close(project(x), torch.tensor(nearest), rtol=0, atol=2e-5)

    @hypothesis.given(st.lists(st.floats(-1e4, 1e4), min_size=6, max_size=6), st.integers(0, 1000))
    @hypothesis.settings(max_examples=25)
    def test_properties_of_any_projection(self, name, values, seed):
        project, _ = SETS[name]
        x, other = torch.tensor(values, dtype=D), points_of(6, seed=seed)
        p, q = project(x), project(other)
        torch.testing.assert_close(project(p), p, rtol=1e-12, atol=1e-12)
        # Nearer to each other than the points, and the points beyond lie at obtuse angles from any in the set.
        assert (p - q).norm() <= (x - other).norm() * (1 + 1e-9)
        assert (x - p) @ (q - p) <= 1e-7 * (1 + x.norm())

    def test_any_dimension_and_vmap(self, name):
        project, _ = SETS[name]
        x = points_of(4, 6)
        rows = torch.stack([project(row) for row in x])
        torch.testing.assert_close(project(x), rows, rtol=0, atol=1e-15)
        torch.testing.assert_close(torch.func.vmap(project)(x), rows, rtol=0, atol=1e-15)

    def test_bf16(self, name):
        project, _ = SETS[name]
        x = points_of(4, 6).bfloat16()
        assert project(x).dtype == torch.bfloat16
        assert torch.equal(project(x), project(x.float()).bfloat16())


@pytest.mark.parametrize("name", SIGNATURES)
class TestDerivatives:
    def test_gradcheck(self, name):
        project, make = SIGNATURES[name]
        arguments = tuple(a.requires_grad_() for a in make())
        assert gradcheck(project, arguments, check_forward_ad=True, check_batched_grad=True)
        assert gradgradcheck(project, arguments, check_fwd_over_rev=True)

    def test_torch_func(self, name):
        project, make = SIGNATURES[name]
        arguments = make()
        jacobian = torch.func.jacrev(project)(*arguments)
        torch.testing.assert_close(torch.func.jacfwd(project)(*arguments), jacobian)
        moved = torch.func.jvp(lambda x: project(x, *arguments[1:]), arguments[:1], (torch.ones_like(arguments[0]),))[1]
        torch.testing.assert_close(moved, jacobian.sum((2, 3)))


def test_dimensions():
    x = points_of(3, 4, 5)
    for project in (project_simplex, project_l1_ball, project_l2_ball):
        torch.testing.assert_close(project(x, 0.5, 1), project(x.mT, 0.5).mT)
    torch.testing.assert_close(project_isotonic(x, dim=0), project_isotonic(x.movedim(0, -1)).movedim(-1, 0))
    assert torch.equal(project_simplex(x), sparsemax(x))
    keep = torch.tensor([True, True, False, True, False])
    torch.testing.assert_close(project_simplex(x, 3.0, mask=keep)[..., keep], project_simplex(x[..., keep], 3.0))


def test_isotonic_against_scipy():
    x, w = points_of(30, 40), torch.rand(30, 40, dtype=D) + 0.1
    for increasing in (True, False):
        rows = [
            scipy.optimize.isotonic_regression(a.numpy(), weights=b.numpy(), increasing=increasing).x
            for a, b in zip(x, w, strict=True)
        ]
        found = project_isotonic(x, w, increasing=increasing)
        torch.testing.assert_close(found, torch.tensor(np.array(rows)), rtol=1e-13, atol=1e-13)
    # Each merger causes the next one only.
    chain = torch.cat([torch.arange(99, dtype=D), torch.tensor([-1e4], dtype=D)])
    torch.testing.assert_close(project_isotonic(chain), chain.mean().expand(100))
    assert torch.equal(project_isotonic(chain.sort().values), chain.sort().values)


def test_balls_are_the_identity_inside():
    x = points_of(3, 5)
    for project, norm in ((project_l1_ball, 1), (project_l2_ball, 2)):
        assert torch.equal(project(x, 100.0), x)
        outside = project(x, 0.1)
        torch.testing.assert_close(torch.linalg.vector_norm(outside, norm, -1), torch.full((3,), 0.1, dtype=D))
        at_zero = torch.zeros(5, dtype=D)
        torch.testing.assert_close(torch.func.jacrev(project)(at_zero), torch.eye(5, dtype=D))
        assert (torch.func.hessian(lambda t, f=project: f(t).sum())(at_zero) == 0).all()
        # Squares of these overflow, and those of their inverses vanish.
        for scale in (1e-30, 1e30):
            small = project(torch.full((4,), scale), scale)
            torch.testing.assert_close(torch.linalg.vector_norm(small / scale, norm), torch.tensor(1.0))


def test_box():
    x = torch.tensor([-2.0, 0.0, 3.0], requires_grad=True)
    assert project_box(x).equal(x)
    assert project_box(x, lower=-1).tolist() == [-1, 0, 3]
    assert project_box(x, upper=torch.tensor([-3.0, 0.0, 1.0])).tolist() == [-3, 0, 1]
    (gradient,) = torch.autograd.grad(project_box(x, 0.0, 3.0).sum(), x)
    assert gradient.tolist() == [0, 1, 1]
    with pytest.raises(ValueError, match=r"the box is empty at \(1,\)"):
        project_box(x, 0.0, torch.tensor([1.0, -1.0, 1.0]))
    with pytest.raises(ValueError, match=r"lower has to broadcast to the shape of the points, \(3,\); got \(2,\)"):
        project_box(x, torch.zeros(2))


def test_errors():
    x = points_of(2, 3)
    for project in (project_simplex, project_l1_ball, project_l2_ball):
        for wrong in (0.0, -1.0, float("nan"), float("inf"), torch.tensor([[1.0], [-2.0]])):
            with pytest.raises(ValueError, match="radius must be positive and finite; got"):
                project(x, wrong)
        with pytest.raises(
            ValueError, match=r"radius has to broadcast to shape \(2, 1\), one along dim=-1; got \(3,\)"
        ):
            project(x, torch.ones(3))
        with pytest.raises(IndexError):
            project(x, 2.0, 5)
    with pytest.raises(ValueError, match="weights must be positive and finite; got 0"):
        project_isotonic(x, torch.tensor([1.0, 0.0, 1.0]))
    with pytest.raises(ValueError, match=r"weights have to broadcast to the shape of the points, \(2, 3\); got \(2,\)"):
        project_isotonic(x, torch.ones(2))
    with pytest.raises(ValueError, match="wholly masked"):
        project_simplex(x, 2.0, mask=torch.zeros(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="is empty"):
        project_simplex(torch.zeros(2, 0), 2.0)
