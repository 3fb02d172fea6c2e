"""The three conditions of the implicit function theorem at a solution, and what they say about its gradient."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..fixed_point.problem import Problem
from ..tree import norms
from .probe import Centre, Change
from .recording import Recording, leaves_of, problem_of, require_rows, unit_vectors
from .singular import Spectrum, dense_spectrum, krylov_spectrum
from .table import format_table, number

KRYLOV_STEPS = 20
SHOWN = 20


@dataclasses.dataclass(frozen=True)
class Certificate:
    """What `certificate` found, per sample; `str()` of it is a table.

    Attributes:
        residual: condition 1. |f(z) - z| / |f(z)|, or |F(x)| / (|A| |x|) for a root; absolute where that scale is 0.
        distance: bound on the distance from z to the rest point; infinite where none is certified to exist.
        jump: condition 2. The largest relative jump of a Jacobian-vector product that was seen within the ball that
            holds the rest point; 0 where the function looks smooth there, infinite where it is not finite.
        smallest_singular_value: condition 3, of A = I - df/dz, or dF/dx; an upper bound where `condition` is infinite.
        condition: condition 3. The largest singular value of A over the smallest.
        gradient_error: bound on the relative error of the implicit gradient; see `certificate`.
        limits: what `residual`, `condition` and `gradient_error` must not exceed.
    """

    residual: Float[Tensor, "batch"]
    distance: Float[Tensor, "batch"]
    jump: Float[Tensor, "batch"]
    smallest_singular_value: Float[Tensor, "batch"]
    condition: Float[Tensor, "batch"]
    gradient_error: Float[Tensor, "batch"]
    limits: tuple[float, float, float]

    @property
    def solved(self) -> Bool[Tensor, "batch"]:
        """Condition 1: the residual is small."""
        return self.residual <= self.limits[0]

    @property
    def smooth(self) -> Bool[Tensor, "batch"]:
        """Condition 2: no kink was seen."""
        return self.jump == 0

    @property
    def regular(self) -> Bool[Tensor, "batch"]:
        """Condition 3: A is well enough conditioned to be inverted."""
        return self.condition <= self.limits[1]

    @property
    def trusted(self) -> Bool[Tensor, "batch"]:
        """All three conditions hold, and the gradient's error is bounded as was asked for."""
        return self.solved & self.smooth & self.regular & (self.gradient_error <= self.limits[2])

    def verdict(self, sample: int) -> str:
        """Which conditions fail at a sample, or "trusted"."""
        reasons = [
            text
            for holds, text in (
                (self.solved, "condition 1 fails (residual)"),
                (self.smooth, "condition 2 fails (kink)"),
                (self.regular, "condition 3 fails (Jacobian singular or nearly so)"),
            )
            if not bool(holds[sample])
        ]
        if not reasons and not bool(self.trusted[sample]):
            return f"the gradient's error may exceed {number(self.limits[2])}"
        return ", ".join(reasons) or "trusted"

    def __str__(self) -> str:
        columns = ("residual", "distance", "jump", "smallest_singular_value", "condition", "gradient_error")
        worst = self.gradient_error.nan_to_num(nan=math.inf).argsort(descending=True, stable=True)[:SHOWN]
        samples = sorted(worst.tolist())
        rows = [[str(i), *(number(float(getattr(self, c)[i])) for c in columns), self.verdict(i)] for i in samples]
        header = ("sample", "residual", "distance", "jump", "sigma_min", "condition", "gradient error", "verdict")
        batch = len(self.residual)
        lines = [format_table(header, rows)]
        if len(samples) < batch:
            lines.append(f"and {batch - len(samples)} samples with smaller errors")
        lines.append(f"{int(self.trusted.sum())} of {batch} trusted")
        return "\n".join(lines)


def certificate(
    f: Callable[..., Any],
    z: Any,
    args: tuple[Any, ...] | list[Any] = (),
    *,
    root: bool = False,
    loss: Callable[[Any], Tensor] | None = None,
    rtol: float = 1e-3,
    tolerance: float = 1e-2,
    max_condition: float | None = None,
    dense_size: int = 256,
    probes: int = 3,
    generator: torch.Generator | None = None,
) -> Certificate:
    """Check the three conditions of the implicit function theorem at z, sample by sample.

    With r the residual (f(z) - z, or -F(x)) and A = -dr/dz, the conditions are that (1) r = 0, (2) r is continuously
    differentiable around z, and (3) A is invertible. Numerically none of them holds or fails outright; what they are
    for is the gradient, and together they bound its error:

    Let eta = |A^-1 r| be the length of a Newton step and s the smallest singular value of A at z. Suppose that
    |A(z') - A(z)| <= c s for all z' within R = eta / (1 - c) of z, for some c < 1. Then T(z') = z' + A(z)^-1 r(z') has
    the derivative A(z)^-1 (A(z) - A(z')), of norm at most c, and T moves z by eta, so T maps that ball into itself and
    contracts: there is exactly one rest point z* in it. For a gradient v of a loss by the rest point, the backward
    pass solves A^T u = v. At z it finds u, at z* it would find u*, and

        u - u* = A(z)^-T (A(z*) - A(z))^T u*,    so    |u - u*| <= c |u*|.

    The gradient by whatever else enters f is B^T u, B the derivative by it, evaluated at z. If B changes by a share b
    within the ball, and v by dv, the relative error is at most (1 + c) (1 + b) (1 + |dv| / (s |u|)) - 1, plus rounding.
    (For B this is relative to |B| |u|, which the gradient itself falls short of where contributions cancel.)

    c is measured within R = 2 eta, which is large enough as long as c <= 1/2; beyond, the bound is infinite. It is
    measured along the Newton step, at whose end the rest point lies to first order, and along random directions. A
    kink, such as ReLU's, is told from a smooth change by bisection: its jump does not shrink with the interval. Kinks
    outside of the ball do no harm and are not reported. Probing sees what it meets, so this is strong evidence and no
    proof.

    Args:
        f: f(z, *args) of a fixed point, or the residual F(x, *args) of a root problem. Sample i of its value depends
            on sample i of the state alone.
        z: the solution, a tensor, tuple, list or dict of tensors (batch, ...).
        args: passed on to `f`.
        root: f is F of `root`, not f of `fixed_point`.
        loss: maps the state to a scalar or to a value a sample. Give it where the bound is to include that the loss's
            own gradient v is taken at z and not at z*; without it v is taken as constant.
        rtol: the largest `residual` that counts as solved.
        tolerance: the largest `gradient_error` that is trusted.
        max_condition: the largest `condition` that counts as regular; None takes eps^(-1/2) of the type, at which half
            of the digits are lost.
        dense_size: up to this n A is assembled and decomposed. Above, its smallest singular value comes from
            Golub-Kahan bidiagonalisation of A^-1, applied by GMRES, and is mostly right to a percent.
        probes: random directions beside the Newton step.
        generator: of the random vectors.

    Returns:
        The `Certificate`.

    Raises:
        StateError: z is no state, or `f` returns something of another shape.
        ValueError: `f` couples samples, or probes or dense_size is negative.

    Source: Krantz and Parks 2003, The implicit function theorem; the argument is that of the Newton-Kantorovich
    theorem with a bound on the change of A in place of its Lipschitz constant (Ortega and Rheinboldt 1970, 12.6).
    """
    if probes < 0 or dense_size < 0:
        raise ValueError(f"certificate: probes and dense_size must not be negative; got {probes} and {dense_size}.")
    problem, matrix = problem_of(f, z, args, root)
    matrix = matrix.detach()
    here = Recording.at(problem, matrix)
    require_rows(here.operator)
    wide = here.operator.dtype
    dense = matrix.shape[1] <= dense_size
    spectrum = dense_spectrum(here.operator) if dense else krylov_spectrum(here.operator, KRYLOV_STEPS, generator)

    newton = spectrum.solve(here.residual.to(wide), False)
    length = torch.where(spectrum.certain, norms(newton), math.inf)
    length = torch.where(torch.isfinite(length), length, math.inf)
    scale = norms(matrix) + math.sqrt(matrix.shape[1])
    eps = torch.finfo(matrix.dtype).eps
    # A residual is known to its rounding only, which an almost singular A turns into a long way.
    radius = 2 * (length + eps * scale / spectrum.smallest.clamp(torch.finfo(wide).tiny, 1))
    reach = torch.where(radius <= scale, radius, eps**0.5 * scale)

    slope = _slope(problem, loss)
    centre = Centre(problem, matrix, here, _shared(here), slope)
    change = _changes(centre, newton, reach, probes, generator)

    contraction = change.jacobian / spectrum.smallest
    certified = (contraction <= 0.5) & (radius <= scale)
    distance = torch.where(certified, length / (1 - contraction), math.inf)
    drift = torch.zeros_like(distance)
    if loss is not None:
        u = spectrum.solve(slope(matrix).to(wide), True)
        drift = torch.where(change.loss == 0, 0.0, change.loss / (spectrum.smallest * norms(u)))
    error = (1 + contraction) * (1 + change.sources) * (1 + drift) - 1
    error = error + eps * math.sqrt(matrix.shape[1]) * spectrum.condition
    return Certificate(
        residual=_relative(problem, here, matrix, spectrum),
        distance=distance,
        jump=change.jump,
        smallest_singular_value=spectrum.smallest,
        condition=spectrum.condition,
        gradient_error=torch.where(certified & ~torch.isnan(error), error, math.inf),
        limits=(rtol, eps**-0.5 if max_condition is None else max_condition, tolerance),
    )


def _relative(problem: Problem, here: Recording, z: Tensor, spectrum: Spectrum) -> Tensor:
    """The residual relative to the scale that `Certificate.residual` names."""
    residual = norms(here.residual)
    scale = spectrum.largest * norms(z) if problem.root else norms(here.out.detach())
    return torch.where(scale > 0, residual / scale, residual)


def _slope(problem: Problem, loss: Callable[[Any], Tensor] | None) -> Callable[[Tensor], Tensor]:
    def slope(z: Tensor) -> Tensor:
        if loss is None:
            return torch.zeros_like(z)
        with torch.enable_grad():
            point = z.detach().requires_grad_()
            value = loss(problem.spec.unflatten(point))
            return torch.autograd.grad(value.sum(), point, materialize_grads=True)[0]

    return slope


def _shared(here: Recording) -> list[Tensor]:
    """The leaves that the function closes over: neither the state nor args."""
    inputs = {id(t) for t in here.inputs}
    found = [t for t in leaves_of([here.out]) if id(t) not in inputs]
    return [t for t in found if id(t) != id(here.point)]


def _changes(centre: Centre, newton: Tensor, reach: Tensor, probes: int, generator: torch.Generator | None) -> Change:
    length = norms(newton).unsqueeze(1)
    known = torch.isfinite(length) & (length > 0)
    first = torch.where(known, newton / length, unit_vectors(centre.z, generator))
    directions = [first, *[unit_vectors(centre.z, generator) for _ in range(probes)]]
    found: Change | None = None
    for direction in directions:
        offset = (reach.unsqueeze(1) * direction).to(centre.z.dtype)
        change = centre.change(offset, generator)
        found = change if found is None else found.join(change)
    assert found is not None
    return found
