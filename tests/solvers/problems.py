"""Fixed-point and root problems whose answers are known, and the methods that should find them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from restpoint.solvers import GMRES, Anderson, Broyden, Newton, Picard

SOLVERS = [
    Picard(),
    Picard(0.8),
    Anderson(),
    Anderson(memory=1),
    Anderson(memory=2),
    Anderson(damping=0.7),
    Anderson(kind="I"),
    Anderson(kind="I", memory=2),
    Broyden(),
    Broyden(memory=1),
    Broyden(memory=3),
    Broyden(line_search=False),
    Newton(),
    Newton(GMRES()),
    Newton(line_search=False),
]


def name(value: object) -> str:
    """A short id of a parameter: a solver or adjoint with the options that are not the defaults."""
    if not dataclasses.is_dataclass(value):
        return getattr(value, "name", str(value))
    fields = {f.name: (getattr(value, f.name), f.default) for f in dataclasses.fields(value)}
    told = [
        type(v).__name__ if dataclasses.is_dataclass(v) else f"{k}={v}"
        for k, (v, default) in fields.items()
        if v != default and default is not dataclasses.MISSING
    ]
    return f"{type(value).__name__}({','.join(told)})"


@dataclasses.dataclass(frozen=True)
class Case:
    """A problem.

    Attributes:
        name: of the case.
        f: (z, x, parameter) -> z, or the residual.
        x: what each sample has of its own.
        parameter: what they share.
        root: whether f is a residual.
    """

    name: str
    f: Callable[..., Tensor]
    x: Tensor
    parameter: Tensor
    root: bool = False

    def to(self, dtype: torch.dtype) -> Case:
        return dataclasses.replace(self, x=self.x.to(dtype), parameter=self.parameter.to(dtype))

    @property
    def z0(self) -> Tensor:
        return torch.zeros_like(self.x)

    def reference(self) -> Tensor:
        """The answer in float64."""
        x, parameter, z = self.x.double(), self.parameter.double(), self.z0.double()
        n = z[0].numel()
        for _ in range(60):
            out = self.f(z, x, parameter)
            residual = -out if self.root else out - z
            jacobian = torch.func.vmap(torch.func.jacrev(lambda a, b: self.f(a[None], b[None], parameter)[0]))(z, x)
            jacobian = jacobian.reshape(len(z), n, n)
            matrix = jacobian if self.root else torch.eye(n, dtype=z.dtype) - jacobian
            step = torch.linalg.solve(matrix, residual.reshape(len(z), n, 1)).reshape(z.shape)
            z = z + step
            if step.abs().max() < 1e-15:
                break
        return z


def _scaled(matrix: Tensor, radius: float) -> Tensor:
    return matrix * (radius / torch.linalg.eigvals(matrix).abs().max())


def cases() -> list[Case]:
    """Five fixed points and a root, in float64; the samples differ in how hard they are."""
    g = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    symmetric = draw(6, 6)
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    return [
        Case("mlp", lambda z, x, w: torch.tanh(z @ w + x), draw(4, 6), _scaled(draw(6, 6), 0.5)),
        Case("linear", lambda z, x, w: z @ w + x, draw(4, 6), _scaled(symmetric + symmetric.T, 0.9)),
        Case(
            "rotation", lambda z, x, w: z @ w + x, draw(4, 6),
            0.9 * torch.block_diag(turn, torch.matrix_exp(turn), torch.matrix_exp(2 * turn)),
        ),
        Case(
            "conv", lambda z, x, w: torch.tanh(torch.nn.functional.conv2d(z, w, padding=1) + x),
            draw(3, 2, 5, 5), 0.15 * draw(2, 2, 3, 3),
        ),
        Case(
            "root", lambda z, x, w: 0.2 * (z @ w.T) @ w + 0.3 * z + 0.05 * z**3 - x, draw(4, 6), draw(6, 6) / 2,
            root=True,
        ),
    ]  # fmt: skip


CASES = cases()
