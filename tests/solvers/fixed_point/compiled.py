"""Solves under torch.compile, run by test_compile.py as a programme of its own: prints what came out as JSON.

In the tests' own process types are checked at every call, and the compiler would trace the checks.
"""

import json
import time
import warnings

import torch

from restpoint.models.deq import DEQ
from restpoint.solvers import Anderson, ImplicitAdjoint, Newton, Picard, UnrollAdjoint, fixed_point, root

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


class Model(torch.nn.Module):
    """Layers around a solve."""

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.cell, self.last = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 2)
        with torch.no_grad():
            self.cell.weight.mul_(0.5)
        self.options = options
        self.step = self.f

    def f(self, z, x):
        return torch.tanh(self.cell(z) + x)

    def forward(self, x):
        x = torch.relu(self.first(x))
        solution = fixed_point(self.step, torch.zeros_like(x), (x,), rtol=1e-5, **self.options)
        return self.last(torch.relu(solution.value))


class Layer(Model):
    """The same with an equilibrium layer."""

    def __init__(self):
        super().__init__()
        self.deq = DEQ(Cell(self.cell), rtol=1e-5)

    def forward(self, x):
        return self.last(torch.relu(self.deq(torch.relu(self.first(x)))))


class Cell(torch.nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, z, x):
        return torch.tanh(self.linear(z) + x)


def gradients(model, run):
    model.zero_grad()
    out = run(X)
    out.square().sum().backward()
    return [out, *(p.grad.clone() for p in model.parameters())]


def compare(model, run, times=2):
    """The largest relative difference to the same model uncompiled, graph breaks and graphs."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    started = time.process_time()
    got = [gradients(model, run) for _ in range(times)]
    seconds = time.process_time() - started
    breaks, graphs = sum(counters["graph_break"].values()), counters["stats"]["unique_graphs"]
    step, model.step = model.step, model.f
    expected = gradients(model, model)
    model.step = step
    error = max(float((a - b).norm() / b.norm()) for some in got for a, b in zip(some, expected, strict=True))
    return {"error": error, "breaks": breaks, "graphs": graphs, "seconds": seconds}


def main():
    results = {}
    model = Model()
    # First of all, while nothing has been called yet.
    results["first"] = compare(model, torch.compile(model, backend="aot_eager"))
    for name, options in {
        "defaults": {},
        "newton": {"solver": Newton()},
        "second order": {"adjoint": ImplicitAdjoint(order=2)},
        "unrolled": {"adjoint": UnrollAdjoint()},
    }.items():
        model = Model(**options)
        results[name] = compare(model, torch.compile(model, backend="aot_eager"))
    model = Model()
    model.step = torch.compile(model.f, backend="aot_eager", dynamic=False)
    results["cell"] = compare(model, model)
    model = Model(solver=Anderson())
    model.step = torch.compile(model.f, backend="aot_eager", dynamic=False)
    results["both"] = compare(model, torch.compile(model, backend="aot_eager"))
    # A trajectory keeps the batch together, so that one size is compiled.
    model = Model(solver=Picard(), trajectory=True)
    model.step = torch.compile(model.f, dynamic=False)
    results["inductor"] = compare(model, model, times=1)

    model = Layer()
    results["layer"] = compare(model, torch.compile(model, backend="aot_eager"))

    @torch.compile(backend="aot_eager")
    def converged(x):
        return fixed_point(lambda z, x: torch.tanh(0.5 * z + x), torch.zeros_like(x), (x,)).converged & True

    results["converged"] = converged(X).tolist()

    @torch.compile(backend="aot_eager")
    def cube_root(x):
        return root(lambda z, x: z**3 - x, torch.ones_like(x), (x,)).value

    x = torch.tensor([[8.0], [27.0]], requires_grad=True)
    value = cube_root(x)
    value.sum().backward()
    exact = torch.tensor([[2.0], [3.0]])
    error = max((value - exact).abs().max(), (x.grad - 1 / (3 * exact**2)).abs().max())
    results["root"] = {"error": float(error.detach())}
    print(json.dumps(results))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    main()
