"""What the zoo knows: the architectures of `restpoint.models`, and the cards of pretrained weights."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import importlib
import pkgutil
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

from .. import models
from ..models.registry import ARCHITECTURES, Architecture
from ..solvers.options import suggest
from .cards import Card
from .errors import CardError, CardWarning, UnknownModelError
from .files import checkpoint_folders

LOCAL = "local-dir:"
LOCAL_CARD = "card.json"
LOCAL_WEIGHTS = "model.safetensors"


@dataclasses.dataclass(frozen=True)
class Entry:
    """What a name stands for.

    Attributes:
        architecture: the registered builder.
        card: of the pretrained weights, or None for a bare architecture.
        folders: where the weights are looked for.
    """

    architecture: Architecture
    card: Card | None
    folders: tuple[Path, ...]


@functools.cache
def _import_models() -> None:
    for module in pkgutil.walk_packages(models.__path__, f"{models.__name__}."):
        importlib.import_module(module.name)


def architectures() -> dict[str, Architecture]:
    """Every registered architecture by name; the first call imports all of `restpoint.models`."""
    _import_models()
    return ARCHITECTURES


def cards() -> dict[str, Card]:
    """Every card in the checkpoint folders by name; the package's own come before the user's.

    One that is not valid, or whose file is not called as it is, is passed over with a `CardWarning`.
    """
    found: dict[str, Card] = {}
    for folder in checkpoint_folders():
        for path in sorted(folder.glob("*.json")):
            try:
                card = _named(path)
            except CardError as error:
                warnings.warn(f"{error} It is passed over.", CardWarning, stacklevel=3)
            else:
                found.setdefault(card.name, card)
    return found


def _named(path: Path) -> Card:
    """The card in a file that has to be called as it is."""
    card = Card.load(path)
    if card.name != path.stem:
        raise CardError(f"The card {path} says that its name is {card.name!r}; call the file {card.name}.json.")
    return card


def card_beside(weights: Path) -> Card | None:
    """The card of a file of weights that lies in its folder; None where there is none."""
    for path in (weights.with_suffix(".json"), weights.with_name(LOCAL_CARD)):
        if path.is_file():
            try:
                card = Card.load(path)
            except CardError as error:
                warnings.warn(f"{error} So {weights.name} is not verified.", CardWarning, stacklevel=3)
            else:
                if card.weights.file == weights.name:
                    return card
    return None


def _pretrained() -> dict[str, Card]:
    """The cards of known architectures whose weights lie where they can be loaded, or can be fetched."""
    folders = checkpoint_folders()
    return {
        name: card
        for name, card in cards().items()
        if card.architecture in architectures()
        and (card.weights.source or any((folder / card.weights.file).is_file() for folder in folders))
    }


def list_models(
    filter: str | Sequence[str] = "*",
    *,
    family: str | None = None,
    task: str | None = None,
    pretrained: bool | None = None,
) -> list[str]:
    """Names for `create_model`, in natural order.

    Args:
        filter: a pattern with the wildcards of a shell, or several of which one must match: "deq*", "*.mnist".
        family: only this family.
        task: only this task.
        pretrained: True for weights (`conv_deq_tiny.digits`), False for bare architectures (`conv_deq_tiny`), None for
            both. Weights are listed only where their file is present or their card says where it is to be had.

    Raises:
        UnknownModelError: no architecture has this family or task.

    Example:
        >>> restpoint.list_models("deq*", pretrained=True)
        ['conv_deq_small.mnist', 'conv_deq_tiny.digits']
    """
    known = architectures()
    for kind, wanted in (("family", family), ("task", task)):
        values = sorted({getattr(architecture, kind) for architecture in known.values()})
        if wanted is not None and wanted not in values:
            raise UnknownModelError(
                f"No model has the {kind} {wanted!r}.{suggest(wanted, values)} There are: {', '.join(values)}."
            )
    names = [] if pretrained is True else list(known)
    names += [] if pretrained is False else list(_pretrained())
    patterns = [filter] if isinstance(filter, str) else list(filter)
    return sorted(
        (
            name
            for name in names
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
            and family in (None, known[name.partition(".")[0]].family)
            and task in (None, known[name.partition(".")[0]].task)
        ),
        key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)],
    )


def _card_in(folder: Path) -> Path:
    """`card.json`, or where there is none the only card, as a training run leaves it under its model's name."""
    others = sorted(folder.glob("*.json"))
    return others[0] if len(others) == 1 else folder / LOCAL_CARD


def resolve(name: str) -> Entry:
    """The architecture and, for `architecture.tag` and `local-dir:DIR`, the card that a name stands for.

    Raises:
        UnknownModelError: no such architecture or tag; the message suggests the closest.
        CardError: the card is missing or not valid.
    """
    if name.startswith(LOCAL):
        folder = Path(name.removeprefix(LOCAL)).expanduser()
        if not folder.is_dir():
            raise CardError(f"{name!r}: there is no folder {folder}.")
        card = Card.load(_card_in(folder))
        return Entry(_architecture(card.architecture), card, (folder,))
    stem, dot, tag = name.partition(".")
    architecture = _architecture(stem, full=name)
    if not dot:
        return Entry(architecture, None, ())
    known = cards()
    if name not in known:
        for folder in checkpoint_folders():
            if (folder / f"{name}.json").is_file():
                # Passed over just now, it says here what is wrong with it.
                _named(folder / f"{name}.json")
        tags = [card.tag for card in known.values() if card.architecture == stem]
        raise UnknownModelError(
            f"{stem} has no weights called {tag!r}.{suggest(tag, tags)} "
            f"It has: {', '.join(f'{stem}.{t}' for t in tags) or 'none'}."
        )
    return Entry(architecture, known[name], checkpoint_folders())


def _architecture(name: str, full: str | None = None) -> Architecture:
    known = architectures()
    if name not in known:
        raise UnknownModelError(
            f"There is no model {full or name!r}.{suggest(name, list(known))} "
            "restpoint.list_models() and `restpoint list` give all names."
        )
    return known[name]


def load_card(name: str) -> Card:
    """The card of pretrained weights.

    Args:
        name: `architecture.tag`, `local-dir:DIR`, or an architecture that has one set of weights.

    Raises:
        UnknownModelError: no such model or tag, or an architecture with no or several sets of weights.
        CardError: the card is missing or not valid.
    """
    return with_card(name)[1]


def with_card(name: str) -> tuple[Architecture, Card, tuple[Path, ...]]:
    """The parts of an `Entry` that has weights; arguments and exceptions as of `load_card`."""
    entry = resolve(name)
    if entry.card is not None:
        return entry.architecture, entry.card, entry.folders
    own = [card for card in cards().values() if card.architecture == name]
    if len(own) == 1:
        return entry.architecture, own[0], checkpoint_folders()
    if own:
        raise UnknownModelError(f"{name} has several weights; name one of {', '.join(card.name for card in own)}.")
    others = ", ".join(sorted(_pretrained())) or "none"
    raise UnknownModelError(f"{name} has no pretrained weights. Models that have: {others}.")
