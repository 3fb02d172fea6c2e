"""Model cards: what a checkpoint is, where it came from, and how to know that it is intact."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

from .. import solvers
from ..solvers.options import suggest
from .errors import CardError
from .files import write_atomically
from .sources import to_url

T = TypeVar("T")

NAME = re.compile(r"[a-z][a-z0-9_]*\.[a-z0-9][a-z0-9_-]*")


@dataclasses.dataclass(frozen=True)
class Weights:
    """The file of tensors that belongs to a card.

    Attributes:
        file: its name, in the folder of the card.
        sha256: of its bytes, in lower-case hexadecimal digits.
        size: in bytes.
        source: where the file is to be had if it is not here: its https address, or `hf:OWNER/NAME` or
            `hf:OWNER/NAME@REVISION` for a repository of the Hugging Face hub that holds it; "" for nowhere.
    """

    file: str
    sha256: str
    size: int
    source: str = ""

    def __post_init__(self) -> None:
        # A card may come from anywhere: it must not be able to point outside its folder, or at a pickled file.
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors", self.file):
            raise CardError(f"weights.file must be a bare file name that ends in .safetensors; got {self.file!r}.")
        if not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            raise CardError(f"weights.sha256 must be 64 lower-case hexadecimal digits; got {self.sha256!r}.")
        if self.size <= 0:
            raise CardError(f"weights.size must be a positive number of bytes; got {self.size}.")
        if self.source:
            to_url(self.source, self.file)


@dataclasses.dataclass(frozen=True)
class Data:
    """What a model was trained on.

    Attributes:
        name: of the data set.
        split: which part trained, and which part the metrics were measured on.
        licence: of the data.
        source: who to cite, or where it comes from.
    """

    name: str
    split: str
    licence: str
    source: str = ""


@dataclasses.dataclass(frozen=True)
class ImageInput:
    """How an image becomes an input: scaled to [0, 1], resized to `shape`, then `(image - mean) / std`.

    Attributes:
        shape: channels, height and width.
        mean: one number a channel.
        std: one number a channel.
    """

    shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if min(self.shape) <= 0:
            raise CardError(f"input.shape must be positive; got {list(self.shape)}.")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.shape[0]:
                raise CardError(f"input.{name} must have one number for each of {self.shape[0]} channels.")
        if min(self.std) <= 0:
            raise CardError(f"input.std must be positive; got {list(self.std)}.")


@dataclasses.dataclass(frozen=True)
class Published:
    """A figure that the literature reports for this architecture and data.

    Attributes:
        metric: the key of the card's own `metrics` that it compares with.
        value: in the same unit.
        source: the paper, and its table where it has one.
    """

    metric: str
    value: float
    source: str


@dataclasses.dataclass(frozen=True)
class Card:
    """One pretrained model.

    Attributes:
        name: `architecture.tag`.
        architecture: the registered builder.
        arguments: what the builder was called with.
        task: such as "image-classification".
        weights: the file of tensors.
        parameters: how many numbers were trained.
        torch: the version that trained it.
        data: what it was trained on.
        input: for image models, how an image becomes an input.
        labels: for classifiers, the name of each class in order.
        metrics: measured on the shipped weights: fractions of one, nats or bits as their names say. The first is what
            models of this task are compared by.
        published: what the literature reports.
        seed: of the training run.
        command: the exact command that trained it.
        epochs: how many it was trained for.
        note: what else should be known, such as how far the training went beside the published one.
        picture: the file, in the folder of the card, that shows what the model does; "" for none.
    """

    name: str
    architecture: str
    arguments: dict[str, Any]
    task: str
    weights: Weights
    parameters: int
    torch: str
    data: Data | None = None
    input: ImageInput | None = None
    labels: tuple[str, ...] | None = None
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    published: tuple[Published, ...] = ()
    seed: int | None = None
    command: str = ""
    epochs: int | None = None
    note: str = ""
    picture: str = ""

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name) or self.name.partition(".")[0] != self.architecture:
            raise CardError(f"name must be {self.architecture!r}, a dot and a tag; got {self.name!r}.")
        for metric, value in self.metrics.items():
            if not math.isfinite(value):
                raise CardError(f"metrics.{metric} must be finite; got {value}.")
        for figure in self.published:
            if figure.metric not in self.metrics:
                raise CardError(f"published: {figure.metric!r} is not among the metrics {', '.join(self.metrics)}.")
        if self.picture and not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.png", self.picture):
            raise CardError(f"picture must be a bare file name that ends in .png; got {self.picture!r}.")

    @property
    def tag(self) -> str:
        """The part of the name after the dot."""
        return self.name.partition(".")[2]

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON's types.

        Raises:
            CardError: an argument that a card cannot hold.
        """
        plain = dataclasses.asdict(self)
        plain["arguments"] = {name: _encode(value, name) for name, value in self.arguments.items()}
        return plain

    def to_json(self) -> bytes:
        """The content of a card's file.

        Raises:
            CardError: an argument that a card cannot hold.
        """
        return (json.dumps(self.to_dict(), indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode()

    def save(self, path: str | Path) -> None:
        """Write the card as JSON; the file is replaced whole.

        Raises:
            CardError: an argument that a card cannot hold.
            OSError: the file cannot be written.
        """
        write_atomically(Path(path), self.to_json())

    @classmethod
    def from_dict(cls, plain: Any) -> Card:
        """The card of a dictionary of JSON's types, as a file may hold it.

        Raises:
            CardError: a key that is missing, unknown, or of another type; the message names it.
        """
        card = _decode(cls, plain, "")
        arguments = {name: revive(value, f"arguments.{name}") for name, value in card.arguments.items()}
        return dataclasses.replace(card, arguments=arguments)

    @classmethod
    def load(cls, path: str | Path) -> Card:
        """Read a card.

        Raises:
            CardError: the file is missing, is no JSON, or is no valid card; the message names the file and the key.
        """
        path = Path(path)
        try:
            plain = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise CardError(f"No card at {path}: {error.strerror}.") from error
        except ValueError as error:
            raise CardError(f"The card {path} is not valid JSON: {error}.") from error
        try:
            return cls.from_dict(plain)
        except CardError as error:
            raise CardError(f"The card {path}: {error}") from error


def _decode(kind: Any, value: Any, where: str) -> Any:
    """`value`, made of JSON's types, as the annotated type `kind`."""
    origin, parameters = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(typing.cast(type, kind), value, where)
    if origin is types.UnionType:
        if value is None:
            return None
        return _decode(next(k for k in parameters if k is not types.NoneType), value, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise CardError(f"{where} must be a list; got {value!r}.")
        kinds = parameters[:1] * len(value) if parameters[-1] is Ellipsis else parameters
        if len(kinds) != len(value):
            raise CardError(f"{where} must have {len(kinds)} entries; got {len(value)}.")
        return tuple(_decode(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if origin is dict:
        if not isinstance(value, dict):
            raise CardError(f"{where} must be an object; got {value!r}.")
        return {str(key): _decode(parameters[1], v, f"{where}.{key}") for key, v in value.items()}
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise CardError(f"{where} must be of type {kind.__name__}; got {value!r}.")
    return value


def _decode_dataclass(kind: type[T], value: Any, where: str) -> T:
    prefix = f"{where}." if where else ""
    if not isinstance(value, dict):
        raise CardError(f"{where or 'the card'} must be an object; got {value!r}.")
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for key in value:
        if key not in fields:
            raise CardError(f"unknown key {prefix}{key}.{suggest(key, list(fields))} Its keys: {', '.join(fields)}.")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in value:
            raise CardError(f"the key {prefix}{name} is missing.")
    hints = typing.get_type_hints(kind)
    return kind(**{key: _decode(hints[key], v, f"{prefix}{key}") for key, v in value.items()})


def _encode(value: Any, where: str) -> Any:
    """An argument as JSON's types; a solver's options as an object with its class's name under "$class"."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise CardError(f"the argument {where} = {value} is not finite.")
        return value
    if isinstance(value, list | tuple):
        return [_encode(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, dict):
        if any(not isinstance(key, str) or key.startswith("$") for key in value):
            raise CardError(f"the argument {where} has a key that is no string, or that starts with $.")
        return {key: _encode(v, f"{where}.{key}") for key, v in value.items()}
    kind = type(value)
    if dataclasses.is_dataclass(kind) and getattr(solvers, kind.__name__, None) is kind:
        inner = {f.name: (getattr(value, f.name), f.default) for f in dataclasses.fields(kind) if f.init}
        # A bound that is infinite unless it is said otherwise needs no word, and JSON has none for it.
        said = {
            name: own
            for name, (own, default) in inner.items()
            if not (isinstance(own, float) and own == math.inf == default)
        }
        return {"$class": kind.__name__, **{name: _encode(own, f"{where}.{name}") for name, own in said.items()}}
    raise CardError(
        f"the argument {where} = {value!r} cannot be written on a card, which holds numbers, strings, lists, "
        "dictionaries, and the option classes that restpoint.solvers exports."
    )


def revive(value: Any, where: str) -> Any:
    """The argument that `_encode` wrote; a list comes back as a tuple."""
    if isinstance(value, list):
        return tuple(revive(v, f"{where}[{i}]") for i, v in enumerate(value))
    if not isinstance(value, dict):
        return value
    inner = {key: revive(v, f"{where}.{key}") for key, v in value.items() if key != "$class"}
    if "$class" not in value:
        return inner
    # Only frozen option classes by their public name: a card can ask for no other code to run.
    name = value["$class"]
    kind = getattr(solvers, name, None) if isinstance(name, str) and not name.startswith("_") else None
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        known = sorted(n for n in solvers.__all__ if dataclasses.is_dataclass(getattr(solvers, n)))
        raise CardError(f"{where}: restpoint.solvers exports no option class {name!r}.{suggest(str(name), known)}")
    try:
        return kind(**inner)
    except (TypeError, ValueError) as error:
        raise CardError(f"{where}: {error}") from error
