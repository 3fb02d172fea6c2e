"""The command line: `restpoint list | info | predict | evaluate | results | demo | train`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .. import __version__
from .cards import Card
from .errors import ZooError
from .factory import create_model
from .files import write_atomically
from .parse import Parsed, parse_sentences
from .predict import predict_files
from .registry import architectures, cards, list_models, load_card, resolve
from .results import Use, main_metric, result
from .tables import comma_separated, flatten, markdown, table
from .tag import TASKS as TAGGING
from .tag import Tagged, predict_sentences
from .write import Written, continue_texts

PAGE = """# Results

Made by `restpoint results --write docs --batch {batch} --data-dir DATA_DIR`, as the [CSV](results.csv) of the same
measurement.

- `value` is the model's metric on its test data, as its card says; `published` is what the literature reports.
- `evaluations` of the cell or field are the mean per sample.
- `milliseconds` of processor time per sample, on one thread, in a batch of {batch} test samples, without gradients; of
  use beside each other, for another machine has others.
- `memory` and `memory_backward` are the most MiB of tensors alive at once during that batch, without gradients and in
  a forward and backward pass, beyond the model and its inputs; `memory_growth` is what the latter is multiplied by when
  every solve takes 64 steps instead of 16: 1 if training keeps nothing of them, 2 for their root, 4 if it keeps all.
- `checkpoint` is the size of the weights in KiB.

"""


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
        "classify image files, tag or parse sentences, or continue texts",
        "restpoint predict conv_deq_small.mnist digit.png --top 3",
    )
    sub.add_argument("name", help="architecture.tag, or local-dir:DIR")
    sub.add_argument("files", nargs="+", help="image files; sentences or texts in quotes")
    sub.add_argument("--top", type=_positive, default=1, help="how many classes to give for each (default 1)")
    sub.add_argument("--length", type=_positive, default=300, help="characters to add to a text (default 300)")
    sub.add_argument("--temperature", type=float, default=0.8, help="of what is added, 0 for no chance (default 0.8)")
    sub.add_argument("--seed", type=int, default=0, help="of what is added (default 0)")

    sub = command(
        "evaluate",
        _evaluate,
        "measure a pretrained model on its test data",
        "restpoint evaluate conv_deq_small.mnist --data-dir ~/data",
    )
    sub.add_argument("name", help="architecture.tag, or local-dir:DIR")
    sub.add_argument("--data-dir", help="where the data set lies; not needed for data that a dependency ships")

    sub = command(
        "picture",
        _picture,
        "draw what a pretrained model does on its test data, as its card's picture shows it",
        "restpoint picture conv_deq_small.mnist --data-dir ~/data --output mnist.png",
    )
    sub.add_argument("name", help="architecture.tag, or local-dir:DIR")
    sub.add_argument("--data-dir", help="where the data set lies; not needed for data that a dependency ships")
    sub.add_argument("--output", type=Path, help="the PNG file, or a folder for it (default NAME.png)")

    sub = command(
        "results",
        _results,
        "tabulate what pretrained models reach and cost, measured on this machine",
        "restpoint results --data-dir ~/data --write docs",
    )
    sub.add_argument("filter", nargs="*", default=["*"], help="patterns such as 'deq*' or '*.mnist'; one must match")
    sub.add_argument("--data-dir", help="where the data sets lie; without them time and memory stay empty")
    sub.add_argument("--batch", type=_positive, default=64, help="samples in the measured batch (default 64)")
    form = sub.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="print a page of Markdown instead")
    form.add_argument("--csv", action="store_true", help="print CSV instead, numbers in full")
    form.add_argument("--write", type=Path, metavar="DIR", help="write both to DIR, results.md and results.csv")

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
        metric = main_metric(card) if card else None
        row: dict[str, Any] = {
            "name": name,
            "family": architecture.family,
            "task": architecture.task,
            "data": card.data.name if card and card.data else None,
            "parameters": card.parameters if card else None,
        }
        if options.json:
            row["metrics"] = card.metrics if card else None
        else:
            # All of them would not fit a terminal; `info` has them.
            row["metric"] = {metric: card.metrics[metric]} if card and metric else None
        rows.append(row)
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
    else:
        facts["pretrained"] = [name for name, card in cards().items() if card.architecture == entry.architecture.name]
    if options.json:
        print(json.dumps(facts, indent=2))
        return 0
    lines = [line for line in flatten(facts) if line[1] not in ("", "-")]
    width = max(len(key) for key, _ in lines)
    print("\n".join(f"{key.ljust(width)}  {value}" for key, value in lines))
    return 0


def _predict(options: argparse.Namespace) -> int:
    card = load_card(options.name)
    model = create_model(options.name, pretrained=True).eval()
    if card.task in TAGGING:
        return _tag(predict_sentences(model, card, options.files), options.json)
    if card.task == "parsing":
        return _parse(parse_sentences(model, card, options.files), options.json)
    if card.task == "language-modelling":
        how = {"length": options.length, "temperature": options.temperature, "seed": options.seed}
        return _write(continue_texts(model, card, options.files, **how), options.json)
    results = list(predict_files(model, card, options.files, top=options.top))
    if options.json:
        print(json.dumps([dataclasses.asdict(r) for r in results], indent=2))
    else:
        answers = [
            {"file": r.file} | {f"{i + 1}.": f"{r.labels[i]} ({r.probabilities[i]:.1%})" for i in range(len(r.labels))}
            for r in results
            if r.error is None
        ]
        if answers:
            print(table(answers))
    failed = [r for r in results if r.error is not None]
    for r in failed:
        print(f"restpoint: {r.file}: {r.error}", file=sys.stderr)
    if failed:
        print(f"restpoint: {len(failed)} of {len(results)} files were skipped", file=sys.stderr)
    return 1 if failed else 0


def _tag(results: Sequence[Tagged], as_json: bool) -> int:
    if as_json:
        print(json.dumps([dataclasses.asdict(r) for r in results], indent=2))
        return 0
    for r in results:
        rows = zip(r.words, r.tags, r.probabilities, strict=True)
        print(table([{"word": word, "tag": tag, "probability": f"{share:.1%}"} for word, tag, share in rows]))
    return 0


def _parse(results: Sequence[Parsed], as_json: bool) -> int:
    if as_json:
        print(json.dumps([dataclasses.asdict(r) for r in results], indent=2))
    else:
        print("\n\n".join(r.drawn() for r in results))
    return 0


def _write(results: Sequence[Written], as_json: bool) -> int:
    if as_json:
        print(json.dumps([dataclasses.asdict(r) for r in results], indent=2))
        return 0
    for r in results:
        print(r.text + r.continuation)
    return 0


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
        card = load_card(options.name)
        print(table([{"metric": key, "value": value, "card": card.metrics.get(key)} for key, value in results.items()]))
        if card.torch != torch.__version__:
            print(f"The card's figures are of torch {card.torch}; this is {torch.__version__}.", file=sys.stderr)
    return 0


def _picture(options: argparse.Namespace) -> int:
    from ..train.data import DataError
    from ..train.picture import picture, to_png

    file = f"{load_card(options.name).name}.png"
    path = options.output or Path(file)
    path = path / file if path.is_dir() else path
    try:
        figure = picture(options.name, options.data_dir)
    except DataError as error:
        raise ZooError(str(error)) from error
    if figure is None:
        raise ZooError(f"There is no picture of {options.name}: its task draws none.")
    write_atomically(path, to_png(figure))
    print(json.dumps({"picture": str(path)}) if options.json else f"wrote {path}")
    return 0


def _results(options: argparse.Namespace) -> int:
    names = list_models(options.filter, pretrained=True)
    if not names:
        print(f"restpoint: no pretrained model matches {' '.join(options.filter)}", file=sys.stderr)
        return 1
    rows = []
    for name in tqdm(names, desc="measuring", disable=None, leave=False):
        card = load_card(name)
        batch, use = _test_batch(card, options.data_dir, options.batch)
        rows.append(dataclasses.asdict(result(card, batch, use)))
    if options.json:
        print(json.dumps(rows, indent=2))
    elif options.csv:
        print(comma_separated(rows), end="")
    elif options.markdown:
        print(PAGE.format(batch=options.batch) + markdown(rows), end="")
    elif options.write:
        options.write.mkdir(parents=True, exist_ok=True)
        (options.write / "results.md").write_text(PAGE.format(batch=options.batch) + markdown(rows), encoding="utf-8")
        (options.write / "results.csv").write_text(comma_separated(rows), encoding="utf-8")
    else:
        print(table(rows))
    return 0


def _test_batch(card: Card, data_dir: str | None, count: int) -> tuple[Any, Use | None]:
    """The first `count` examples of a card's test data, and how its model is used.

    Where the data are not here it is None, with a line that says so.
    """
    from ..train.data import DataError
    from ..train.evaluate import first_batch, task_of

    try:
        model = create_model(card.name, pretrained=True)
        return first_batch(model, data_dir, count), task_of(model).use
    except DataError as error:
        print(f"restpoint: {card.name} is not measured: {error}", file=sys.stderr)
        return None, None


if __name__ == "__main__":
    sys.exit(main())
