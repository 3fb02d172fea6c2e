"""The command line: `restpoint list | info | predict | evaluate | demo | train`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from .. import __version__
from .errors import ZooError
from .factory import create_model
from .predict import predict_files
from .registry import architectures, cards, list_models, load_card, resolve


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status: 0, 1 where something failed, 2 for a wrong call.

    Args:
        argv: the arguments after the program's name; by default the process's own.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        status = _run(arguments)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough; Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ZooError, OSError) as error:
        # What a user can mend is one line; anything else is a defect and keeps its traceback.
        print(f"restpoint: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _run(arguments: list[str]) -> int:
    if arguments[:1] == ["demo"]:
        from .demo import main as demo

        return int(demo(arguments[1:]) or 0)
    if arguments[:1] == ["train"]:
        # Training is right of the zoo: only its command, when it is called, may know of it.
        from ..train.cli import main as train

        return int(train(arguments[1:]) or 0)
    options = _parser().parse_args(arguments)
    return int(options.run(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="restpoint",
        description="Implicit models for PyTorch: list, inspect, try, evaluate and train them.",
        epilog="Every command has --help with an example.",
    )
    parser.add_argument("--version", action="version", version=f"restpoint {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], summary: str, *examples: str) -> Any:
        lines = "\n".join(f"  {example}" for example in examples)
        sub = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=f"Example:\n{lines}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=run)
        sub.add_argument("--json", action="store_true", help="print JSON instead of a table")
        return sub

    sub = command("list", _list, "list the models", "restpoint list 'deq*' --pretrained")
    sub.add_argument("filter", nargs="*", default=["*"], help="patterns such as 'deq*' or '*.mnist'; one must match")
    sub.add_argument("--family", help="only this family")
    sub.add_argument("--task", help="only this task")
    sub.add_argument("--pretrained", action="store_true", default=None, help="only what has weights")

    sub = command("info", _info, "show what a model is and where it comes from", "restpoint info conv_deq_tiny.digits")
    sub.add_argument("name", help="an architecture, architecture.tag, or local-dir:DIR")

    sub = command(
        "predict",
        _predict,
        "classify image files",
        "restpoint predict conv_deq_small.mnist digit.png --top 3",
    )
    sub.add_argument("name", help="architecture.tag, or local-dir:DIR")
    sub.add_argument("files", nargs="+", help="image files")
    sub.add_argument("--top", type=_positive, default=1, help="how many classes to give for each (default 1)")

    sub = command(
        "evaluate",
        _evaluate,
        "measure a pretrained model on its test data",
        "restpoint evaluate conv_deq_small.mnist --data-dir ~/data",
    )
    sub.add_argument("name", help="architecture.tag, or local-dir:DIR")
    sub.add_argument("--data-dir", help="where the data set lies; not needed for data that a dependency ships")

    for name, summary in (
        ("demo", "classify handwritten digits and draw how"),
        ("train", "train or fine-tune a model"),
    ):
        commands.add_parser(name, help=summary, add_help=False)
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {number}")
    return number


def _list(options: argparse.Namespace) -> int:
    names = list_models(options.filter, family=options.family, task=options.task, pretrained=options.pretrained)
    known = cards()
    rows = []
    for name in names:
        architecture, card = architectures()[name.partition(".")[0]], known.get(name)
        rows.append(
            {
                "name": name,
                "family": architecture.family,
                "task": architecture.task,
                "data": card.data.name if card and card.data else None,
                "parameters": card.parameters if card else None,
                "metrics": card.metrics if card else None,
            }
        )
    if options.json:
        print(json.dumps(rows, indent=2))
    elif rows:
        print(table(rows))
    else:
        print(f"restpoint: no model matches {' '.join(options.filter)}", file=sys.stderr)
    return 0 if rows else 1


def _info(options: argparse.Namespace) -> int:
    entry = resolve(options.name)
    facts: dict[str, Any] = {
        "name": entry.card.name if entry.card else entry.architecture.name,
        "family": entry.architecture.family,
        "task": entry.architecture.task,
        "summary": entry.architecture.summary,
        "options": list(entry.architecture.options),
    }
    if entry.card:
        facts |= entry.card.to_dict()
    if options.json:
        print(json.dumps(facts, indent=2))
        return 0
    lines = _flatten({key: value for key, value in facts.items() if value not in (None, "", {}, [], ())})
    width = max(len(key) for key, _ in lines)
    print("\n".join(f"{key.ljust(width)}  {value}" for key, value in lines))
    return 0


def _predict(options: argparse.Namespace) -> int:
    card = load_card(options.name)
    model = create_model(options.name, pretrained=True).eval()
    results = list(predict_files(model, card, options.files, top=options.top))
    if options.json:
        print(json.dumps([dataclasses.asdict(result) for result in results], indent=2))
    else:
        answers = [
            {"file": r.file} | {f"{i + 1}.": f"{r.labels[i]} ({r.probabilities[i]:.1%})" for i in range(len(r.labels))}
            for r in results
            if r.error is None
        ]
        if answers:
            print(table(answers))
    failed = [result for result in results if result.error is not None]
    for result in failed:
        print(f"restpoint: {result.file}: {result.error}", file=sys.stderr)
    return 1 if failed else 0


def _evaluate(options: argparse.Namespace) -> int:
    from ..train.data import DataError
    from ..train.evaluate import evaluate_model

    try:
        results = evaluate_model(options.name, data_dir=options.data_dir)
    except DataError as error:
        raise ZooError(str(error)) from error
    if options.json:
        print(json.dumps(results, indent=2))
    else:
        print(table([{"metric": key, "value": value} for key, value in results.items()]))
    return 0


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows with the same keys as aligned columns: numbers to the right, text to the left, None as a dash."""
    columns = list(rows[0])
    cells = [columns] + [[_cell(row[column]) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    numeric = [all(isinstance(row[c], int | float | None) for row in rows) for c in columns]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in cells
    )


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_cell(inner)}" for key, inner in value.items()) or "-"
    if isinstance(value, list | tuple):
        return ", ".join(_cell(inner) for inner in value) or "-"
    return str(value)


def _flatten(value: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    lines: list[tuple[str, str]] = []
    for key, inner in value.items():
        if isinstance(inner, dict):
            lines += _flatten(inner, f"{prefix}{key}.")
        else:
            lines.append((f"{prefix}{key}", _cell(inner)))
    return lines


if __name__ == "__main__":
    sys.exit(main())
