"""What each adjoint's gradient is worth and what it costs, side by side."""

from __future__ import annotations

import dataclasses
import importlib
import math
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..adjoint import (
    Adjoint,
    CheckpointAdjoint,
    ImplicitAdjoint,
    JacobianFreeAdjoint,
    PhantomAdjoint,
    ReversibleAdjoint,
    UnrollAdjoint,
)
from ..fixed_point import Anderson, Broyden, FixedPointSolver, Picard, fixed_point
from ..fixed_point.api import AnyAdjoint
from ..linear import GMRES, LU, Neumann
from ..options import require
from ..solution import Solution, SolverError
from .memory import peak_memory
from .recording import leaves_of, problem_of, sign_vectors, with_gradients
from .reference import reference_gradients
from .table import format_table, number, size

DENSE_SIZE = 512
COLOUR = "#4c72b0"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What `compare_adjoints` measured; `str()` of it is a table.

    Attributes:
        rows: one an adjoint, with the keys
            adjoint: its name;
            solver: the forward solver, as text;
            residual: of the worst sample at the end of the forward solve;
            error: |g - g*| / |g*| over all gradients together, g* the converged float64 reference;
            cosine: of the angle between g and g*;
            memory: peak bytes of the forward and the backward pass;
            forward: evaluations of f in the forward pass;
            backward: evaluations of f in the backward pass, and derivative products with it;
            seconds: forward and backward pass together, of one process's CPU time, on CUDA of the clock;
            note: warnings and errors, or an empty string.
            Where an adjoint failed, its numbers are NaN.
    """

    rows: tuple[dict[str, Any], ...]

    def __str__(self) -> str:
        header = ("adjoint", "error", "cosine", "memory", "forward", "backward", "seconds", "residual", "solver")
        body, notes = [], []
        for row in self.rows:
            mark = ""
            if row["note"]:
                notes.append(row["note"])
                mark = f" [{len(notes)}]"
            cells = [number(row["error"]), f"{row['cosine']:.6f}", size(row["memory"]), f"{row['forward']:.0f}"]
            cells += [f"{row['backward']:.0f}", number(row["seconds"]), number(row["residual"])]
            body.append([row["adjoint"] + mark, *cells, row["solver"].partition("(")[0]])
        return "\n".join([format_table(header, body), *[f"[{i}] {note}" for i, note in enumerate(notes, 1)]])

    def plot(self, path: str | Path) -> None:
        """Draw error, peak memory and time of each adjoint as bars, into the image file `path`.

        Raises:
            ImportError: matplotlib is not installed.
        """
        # Found by name and only here: the solvers need torch alone.
        figure = importlib.import_module("matplotlib.figure").Figure(figsize=(11, 0.4 * len(self.rows) + 1.4))
        names = [row["adjoint"] for row in self.rows]
        panels = (
            ("relative error of the gradient", "error", 1.0),
            ("peak memory (MiB)", "memory", 2.0**-20),
            ("time (ms)", "seconds", 1e3),
        )
        for axes, (title, key, unit) in zip(figure.subplots(1, len(panels), sharey=True), panels, strict=True):
            places = [i for i, row in enumerate(self.rows) if math.isfinite(row[key]) and row[key] > 0]
            values = [self.rows[i][key] * unit for i in places]
            if key == "error":
                # A bar on a logarithmic axis has no foot, so points.
                axes.semilogx(values, places, "o", color=COLOUR)
            else:
                axes.barh(places, values, height=0.6, color=COLOUR)
            axes.set_title(title, fontsize=10)
            axes.grid(axis="x", alpha=0.3)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_yticks(range(len(names)), names)
        # The axes share their places: turning one turns all.
        axes.invert_yaxis()
        figure.tight_layout()
        figure.savefig(path, dpi=130)


def compare_adjoints(
    f: Callable[..., Any],
    z0: Any,
    args: tuple[Any, ...] | list[Any] = (),
    *,
    adjoints: Mapping[str, AnyAdjoint] | None = None,
    solver: FixedPointSolver | None = None,
    loss: Callable[[Any], Tensor] | None = None,
    rtol: float = 1e-4,
    atol: float = 0.0,
    max_steps: int = 50,
    repeats: int = 3,
    generator: torch.Generator | None = None,
) -> Comparison:
    """Differentiate one fixed point by several adjoints, and measure each against a converged float64 reference.

    The gradients are those of the loss by every floating-point tensor in `args` and every leaf that `f` closes over
    and that requires grad, such as a module's parameters. Their `.grad` is left alone.

    The reference is the rest point near that of `z0` to a residual of 1e-12, and its implicit gradient, with `f`, its
    arguments, and the parameters and buffers that it reaches turned to float64 for as long as that takes. It must
    exist: a `f` without a rest point has nothing to compare with.

    Args:
        f: takes the state and `args`, as in `fixed_point`.
        z0: initial value, (batch, ...) tensors.
        args: passed on to `f`.
        adjoints: what to compare, by name; None compares the implicit adjoint with GMRES, Neumann and (for states of
            at most 512 numbers) LU, Broyden's inverse reused (SHINE), the phantom and Jacobian-free gradients, and
            those of unrolled, checkpointed and reversible iteration.
        solver: the forward solver; None takes Anderson(). An adjoint that needs another one gets it: Broyden() for
            reuse, Picard(0.5) for the reversible.
        loss: maps the state to a scalar; None takes the inner product with random signs.
        rtol: as in `fixed_point`, for the adjoints that are compared.
        atol: likewise.
        max_steps: likewise.
        repeats: timed runs an adjoint, of which the fastest counts.
        generator: of the random signs of the default loss.

    Returns:
        The `Comparison`.

    Raises:
        SolverError: the reference does not converge.
        TypeError: `f` cannot be evaluated in float64, the message says what to do; or `adjoints` are none.
        ValueError: nothing requires grad, or repeats is below 1.
    """
    if repeats < 1:
        raise ValueError(f"compare_adjoints: repeats must be at least 1; got {repeats}.")
    problem, matrix = problem_of(f, z0, args, root=False)
    if adjoints is not None and not isinstance(adjoints, Mapping):
        raise TypeError(
            "compare_adjoints: adjoints must be a dictionary, of a name for each; got "
            f"{type(adjoints).__name__}. For example adjoints={{'implicit': ImplicitAdjoint()}}."
        )
    chosen = _default(matrix.shape[1]) if adjoints is None else dict(adjoints)
    for name, adjoint in chosen.items():
        require(adjoint, (Adjoint, CheckpointAdjoint, ReversibleAdjoint), f"adjoints[{name!r}]")
    solver = Anderson() if solver is None else solver
    require(solver, FixedPointSolver, "solver")
    if loss is None:
        loss = _random_functional(problem.spec.unflatten(matrix.detach()), generator)
    inputs = with_gradients(tuple(args))
    with torch.enable_grad():
        image = pytree.tree_leaves(f(problem.spec.unflatten(matrix.detach()), *inputs))
    leaves = leaves_of(image)
    if not leaves:
        raise ValueError("compare_adjoints: f depends on nothing that could be differentiated.")
    held = {id(t) for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor)}
    shared = [leaf for leaf in leaves if id(leaf) not in held]
    reference = reference_gradients(f, z0, args, shared, loss)
    rows = []
    for name, adjoint in chosen.items():
        run = _Run(f, z0, args, shared, loss, adjoint, _suited(adjoint, solver), (rtol, atol, max_steps))
        rows.append({"adjoint": name, **run.measure(reference, matrix.device, repeats)})
    return Comparison(tuple(rows))


def _default(size: int) -> dict[str, AnyAdjoint]:
    direct: dict[str, AnyAdjoint] = {"implicit (LU)": ImplicitAdjoint(LU())} if size <= DENSE_SIZE else {}
    return {
        **direct,
        "implicit (GMRES)": ImplicitAdjoint(GMRES()),
        "implicit (Neumann)": ImplicitAdjoint(Neumann()),
        "SHINE": ImplicitAdjoint(reuse="only"),
        "phantom (5 steps)": PhantomAdjoint(),
        "Jacobian-free": JacobianFreeAdjoint(),
        "unroll": UnrollAdjoint(),
        "checkpoint": CheckpointAdjoint(),
        "reversible": ReversibleAdjoint(),
    }


def _suited(adjoint: AnyAdjoint, solver: FixedPointSolver) -> FixedPointSolver:
    """The solver, or the one that the adjoint cannot do without."""
    if isinstance(adjoint, ReversibleAdjoint) and not (isinstance(solver, Picard) and solver.damping < 1):
        return Picard(0.5)
    if isinstance(adjoint, ImplicitAdjoint) and adjoint.reuse is not None and not isinstance(solver, Broyden):
        return Broyden()
    return solver


def _random_functional(state: Any, generator: torch.Generator | None) -> Callable[[Any], Tensor]:
    signs = [sign_vectors(t, generator) for t in pytree.tree_leaves(state)]

    def functional(z: Any) -> Tensor:
        terms = [(t * s.to(t.dtype)).sum() for t, s in zip(pytree.tree_leaves(z), signs, strict=True)]
        return torch.stack(terms).sum()

    return functional


@dataclasses.dataclass(frozen=True)
class _Run:
    """One adjoint's forward and backward pass."""

    f: Callable[..., Any]
    z0: Any
    args: tuple[Any, ...] | list[Any]
    shared: list[Tensor]
    loss: Callable[[Any], Tensor]
    adjoint: AnyAdjoint
    solver: FixedPointSolver
    budget: tuple[float, float, int]

    def gradients(self, f: Callable[..., Any], between: Callable[[], None]) -> tuple[list[Tensor], Solution[Any]]:
        """The gradients by args and by what is shared; `between` is called between the two passes."""
        rtol, atol, max_steps = self.budget
        args = with_gradients(tuple(self.args))
        with torch.enable_grad():
            solution = fixed_point(
                f, self.z0, args, solver=self.solver, adjoint=self.adjoint, rtol=rtol, atol=atol, max_steps=max_steps
            )
            between()
            value = self.loss(solution.value).sum()
            return gradients_by(value, args, self.shared), solution

    def measure(self, reference: list[Tensor], device: torch.device, repeats: int) -> dict[str, Any]:
        """The row of the table, less its name."""
        row = dict.fromkeys(("residual", "error", "cosine", "memory", "forward", "backward", "seconds"), math.nan)
        counter = _Counter(self.f)
        found: list[Any] = []

        def plainly() -> None:
            self.gradients(self.f, lambda: None)

        def once() -> None:
            gradients, solution = self.gradients(counter, counter.turn)
            found.extend((gradients, solution.stats.residual))

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                row["memory"] = peak_memory(plainly, device)
                once()
                row["seconds"] = min(_seconds(plainly, device) for _ in range(repeats))
            except SolverError as error:
                return {**row, "solver": repr(self.solver), "note": str(error)}
        g, g_ref = (torch.cat([t.double().flatten() for t in gradients]) for gradients in (found[0], reference))
        row.update(
            residual=float(found[1].max()),
            error=float((g - g_ref).norm() / g_ref.norm()),
            cosine=float(torch.dot(g, g_ref) / (g.norm() * g_ref.norm())),
            forward=counter.forward,
            backward=counter.backward,
        )
        notes = dict.fromkeys(str(warning.message) for warning in caught)
        return {**row, "solver": repr(self.solver), "note": " ".join(notes)}


def gradients_by(value: Tensor, args: tuple[Any, ...], shared: list[Tensor]) -> list[Tensor]:
    """Gradients of a scalar by the tensors of `args` that require grad, and by `shared`; zero where there is none."""
    inputs = [t for t in pytree.tree_leaves(args) if isinstance(t, Tensor) and t.requires_grad]
    return list(torch.autograd.grad(value, [*inputs, *shared], materialize_grads=True, allow_unused=True))


class _Counter:
    """f, counting its evaluations before and after `turn`, and the derivative products that pass through it."""

    def __init__(self, f: Callable[..., Any]) -> None:
        self.f = f
        self.forward = self.backward = 0
        self.turned = False

    def turn(self) -> None:
        """From here on it is the backward pass."""
        self.turned = True

    def __call__(self, *args: Any) -> Any:
        if self.turned:
            self.backward += 1
        else:
            self.forward += 1
        out = self.f(*args)
        first = pytree.tree_leaves(out)[0]
        if isinstance(first, Tensor) and first.requires_grad:
            first.register_hook(self._product)
        return out

    def _product(self, gradient: Tensor) -> None:
        self.backward += 1


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        begin = time.perf_counter()
        run()
        torch.cuda.synchronize(device)
        return time.perf_counter() - begin
    begin = time.process_time()
    run()
    return time.process_time() - begin
