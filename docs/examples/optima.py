# ruff: noqa: T201
"""Optima and their derivatives: six systems, each checked against what is known of it, and drawn.

usage: python docs/examples/optima.py [--output FILE.png]

1. The unit circle: x with x^2 + t^2 = 1 is the root of an equation, and dx/dt = -t/x.
2. Softmax by its KKT system: its Jacobian is that of a root, diag(z) - z z'.
3. OptNet's layer: a quadratic programme over a polygon, whose solution moves along the edges as q turns.
4. The argmin of an energy: the gradient of unrolled descent becomes the implicit one as the steps grow.
5. Automatic differentiation as a Schur complement: a triangular solve with a programme's extended Jacobian.
6. Traffic: the largest flow through a network, and the price of a link, which is its derivative.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
from torch import Tensor

from restpoint.models.optimization import maximum_flow
from restpoint.solvers import linear_solve, minimize, quadratic_program, root

D = torch.float64


def unit_circle(axis: Any) -> float:
    """Error of dx/dt."""
    t = torch.linspace(-0.95, 0.95, 77, dtype=D).unsqueeze(1).requires_grad_()
    x = root(lambda x, t: x * x + t * t - 1, torch.ones_like(t), (t,), rtol=1e-15, max_steps=100).value
    (slope,) = torch.autograd.grad(x.sum(), t)
    at, height = t.detach().flatten(), x.detach().flatten()
    axis.plot(at, height, color="#1d4e89", label="x(t)")
    axis.plot(at, slope.flatten(), color="#c1121f", label="dx/dt")
    axis.set(xlabel="t", ylim=(-3.2, 3.2), title="the unit circle")
    axis.legend(fontsize=7)
    return float((slope + t.detach() / x.detach()).abs().max())


def softmax(axis: Any) -> float:
    """Error of the Jacobian."""
    theta = torch.tensor([[1.0, 0.2, -0.5, 0.7, -1.2]], dtype=D)

    def stationarity(point: tuple[Tensor, Tensor], theta: Tensor) -> tuple[Tensor, Tensor]:
        z, u = point
        return z.log() + 1 - theta + u, z.sum(1, keepdim=True) - 1

    def solve(theta: Tensor) -> Tensor:
        start = torch.full_like(theta, 0.2), torch.zeros_like(theta[:, :1])
        return root(stationarity, start, (theta,), rtol=1e-14, max_steps=100).value[0]

    jacobian = torch.autograd.functional.jacobian(solve, theta)[0, :, 0]
    z = theta.softmax(1)[0]
    axis.imshow(jacobian.numpy(), cmap="RdBu", vmin=-0.25, vmax=0.25)
    axis.set(title="softmax: Jacobian by the KKT system", xticks=[], yticks=[])
    return float((jacobian - z.diag() + torch.outer(z, z)).abs().max())


def optnet(axis: Any) -> float:
    """Largest violation of the optimality conditions."""
    corners = torch.arange(5, dtype=D) * (2 * math.pi / 5) + 0.3
    G = torch.stack([corners.cos(), corners.sin()], 1)
    angle = torch.linspace(0, 2 * math.pi, 181, dtype=D)
    q = -1.6 * torch.stack([angle.cos(), angle.sin()], 1)
    solution = quadratic_program(torch.eye(2, dtype=D), q, G, torch.ones(5, dtype=D))
    x, price = solution.value, solution.duals.inequality
    points = -q
    axis.plot(*points.T, color="0.7", linewidth=0.8, label="without constraints")
    axis.plot(*x.T, color="#1d4e89", label="optimum")
    axis.set(aspect="equal", title="OptNet: over a polygon, as q turns", xticks=[], yticks=[])
    axis.legend(fontsize=7, loc="center")
    slack = 1 - x @ G.T
    conditions = (x + q + price @ G, slack.clamp_max(0), price.clamp_max(0), price * slack)
    return max(float(c.abs().max()) for c in conditions)


def argmin(axis: Any) -> float:
    """Difference of unrolled descent's gradient from the implicit one, at the end."""
    x = torch.linspace(-1, 1, 6, dtype=D).unsqueeze(0).requires_grad_()

    def energy(y: Tensor, x: Tensor) -> Tensor:
        return (y - x).square().sum(1) / 2 + (1 + y.diff(dim=1).square()).sqrt().sum(1)

    implicit = torch.autograd.grad(minimize(energy, torch.zeros_like(x), (x,), rtol=1e-13).value.sin().sum(), x)[0]
    errors: list[float] = []
    y = torch.zeros_like(x, requires_grad=True)
    for _ in range(120):
        (slope,) = torch.autograd.grad(energy(y, x).sum(), y, create_graph=True)
        y = y - 0.3 * slope
        errors.append(float((torch.autograd.grad(y.sin().sum(), x, retain_graph=True)[0] - implicit).abs().max()))
    axis.semilogy(range(1, 121), errors, color="#1d4e89")
    axis.set(xlabel="steps of descent", title="argmin: unrolled gradient - implicit one")
    return errors[-1]


def schur(axis: Any) -> float:
    """Difference of the triangular solve from autograd."""
    generator = torch.Generator().manual_seed(0)
    width, depth = 3, 5
    weights = [torch.randn(width, width, generator=generator, dtype=D) for _ in range(depth)]
    x = torch.randn(width, generator=generator, dtype=D)

    def layer(weight: Tensor, v: Tensor) -> Tensor:
        return (weight @ v).tanh()

    # The states v_k = layer_k(v_{k - 1}) as one system E(v, x) = 0: its Jacobian is lower triangular, block by block.
    size = width * depth
    extended, by_input, v = torch.eye(size, dtype=D), torch.zeros(size, width, dtype=D), x
    for k, weight in enumerate(weights):
        local = torch.func.jacrev(lambda v, w=weight: layer(w, v))(v)
        rows = slice(k * width, (k + 1) * width)
        if k:
            extended[rows, (k - 1) * width : k * width] = -local
        else:
            by_input[rows] = local
        v = layer(weight, v)
    solved = linear_solve(extended.expand(width, size, size), by_input.T).value.T[-width:]

    def programme(x: Tensor) -> Tensor:
        for weight in weights:
            x = layer(weight, x)
        return x

    axis.spy((extended.abs() > 0).numpy(), markersize=4, color="#1d4e89")
    axis.set(title="extended Jacobian of five layers", xticks=[], yticks=[])
    return float((solved - torch.func.jacrev(programme)(x)).abs().max())


def traffic(axis: Any) -> float:
    """Difference of the price from the slope of the total."""
    # Two ways from end to end, which share their last link but one.
    links = torch.tensor([[1, 0, 0], [0, 1, 1], [1, 1, 0], [0, 0, 1]], dtype=D)
    ends = torch.ones(1, 3, dtype=D)
    capacity = torch.linspace(0.05, 4, 80, dtype=D) + 1e-3
    rest = torch.tensor([1.0, 1.5, 0.7], dtype=D).expand(80, 3)
    capacities = torch.cat([rest[:, :2], capacity.unsqueeze(1), rest[:, 2:]], 1).requires_grad_()
    demand = torch.full((80, 1), 3.0, dtype=D)
    solution = maximum_flow(capacities, demand, links, ends)
    total, price = -solution.objective, solution.duals.inequality[:, 2]
    (slope,) = torch.autograd.grad(total.sum(), capacities)
    axis.plot(capacity, total.detach(), color="#1d4e89", label="largest flow")
    axis.plot(capacity, price.detach(), color="#c1121f", label="price of the link")
    axis.set(xlabel="capacity of one link", title="traffic")
    axis.legend(fontsize=7)
    return float((slope[:, 2] - price).detach().abs().max())


def main(arguments: list[str] | None = None) -> dict[str, float]:
    """Draw, print and return the errors."""
    from matplotlib.figure import Figure

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", help="the PNG file; without, nothing is drawn")
    output = parser.parse_args(arguments).output
    figure = Figure(figsize=(9.6, 6.0), layout="constrained", facecolor="white")
    panels: Any = figure.subplots(2, 3).flatten()
    systems = (unit_circle, softmax, optnet, argmin, schur, traffic)
    errors = {system.__name__: system(panel) for system, panel in zip(systems, panels, strict=True)}
    for panel in panels:
        panel.title.set_fontsize(9)
    for system in systems:
        print(f"{system.__name__:12s} {errors[system.__name__]:.1e}  {(system.__doc__ or '').strip()}")
    if output:
        figure.savefig(output, dpi=90)
    return errors


if __name__ == "__main__":
    main()
