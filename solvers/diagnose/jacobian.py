"""How strongly a map contracts: its spectral radius, and a penalty to train it by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..transforms import inside_transform
from ..tree import norms
from .recording import jacobian_of, problem_of, require_rows, sign_vectors, unit_vectors


def spectral_radius(
    f: Callable[..., Any],
    z: Any,
    args: tuple[Any, ...] | list[Any] = (),
    *,
    steps: int = 100,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "batch"]:
    """The largest modulus of an eigenvalue of J = df/dz, per sample; Picard iteration converges where it is below 1.

    A random vector is multiplied by J^T again and again; the geometric mean of its growth over the later half of the
    products tends to the spectral radius, also where the leading eigenvalues are a complex pair, for which the growth
    of a single product or a Rayleigh quotient says nothing. The mean is weighted by a smooth bump, which averages the
    oscillation of such a pair out much faster than equal weights do.

    The error falls with `steps`, slowly where another modulus is close to the largest (about 1 % for a random matrix
    of size 100 after 100 products).

    Args:
        f: takes the state and `args`, as in `fixed_point`; sample i of its value depends on sample i alone.
        z: where, a tensor, tuple, list or dict of tensors (batch, ...).
        args: passed on to `f`.
        steps: number of vector-Jacobian products.
        generator: of the random vector.

    Returns:
        (batch,), without derivatives.

    Raises:
        ValueError: steps below 2, or `f` couples samples.

    Source: Gelfand's formula; for the weights Das, Saiki, Sander and Yorke 2017, Quantitative quasiperiodicity.
    """
    if steps < 2:
        raise ValueError(f"spectral_radius: steps must be at least 2; got {steps}.")
    jacobian, matrix = jacobian_of(f, z, args)
    require_rows(jacobian)
    v = unit_vectors(matrix, generator)
    tiny = torch.finfo(v.dtype).tiny
    growth = []
    for step in range(steps):
        v = jacobian.rmatvec(v)
        length = norms(v)
        v = v / length.clamp_min(tiny).unsqueeze(1)
        if step >= steps // 2:
            growth.append(length.double())
    t = torch.arange(1, len(growth) + 1, dtype=torch.float64, device=matrix.device) / (len(growth) + 1)
    weights = (t * (1 - t)).square()
    mean = torch.stack(growth, dim=1).log() @ (weights / weights.sum())
    return mean.exp().to(v.dtype)


def jacobian_penalty(
    f: Callable[..., Any],
    z: Any,
    args: tuple[Any, ...] | list[Any] = (),
    *,
    samples: int = 1,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "batch"]:
    """An unbiased estimate of |df/dz|_F^2 / n per sample, differentiable, to be added to a training loss.

    Keeping it small keeps the rest point unique and quickly found. The estimate is |J^T e|^2 / n with random signs e.

    Args:
        f: takes the state and `args`, as in `fixed_point`.
        z: the rest point, (batch, ...) tensors. Where it requires grad the penalty is differentiated through it as
            well, for one more backward solve; z.detach() is what Bai et al. do.
        args: passed on to `f`.
        samples: vectors e that are averaged; the cost of one vector-Jacobian product and its derivative each.
        generator: of the random signs.

    Returns:
        (batch,), with derivatives in everything that `f` uses where grad mode is on.

    Raises:
        ValueError: samples below 1.

    Source: Bai, Koltun and Kolter 2021, Stabilizing equilibrium models by Jacobian regularization;
    Hutchinson 1990.
    """
    if samples < 1:
        raise ValueError(f"jacobian_penalty: samples must be at least 1; got {samples}.")
    problem, matrix = problem_of(f, z, args, root=True)
    signs = [sign_vectors(matrix, generator) for _ in range(samples)]
    if inside_transform():
        recorded = torch.func.vjp(problem.output, matrix)
        products = [recorded[1](e.to(recorded[0].dtype))[0] for e in signs]
    else:
        taped = torch.is_grad_enabled()
        with torch.enable_grad():
            # A tensor of its own: a path from z to the result around f is no part of df/dz.
            point = matrix.view_as(matrix) if matrix.requires_grad and taped else matrix.detach().requires_grad_()
            out = problem.output(point)
            if not out.requires_grad:
                return norms(matrix.detach()) * 0
            products = [
                torch.autograd.grad(
                    out, point, e.to(out.dtype), retain_graph=True, create_graph=taped, materialize_grads=True
                )[0]
                for e in signs
            ]
    squares = torch.stack([norms(p).square() for p in products])
    return squares.mean(dim=0) / matrix.shape[1]
