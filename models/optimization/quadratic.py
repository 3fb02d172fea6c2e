"""The layer of OptNet: the optimum of a quadratic programme whose objective and constraints are learnt."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...solvers.optimize import CentralPath, InteriorPoint, QPSolution, QPSolver, quadratic_program


class QPLayer(nn.Module):
    """x minimises 1/2 x'Qx - scores'x subject to Gx <= h and Ax = b, of which scores is the input.

    Learnt are Q = L L' + ridge I, G and A, and the right-hand sides by way of a point that satisfies them: h = G z + s
    with s > 0 and b = A z, so that no step of an optimiser can make the programme infeasible.

    Args:
        size: n, the number of variables and of scores.
        inequalities: how many rows of G are learnt.
        equalities: how many rows of A are learnt.
        nonnegative: x >= 0 as well; the point z is then positive.
        quadratic: learn L; otherwise Q = ridge I.
        ridge: the least eigenvalue of Q, which makes the optimum unique.
        solver: None takes `InteriorPoint()`.
        adjoint: None differentiates the optimum; `CentralPath(barrier)` smooths it, so that constraints that are not
            active get a gradient too.
        rtol, max_steps: of the solve.
        throw: what to do when a solve fails: True raises, "warn" warns, False leaves it to the statistics.

    Raises:
        ValueError: a size below one, or a ridge that is not positive.

    Source: Amos and Kolter 2017, OptNet, section 3 and appendix.

    Example:
        >>> layer = QPLayer(4, inequalities=3)
        >>> layer(torch.ones(2, 4)).shape
        torch.Size([2, 4])
    """

    def __init__(
        self,
        size: int,
        inequalities: int = 0,
        equalities: int = 0,
        *,
        nonnegative: bool = False,
        quadratic: bool = True,
        ridge: float = 0.1,
        solver: QPSolver | None = None,
        adjoint: CentralPath | None = None,
        rtol: float = 1e-8,
        max_steps: int | None = None,
        throw: bool | str = True,
    ) -> None:
        super().__init__()
        if size < 1 or inequalities < 0 or equalities < 0:
            raise ValueError(
                f"QPLayer: size must be at least 1 and numbers of constraints at least 0; got size={size}, "
                f"inequalities={inequalities}, equalities={equalities}."
            )
        if not ridge > 0:
            raise ValueError(f"QPLayer: ridge must be positive, for the optimum to be unique; got {ridge}.")
        self.size, self.nonnegative, self.ridge = size, nonnegative, ridge
        self.solver = InteriorPoint() if solver is None else solver
        self.adjoint, self.rtol, self.max_steps, self.throw = adjoint, rtol, max_steps, throw
        self.root = nn.Parameter(torch.eye(size)) if quadratic else None
        self.G = nn.Parameter(torch.randn(inequalities, size) / size**0.5) if inequalities else None
        self.slack = nn.Parameter(torch.zeros(inequalities)) if inequalities else None
        self.A = nn.Parameter(torch.rand(equalities, size)) if equalities else None
        self.point = nn.Parameter(torch.zeros(size))

    def forward(self, scores: Float[Tensor, "batch n"]) -> Float[Tensor, "batch n"]:
        """The optimum."""
        return self.solve(scores).value

    def solve(self, scores: Float[Tensor, "batch n"]) -> QPSolution:
        """The optimum, its duals and how it was found."""
        Q, G, h, A, b = self.constraints()
        return quadratic_program(
            Q, -scores, G, h, A, b, solver=self.solver, adjoint=self.adjoint, rtol=self.rtol,
            max_steps=self.max_steps, throw=self.throw,
        )  # fmt: skip

    def constraints(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Q, G, h, A and b as the parameters make them."""
        eye = torch.eye(self.size, dtype=self.point.dtype, device=self.point.device)
        Q = self.ridge * eye
        if self.root is not None:
            lower = self.root.tril()
            Q = Q + lower @ lower.mT
        inside = self.point.exp() if self.nonnegative else self.point
        rows: list[Tensor] = []
        sides: list[Tensor] = []
        if self.G is not None and self.slack is not None:
            rows.append(self.G)
            sides.append(self.G @ inside + nn.functional.softplus(self.slack))
        if self.nonnegative:
            rows.append(-eye)
            sides.append(torch.zeros_like(self.point))
        G, h = (torch.cat(rows), torch.cat(sides)) if rows else (None, None)
        A, b = (self.A, self.A @ inside) if self.A is not None else (None, None)
        return Q, G, h, A, b

    def extra_repr(self) -> str:
        """The options, for repr()."""
        counts = (0 if t is None else len(t) for t in (self.G, self.A))
        return f"{self.size}, inequalities={next(counts)}, equalities={next(counts)}, nonnegative={self.nonnegative}"
