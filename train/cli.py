"""The command `restpoint-train`."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..solvers.options import suggest
from ..zoo.errors import ZooError
from .config import Config
from .data import DataError
from .errors import Interrupted, TrainingError
from .evaluate import TASKS
from .loop import train
from .parallel import leave

RECIPES = Path(__file__).parent / "recipes"

DESCRIPTION = """Train a model as a recipe says, and export it for the zoo.

example: restpoint-train --config conv_deq_tiny_digits.yaml --optimizer.lr 0.002 --output runs/mine

A recipe is a YAML file; those of the package are found by their file name. Every key of a recipe can be overridden
by an option with dots, and --print-config shows what results. --json prints the metrics as JSON at the end; the log
goes to stderr."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the arguments, train, and return the exit status: 0, or 2 where the message on stderr says what to mend."""
    arguments = [_spell(a) for a in (sys.argv[1:] if argv is None else argv)]
    as_json = "--json" in arguments
    # Under torchrun the first process speaks for all, and every one of its own troubles.
    first = os.environ.get("RANK", "0") == "0"
    arguments = _find_recipes([a for a in arguments if a != "--json"])
    try:
        config = parse(arguments)
    except UsageError as error:
        if first:
            print(f"restpoint-train: {error}", file=sys.stderr)
        return 2
    level = logging.INFO if first else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    try:
        metrics = train(config, command_line(arguments))
    except Interrupted as error:
        print(f"restpoint-train: {error}", file=sys.stderr)
        return leave(128 + error.signal)
    except (TrainingError, DataError, ZooError, OSError) as error:
        print(f"restpoint-train: {error}", file=sys.stderr)
        return leave(2)
    if as_json and first:
        print(json.dumps(metrics, indent=2))
    return leave(0)


class UsageError(Exception):
    """Arguments or a recipe that do not fit; the message suggests what was meant."""


def parse(arguments: Sequence[str]) -> Config:
    """The `Config` of command-line arguments.

    Raises:
        UsageError: an option or a key that does not exist, or a value of another type.
    """
    from jsonargparse import ArgumentError, ArgumentParser
    from yaml import YAMLError

    parser = ArgumentParser(
        prog="restpoint-train", description=DESCRIPTION, exit_on_error=False, allow_abbrev=False,
        formatter_class=_formatter(),
    )  # fmt: skip
    parser.add_argument("--config", action="config", help="a recipe: a YAML file, or the name of one of the package's")
    parser.add_class_arguments(Config)
    try:
        values = parser.instantiate(parser.parse_args(list(arguments)))
    except ArgumentError as error:
        raise UsageError(_with_suggestion(str(error))) from None
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        raise UsageError(f"--config: the recipe cannot be read, it is no YAML file: {error}") from None
    return Config(**{field.name: values[field.name] for field in dataclasses.fields(Config)})


def command_line(arguments: Sequence[str]) -> str:
    """The command with these arguments as others can repeat it: without the places that were this machine's own."""
    kept, skip = [], False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if skip:
            skip = False
        elif name in ("--output", "--resume"):
            skip = not equals
        elif name == "--data_dir":
            skip = not equals
            kept += ["--data-dir", "DATA_DIR"]
        else:
            prefix = "--config=" if name == "--config" and equals else ""
            path = argument.removeprefix(prefix)
            kept.append(prefix + Path(path).name if path.endswith((".yaml", ".yml")) else argument)
    return shlex.join(["restpoint-train", *kept])


def _spell(argument: str) -> str:
    """Options may be written with hyphens."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}"


def _find_recipes(arguments: Sequence[str]) -> list[str]:
    found = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        name = argument.removeprefix("--config=")
        is_recipe = before == "--config" or name != argument
        if is_recipe and not Path(name).exists():
            shipped = RECIPES / name
            if not shipped.is_file():
                known = sorted(p.name for p in RECIPES.glob("*.yaml"))
                raise SystemExit(
                    f"restpoint-train: there is no recipe {name}.{suggest(name, known)} Recipes: {', '.join(known)}."
                )
            argument = argument.removesuffix(name) + str(shipped)
        found.append(argument)
    return found


def _known_keys(kind: Any = Config) -> set[str]:
    keys = set()
    for field in dataclasses.fields(kind):
        keys.add(field.name)
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        if dataclasses.is_dataclass(default):
            keys |= _known_keys(default)
    return keys


def _with_suggestion(message: str) -> str:
    known = _known_keys()
    for task in TASKS.values():
        known |= _known_keys(type(task))
    unknown = re.search(r"(?:option|Option|key) '([\w.]+)' |option '([\w.]+)'|arguments: --([\w.]+)", message)
    path = next(filter(None, unknown.groups()), "") if unknown else ""
    name = next((part for part in path.split(".") if part not in known), "")
    if name:
        return f"{message}{suggest(name, sorted(known))}"
    chosen = re.search(r"import path string: (\w+)|task.*?([A-Z]\w+)", message) if 'key "task"' in message else None
    if chosen:
        names = sorted(type(task).__name__ for task in TASKS.values())
        return f"{message}.{suggest(chosen[1] or chosen[2], names)} There are: {', '.join(names)}."
    stray = re.search(r"arguments: (\S+\.ya?ml)", message)
    return f"{message}. A recipe is given as --config {stray[1]}" if stray else message


def _formatter() -> Any:
    from jsonargparse import DefaultHelpFormatter

    class Formatter(DefaultHelpFormatter):
        """Keeps the lines of the description."""

        def _fill_text(self, text: str, width: int, indent: str) -> str:
            return "\n".join(indent + line for line in text.splitlines())

    return Formatter
