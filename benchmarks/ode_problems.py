"""Initial value problems for the ODE benchmark, each for torch and for JAX."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Field = Callable[..., Tensor]


@dataclasses.dataclass(frozen=True)
class Problem:
    """dy/dt = field(t, y, *params) from y0, wanted at the times t.

    Attributes:
        name: as in the tables.
        title: what it is.
        y0: initial state (batch, n).
        t: output times (T,).
        params: tensors whose gradient is wanted beside that of y0.
        field: for torch; t is 0-dim, or (batch,) from solvers with steps per sample.
        jax_field: the same for JAX, with t a scalar and y the whole batch.
        rtol, atol: asked of every solver.
    """

    name: str
    title: str
    y0: Tensor
    t: Tensor
    params: tuple[Tensor, ...]
    field: Field
    jax_field: Callable[..., Any]
    rtol: float
    atol: float

    def tight(self) -> Problem:
        """In float64, for a reference."""
        params = tuple(p.detach().double().requires_grad_(p.requires_grad) for p in self.params)
        return dataclasses.replace(self, y0=self.y0.double(), t=self.t.double(), params=params, rtol=1e-10, atol=1e-11)


def spiral() -> Problem:
    """The cubic spiral, for which overhead is everything."""
    rng = torch.Generator().manual_seed(0)
    matrix = torch.tensor([[-0.1, 2.0], [-2.0, -0.1]], dtype=torch.float64).requires_grad_()
    y0 = torch.tensor([[2.0, 0.0]], dtype=torch.float64) + 0.1 * torch.randn(128, 2, dtype=torch.float64, generator=rng)
    return Problem(
        name="a",
        title="spiral, 128 x 2, 100 times, float64",
        y0=y0,
        t=torch.linspace(0, 25, 100, dtype=torch.float64),
        params=(matrix,),
        field=lambda t, y, a: (y**3) @ a,
        jax_field=lambda t, y, a: (y**3) @ a,
        rtol=1e-6,
        atol=1e-6,
    )


def network() -> Problem:
    """A network of two layers, for which evaluations are everything."""
    rng = torch.Generator().manual_seed(1)
    first = (2 * torch.randn(64, 256, generator=rng) / 8).requires_grad_()
    second = (2 * torch.randn(256, 64, generator=rng) / 16).requires_grad_()

    def jax_field(t: Any, y: Any, first: Any, second: Any) -> Any:
        import jax.numpy as jnp

        return jnp.tanh(y @ first) @ second

    return Problem(
        name="b",
        title="network 64-256-64, 256 x 64, float32",
        y0=torch.randn(256, 64, generator=rng),
        t=torch.tensor([0.0, 1.0]),
        params=(first, second),
        field=lambda t, y, first, second: torch.tanh(y @ first) @ second,
        jax_field=jax_field,
        rtol=1e-5,
        atol=1e-5,
    )


def flow(size: int, width: int, batch: int, exact: bool) -> Problem:
    """A continuous normalising flow: the last column is the change of the log density.

    Args:
        size: dimensions of the density.
        width: of the two hidden layers.
        batch: samples.
        exact: the divergence by one derivative for each dimension, or estimated along one fixed direction.
    """
    rng = torch.Generator().manual_seed(2)

    def layer(into: int, out: int) -> Tensor:
        return (1.5 * torch.randn(into, out, generator=rng) / math.sqrt(into)).requires_grad_()

    params = (layer(size, width), layer(1, width), layer(width, width), layer(width, size))
    noise = torch.randint(0, 2, (batch, size), generator=rng) * 2.0 - 1.0

    def speed(t: Tensor, z: Tensor, *params: Tensor) -> Tensor:
        first, of_time, second, third = params
        return torch.tanh(torch.tanh(z @ first + t.reshape(-1, 1) * of_time) @ second) @ third

    def field(t: Tensor, state: Tensor, *params: Tensor) -> Tensor:
        recording = torch.is_grad_enabled()
        with torch.enable_grad():
            z = state[:, :size]
            if not z.requires_grad:
                z = z.detach().requires_grad_()
            out = speed(t, z, *params)
            if exact:
                columns = [torch.autograd.grad(out[:, i].sum(), z, create_graph=True)[0][:, i] for i in range(size)]
                divergence = torch.stack(columns, 1).sum(1, keepdim=True)
            else:
                direction = noise.to(z.dtype)
                (pulled,) = torch.autograd.grad(out, z, direction, create_graph=recording)
                divergence = (pulled * direction).sum(1, keepdim=True)
            return torch.cat([out, -divergence], 1)

    def jax_field(t: Any, state: Any, *params: Any) -> Any:
        import jax
        import jax.numpy as jnp

        first, of_time, second, third = params
        z = state[:, :size]

        def speed(z: Any) -> Any:
            return jnp.tanh(jnp.tanh(z @ first + t * of_time) @ second) @ third

        out, pull = jax.vjp(speed, z)
        if exact:
            divergence = sum(pull(jnp.zeros_like(z).at[:, i].set(1.0))[0][:, i] for i in range(size))
        else:
            direction = jnp.asarray(noise.numpy(), z.dtype)
            divergence = (pull(direction)[0] * direction).sum(1)
        return jnp.concatenate([out, -divergence[:, None]], 1)

    y0 = torch.cat([torch.randn(batch, size, generator=rng), torch.zeros(batch, 1)], 1)
    kind = "exact trace" if exact else "Hutchinson"
    return Problem(
        name="c2" if exact else "c64",
        title=f"continuous flow, {batch} x {size}, {kind}, float32",
        y0=y0,
        t=torch.tensor([0.0, 1.0]),
        params=params,
        field=field,
        jax_field=jax_field,
        rtol=1e-5,
        atol=1e-5,
    )


def van_der_pol(end: float = 20.0) -> Problem:
    """Oscillators from harmless to rather stiff in one batch.

    The state is wanted at the end alone. On the flank of an oscillation, which any time between may lie on, an error
    of phase is multiplied by the speed there, and its size is luck.
    """
    mu = torch.linspace(1, 50, 64, dtype=torch.float64).requires_grad_()

    def field(t: Tensor, y: Tensor, mu: Tensor) -> Tensor:
        x, v = y[:, 0], y[:, 1]
        return torch.stack([v, mu * (1 - x**2) * v - x], 1)

    def jax_field(t: Any, y: Any, mu: Any) -> Any:
        import jax.numpy as jnp

        x, v = y[:, 0], y[:, 1]
        return jnp.stack([v, mu * (1 - x**2) * v - x], 1)

    return Problem(
        name="d",
        title="van der Pol, mu 1 to 50 across 64 samples, float64",
        y0=torch.tensor([[2.0, 0.0]], dtype=torch.float64).repeat(64, 1),
        t=torch.tensor([0.0, end], dtype=torch.float64),
        params=(mu,),
        field=field,
        jax_field=jax_field,
        rtol=1e-6,
        atol=1e-6,
    )


def stiff_van_der_pol(end: float) -> Problem:
    """mu = 1000, one sample."""
    mu = torch.tensor([1000.0], dtype=torch.float64).requires_grad_()
    base = van_der_pol(end)
    return dataclasses.replace(
        base,
        name=f"vdp {end:g}",
        title=f"van der Pol, mu 1000, to t = {end:g}",
        y0=torch.tensor([[2.0, 0.0]], dtype=torch.float64),
        t=torch.linspace(0, end, 11, dtype=torch.float64),
        params=(mu,),
        rtol=1e-6,
        atol=1e-8,
    )


def robertson(end: float = 1e5) -> Problem:
    """Three reactions with rates of 0.04, 3e7 and 1e4."""
    rates = torch.tensor([0.04, 3e7, 1e4], dtype=torch.float64).requires_grad_()

    def speeds(y: Any, k: Any) -> tuple[Any, Any]:
        one = -k[0] * y[:, 0] + k[2] * y[:, 1] * y[:, 2]
        return one, k[1] * y[:, 1] ** 2

    def field(t: Tensor, y: Tensor, k: Tensor) -> Tensor:
        one, three = speeds(y, k)
        return torch.stack([one, -one - three, three], 1)

    def jax_field(t: Any, y: Any, k: Any) -> Any:
        import jax.numpy as jnp

        one, three = speeds(y, k)
        return jnp.stack([one, -one - three, three], 1)

    return Problem(
        name="robertson",
        title=f"Robertson's reactions, to t = {end:g}",
        y0=torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64),
        t=torch.cat(
            [torch.zeros(1, dtype=torch.float64), torch.logspace(-2, math.log10(end), 10, dtype=torch.float64)]
        ),
        params=(rates,),
        field=field,
        jax_field=jax_field,
        rtol=1e-6,
        atol=1e-10,
    )
