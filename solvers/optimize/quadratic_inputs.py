"""Checks of the six arguments of a quadratic programme."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ..transforms import any_true

ASYMMETRY = 1e-5
"""Difference of an entry of Q from its mirror image, relative to the largest entry, that is more than rounding."""


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Six tensors of one dtype; q (batch, n), h (batch, m) and b (batch, p), and matrices with a batch or without.

    Attributes:
        Q, q, G, h, A, b: the programme; without constraints of a kind, m or p is zero.
        dtype: of the arguments; the tensors here are in double precision.
    """

    Q: Tensor
    q: Tensor
    G: Tensor
    h: Tensor
    A: Tensor
    b: Tensor
    dtype: torch.dtype

    @property
    def m(self) -> int:
        """The number of inequalities."""
        return self.h.shape[1]

    def rows(self) -> tuple[Tensor, Tensor]:
        """All constraints: C (batch, m + p, n), shared where both parts are, and d (batch, m + p)."""
        d = torch.cat([self.h, self.b], 1)
        if self.A.shape[-2] == 0:
            return self.G, d
        if self.G.shape[-2] == 0:
            return self.A, d
        G, A, batch = self.G, self.A, len(d)
        if G.ndim != A.ndim:
            G = G if G.ndim == 3 else G.expand(batch, *G.shape)
            A = A if A.ndim == 3 else A.expand(batch, *A.shape)
        return torch.cat([G, A], -2), d


def check_inputs(
    Q: Tensor | None, q: Tensor, G: Tensor | None, h: Tensor | None, A: Tensor | None, b: Tensor | None,
    names: tuple[str, ...] = ("Q", "q", "G", "h", "A", "b"),
) -> Inputs:  # fmt: skip
    """What fits together.

    Raises:
        TypeError: an argument is no tensor.
        ValueError: shapes, dtypes or devices do not fit: the message says which, what was expected and what found;
            a matrix without its right-hand side; Q is not symmetric.
    """
    given = dict(zip(names, (Q, q, G, h, A, b), strict=True))
    _check_types(given, names[1], q)
    for matrix, side in ((names[2], names[3]), (names[4], names[5])):
        if (given[matrix] is None) != (given[side] is None):
            there, missing = (matrix, side) if given[side] is None else (side, matrix)
            raise ValueError(f"{there} was given without {missing}; a constraint needs both.")
    if q.ndim not in (1, 2) or q.shape[-1] == 0:
        raise ValueError(f"{names[1]}: expected shape (batch, n) or (n,) with n > 0; got {tuple(q.shape)}.")
    n = q.shape[-1]
    batch = 1
    for name, tensor in given.items():
        if tensor is None:
            continue
        batched = tensor.ndim == (3 if name in (names[0], names[2], names[4]) else 2)
        if batched and tensor.shape[0] != 1:
            batch = tensor.shape[0]
            break
    m = 0 if h is None else h.shape[-1] if h.ndim else -1
    p = 0 if b is None else b.shape[-1] if b.ndim else -1
    shapes = {
        names[0]: (n, n), names[1]: (n,), names[2]: (m, n), names[3]: (m,), names[4]: (p, n), names[5]: (p,),
    }  # fmt: skip
    for name, tensor in given.items():
        if tensor is None:
            continue
        shape = shapes[name]
        if tuple(tensor.shape) not in (shape, (batch, *shape), (1, *shape)):
            letters = {names[0]: "n, n", names[1]: "n", names[2]: "m, n", names[3]: "m", names[4]: "p, n"}
            raise ValueError(
                f"{name}: expected shape ({letters.get(name, 'p')}) = {shape}, shared, or (batch, "
                f"{letters.get(name, 'p')}) = {(batch, *shape)}; got {tuple(tensor.shape)}."
            )
    if batch == 0:
        raise ValueError(f"{names[1]}: the batch is empty (shape {tuple(q.shape)}); a solve needs a sample.")
    return _prepare(given, names, batch, n)


def _check_types(given: dict[str, Tensor | None], first: str, q: Tensor) -> None:
    for name, tensor in given.items():
        if tensor is None and name != first:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor; got {type(tensor).__name__}.")
        if not tensor.dtype.is_floating_point:
            raise ValueError(f"{name}: expected a real floating-point dtype; got {tensor.dtype}.")
        if tensor.device != q.device:
            raise ValueError(f"{name}: expected device {q.device} as that of {first}; got {tensor.device}.")


def _prepare(given: dict[str, Tensor | None], names: tuple[str, ...], batch: int, n: int) -> Inputs:
    Q, q, G, h, A, b = (given[name] for name in names)
    assert q is not None
    dtype = q.dtype
    for tensor in (Q, G, h, A, b):
        dtype = dtype if tensor is None else torch.promote_types(dtype, tensor.dtype)

    def matrix(t: Tensor | None, rows: int) -> Tensor:
        if t is None:
            return q.new_zeros(rows, n, dtype=torch.float64)
        t = t.to(torch.float64)
        return t.expand(batch, *t.shape[1:]) if t.ndim == 3 else t

    def vector(t: Tensor | None) -> Tensor:
        t = q.new_zeros(0) if t is None else t
        return t.to(torch.float64).expand(batch, t.shape[-1])

    # Of a linear programme nothing but the shape of Q is used, and that once for all samples.
    full = matrix(Q, n)
    if Q is not None:
        mirrored = full.mT
        with torch.no_grad():
            off = (full - mirrored).abs().flatten(-2).amax(-1)
            uneven = off > ASYMMETRY * full.abs().flatten(-2).amax(-1)
        if any_true(uneven):
            raise ValueError(
                f"{names[0]} is not symmetric: entries differ from their mirror image by up to {_largest(off)}. The "
                f"objective is 1/2 x'Qx; pass ({names[0]} + {names[0]}.mT) / 2."
            )
        if any_true(off > 0):
            full = (full + mirrored) / 2
    return Inputs(full, vector(q), matrix(G, 0), vector(h), matrix(A, 0), vector(b), dtype)


def _largest(t: Tensor) -> str:
    from ..transforms import plain

    return f"{float(plain(t.detach()).nan_to_num().max()):.3g}"
