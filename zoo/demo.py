"""`restpoint demo`: a pretrained equilibrium model reads held-out digits, and shows how hard each was."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..models.deq import ConvDEQ
from ..solvers import Solution, fixed_point
from ..solvers.diagnose import certificate
from . import demo_flow
from .factory import create_model
from .registry import load_card

NAME = "conv_deq_tiny.digits"
SHOWN = 16
MISREAD = 3
BAR = 40
RED = "#c1121f"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demonstration and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="restpoint demo",
        description="Classify held-out digits with a pretrained equilibrium model, draw samples of pretrained flows.",
        epilog="Example:\n  restpoint demo --output digits.png",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("demo.png"),
        help="the picture, or a folder for it (default demo.png); the flows' lies beside it",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of the report")
    options = parser.parse_args(argv)
    # The report is printed as it comes about, for it takes a while.
    with contextlib.redirect_stdout(io.StringIO()) if options.json else contextlib.nullcontext():
        facts = _demonstrate(destination(options.output))
    if options.json:
        print(json.dumps(facts, indent=2))
    return 0


def _demonstrate(output: Path) -> dict[str, Any]:
    card = load_card(NAME)
    model = cast(ConvDEQ, create_model(NAME, pretrained=True).eval())
    inputs, pictures, labels = _held_out()
    _report_model(model)

    _solve(model, inputs[:32])  # the first call pays for what torch sets up
    began = time.perf_counter()
    solution, predictions = _solve(model, inputs)
    seconds = time.perf_counter() - began
    right = predictions == labels
    print(
        f"accuracy     {100 * right.double().mean():.2f} %, {int(right.sum())} of {len(right)} held-out digits", end=""
    )
    print(f" (its card says {100 * card.metrics['accuracy']:.2f} %)")
    print(f"converged    {int(solution.converged.sum())} of {len(right)} to a relative residual of {model.deq.rtol:g}")
    print(f"evaluations  {solution.stats.evaluations.double().mean():.1f} of f a digit")
    print(f"time         {1000 * seconds / len(right):.2f} ms a digit, all {len(right)} in one batch\n")
    steps = solution.stats.steps
    _print_histogram(steps, right)

    shown = _from_easy_to_hard(steps, right)
    _print_certificate(model, inputs, solution, labels, shown[[0, SHOWN // 2, -2, -1]])
    _draw(output, pictures, labels, predictions, steps, _residuals(model, inputs[shown]), shown, model.deq.rtol)
    print(f"\npicture      {output.resolve()}\n")
    flows = output.with_stem(output.stem + "-flows")
    demo_flow.main(flows)
    return {
        "model": NAME,
        "accuracy": float(right.double().mean()),
        "digits": len(right),
        "converged": int(solution.converged.sum()),
        "evaluations": float(solution.stats.evaluations.double().mean()),
        "milliseconds": 1000 * seconds / len(right),
        "pictures": [str(output.resolve()), str(flows.resolve())],
    }


def destination(path: Path) -> Path:
    """Where a picture goes that is asked for at `path`: into it if it is a folder, as .png if it has no ending."""
    if path.is_dir():
        return path / "demo.png"
    return path if path.suffix else path.with_suffix(".png")


def _held_out() -> tuple[Tensor, Tensor, Tensor]:
    """The model's inputs, the images in [0, 1], and the labels."""
    # The data sets belong to training, which is right of the zoo: only this command, when it runs, may know of it.
    from ..train.data import Batches, load_data

    source = load_data("digits")
    inputs, labels = next(iter(Batches(source.test, source.mean, source.std, len(source.test))))
    return inputs, source.test.images[:, 0] / source.test.white, labels


def _solve(model: ConvDEQ, inputs: Tensor) -> tuple[Solution[Tensor], Tensor]:
    with torch.no_grad():
        solution = model.solve(inputs)
        return solution, model.forward_head(solution.value).argmax(dim=1)


def _report_model(model: ConvDEQ) -> None:
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{NAME}: an image is read by iterating one block to its rest point, z = f(z, x)")
    print(f"             {parameters:,} parameters; {type(model.deq.solver).__name__} solver\n")


def _print_histogram(steps: Int[Tensor, " n"], right: Tensor) -> None:
    counts = torch.bincount(steps)
    print("solver steps that a digit took, one evaluation each, and how many of those digits were misread")
    for k in range(int(steps.min()), int(steps.max()) + 1):
        wrong = int((~right[steps == k]).sum())
        bar = "█" * max(round(BAR * int(counts[k]) / int(counts.max())), int(counts[k] > 0))
        print(f"{k:11d}  {bar} {int(counts[k])}" + (f", {wrong} misread" if wrong else ""))
    print(f"       mean  {_mean(steps[right])} for digits read rightly, {_mean(steps[~right])} for those misread\n")


def _mean(values: Tensor) -> str:
    return f"{values.double().mean():.1f}" if len(values) else "none"


def _from_easy_to_hard(steps: Int[Tensor, " n"], right: Tensor) -> Int[Tensor, " shown"]:
    """Digits at evenly spaced ranks of hardness, and among them some that are misread."""
    wrong = (~right).nonzero().flatten()[:MISREAD]
    order = steps.argsort(stable=True)
    order = order[right[order]]
    even = order[torch.linspace(0, len(order) - 1, SHOWN - len(wrong)).round().long()]
    chosen = torch.cat([even, wrong])
    return chosen[steps[chosen].argsort(stable=True)]


def _print_certificate(
    model: ConvDEQ, inputs: Tensor, solution: Solution[Tensor], labels: Tensor, chosen: Int[Tensor, " few"]
) -> None:
    print("is the gradient at these rest points to be trusted? (implicit function theorem, condition by condition)")
    for index in chosen.tolist():
        print(f"  digit {index}: a {int(labels[index])}, {int(solution.stats.steps[index])} steps")
    problem = model.problem(inputs[chosen])
    checked = certificate(
        problem.f, solution.value[chosen], problem.args, generator=torch.Generator().manual_seed(0), tolerance=0.05
    )
    print(checked)


def _residuals(model: ConvDEQ, inputs: Tensor) -> list[Tensor]:
    """The relative residual of every iterate, digit by digit, up to the digit's last."""
    layer = model.deq
    with torch.no_grad():
        problem = model.problem(inputs)
        solution = fixed_point(
            problem.f, problem.z0, problem.args, solver=layer.solver, rtol=layer.rtol, atol=layer.atol,
            max_steps=layer.max_steps, trajectory=True,
        )  # fmt: skip
        assert solution.trajectory is not None
        curves = []
        for z in solution.trajectory:
            image = problem.f(z, *problem.args)
            curves.append((image - z).flatten(1).norm(dim=1) / image.flatten(1).norm(dim=1))
    return [curve[: int(n)] for curve, n in zip(torch.stack(curves, dim=1), solution.stats.steps + 1, strict=True)]


def _draw(
    path: Path,
    pictures: Float[Tensor, "n height width"],
    labels: Tensor,
    predictions: Tensor,
    steps: Int[Tensor, " n"],
    curves: list[Tensor],
    shown: Tensor,
    tolerance: float,
) -> None:
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    low, high = int(steps.min()), int(steps.max())
    right = predictions == labels

    def colour(count: int) -> tuple[float, ...]:
        return tuple(colormaps["viridis_r"](0.08 + 0.87 * (count - low) / max(high - low, 1)))

    figure = Figure(figsize=(12, 7), layout="constrained", facecolor="white")
    panels: Any = figure.subfigures(2, 1, height_ratios=[1, 1.4])
    top, bottom = panels
    top.suptitle(
        "Held-out digits, from easy to hard: what the model reads, and its steps to the rest point", fontsize=13
    )
    grid: Any = top.subplots(2, SHOWN // 2)
    for axis, index in zip(grid.flat, shown.tolist(), strict=True):
        axis.imshow(pictures[index].numpy(), cmap="gray_r", vmin=0, vmax=1)
        axis.set(xticks=[], yticks=[], xlabel=f"{int(steps[index])} steps")
        axis.spines[:].set(color=colour(int(steps[index])), linewidth=3)
        if right[index]:
            axis.set_title(f"{int(predictions[index])}", fontsize=12)
        else:
            title = f"{int(predictions[index])}, not {int(labels[index])}"
            axis.set_title(title, fontsize=12, color=RED, fontweight="bold")

    pair: Any = bottom.subplots(1, 2, width_ratios=[1.35, 1])
    left, middle = pair
    for curve, index in zip(curves, shown.tolist(), strict=True):
        style = {"color": colour(int(steps[index])), "linewidth": 1.8, "marker": "o", "markersize": 3.5}
        left.semilogy(range(len(curve)), curve.numpy(), **style)
    left.axhline(tolerance, color="0.5", linewidth=1, linestyle="--")
    left.text(0, tolerance * 1.15, "tolerance", color="0.4", fontsize=9)
    left.set(
        xlabel="solver steps", ylabel="relative residual  |f(z) - z| / |f(z)|", title="Each digit stops when it is done"
    )

    bins = torch.arange(low, high + 1)
    read, misread = (torch.stack([(steps[part] == k).sum() for k in bins]) for part in (right, ~right))
    middle.bar(bins.numpy(), read.numpy(), color=[colour(int(k)) for k in bins])
    middle.bar(bins.numpy(), misread.numpy(), bottom=read.numpy(), color=RED, label="misread")
    for k, count, wrong in zip(bins.tolist(), read.tolist(), misread.tolist(), strict=True):
        if wrong:
            middle.text(k, count + wrong + 2, f"{wrong} misread", color=RED, fontsize=9, ha="center", va="bottom")
    title = f"{100 * right.double().mean():.2f} % of all {len(labels)} held-out digits are read rightly"
    middle.set(xlabel="solver steps", ylabel="digits", title=title, xticks=bins.tolist())
    for axis in (left, middle):
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
