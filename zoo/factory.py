"""From a name to a model, and from a model to a folder that can be loaded by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models.registry import Architecture
from ..solvers.options import check_integer
from .adapt import transfer
from .cards import Card
from .errors import CheckpointError
from .files import write_atomically
from .registry import LOCAL_CARD, LOCAL_WEIGHTS, Entry, architectures, card_beside, resolve, with_card
from .weights import find_weights, load_state, pack_weights, read_weights

# What pretrained weights are adapted to, and the least that it can be; no classes is no classifier.
ADAPTED = {"num_classes": 0, "in_chans": 1}


@dataclasses.dataclass(frozen=True)
class Blueprint:
    """How `create_model` built a model; it is the model's attribute `blueprint`.

    Attributes:
        architecture: the registered builder's name.
        arguments: what it was called with.
        card: of the pretrained weights it started from, or None.
    """

    architecture: str
    arguments: dict[str, Any]
    card: Card | None = None


def create_model(
    name: str, pretrained: bool = False, *, checkpoint_path: str | Path | None = None, **overrides: Any
) -> nn.Module:
    """Build a model of the zoo.

    Args:
        name: an architecture (`conv_deq_tiny`), an architecture and the tag of its weights (`conv_deq_tiny.digits`), or
            `local-dir:DIR` for what `save_pretrained` wrote. A tag or a folder sets the architecture's arguments, with
            or without weights.
        pretrained: load the weights that the name stands for. Their sha256 is verified at every load.
        checkpoint_path: load these weights, a .safetensors file, instead. Where their card lies beside them, their
            sha256 is verified.
        **overrides: arguments of the architecture. With weights, `num_classes` puts a freshly initialised classifier
            on the pretrained features, `in_chans` adapts the first convolutions (see `adapt_channels`), and solver,
            adjoint and tolerances are free; what changes other shapes is an error.

    Returns:
        The model, in training mode as every new module; its `blueprint` says how it was built.

    Raises:
        UnknownModelError: no such architecture or tag.
        CardError: the card is missing or not valid.
        CheckpointError: the weights are missing, truncated, corrupt, or do not fit.
        TypeError: an override that the architecture does not have.
        ValueError: both `pretrained` and `checkpoint_path` are given, or a number of classes or channels is none.

    Example:
        >>> model = restpoint.create_model("conv_deq_tiny.digits", pretrained=True).eval()
        >>> model = restpoint.create_model("conv_deq_small.mnist", pretrained=True, num_classes=47, in_chans=3)
    """
    for key, least in ADAPTED.items():
        if key in overrides:
            check_integer("create_model: ", key, overrides[key], least)
    if pretrained and checkpoint_path is not None:
        raise ValueError("Give either pretrained=True or checkpoint_path, not both: each names weights to load.")
    if pretrained:
        architecture, card, folders = with_card(name)
        state = read_weights(find_weights(card.weights, folders), card.weights)
        model = _load(architecture, card.arguments, overrides, state, f"The weights of {card.name}")
        return _attach(model, Blueprint(architecture.name, {**card.arguments, **overrides}, card))
    entry = resolve(name)
    arguments = {**(entry.card.arguments if entry.card else {}), **overrides}
    if checkpoint_path is None:
        model = entry.architecture(**arguments)
    else:
        path = Path(checkpoint_path).expanduser()
        beside = card_beside(path)
        state = read_weights(path, beside.weights if beside else None)
        trained = {**arguments, **_read_off(entry, state, overrides)}
        model = _load(entry.architecture, trained, overrides, state, f"The checkpoint {path}")
    return _attach(model, Blueprint(entry.architecture.name, arguments))


def _attach(model: nn.Module, blueprint: Blueprint) -> nn.Module:
    model.blueprint = blueprint  # type: ignore[assignment]
    return model


def _load(
    architecture: Architecture,
    trained: Mapping[str, Any],
    overrides: Mapping[str, Any],
    state: Mapping[str, Tensor],
    source: str,
) -> nn.Module:
    """The model with `overrides`, whose weights come from `state` of a model with the arguments `trained`."""
    free = {key: value for key, value in overrides.items() if key not in ADAPTED}
    model = architecture(**{**trained, **free})
    load_state(model, state, source)
    if "in_chans" in overrides:
        target = architecture(**{**trained, **free, "in_chans": overrides["in_chans"]})
        if _shapes(target) != _shapes(model):
            transfer(model, target)
            model = target
    if "num_classes" in overrides and getattr(model, "num_classes", None) != overrides["num_classes"]:
        if not hasattr(model, "reset_classifier"):
            raise CheckpointError(
                f"{type(model).__name__} has no `reset_classifier`, so its pretrained weights cannot be adapted to "
                f"num_classes={overrides['num_classes']}."
            )
        model.reset_classifier(overrides["num_classes"])  # type: ignore[operator]
    return model


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in model.state_dict().items()}


def _read_off(entry: Entry, state: Mapping[str, Tensor], overrides: Mapping[str, Any]) -> dict[str, int]:
    """The `num_classes` and `in_chans` of a checkpoint without a card, where `overrides` may ask for others."""
    if not {*ADAPTED} & {*overrides}:
        return {}
    kept = {key: value for key, value in overrides.items() if key not in ADAPTED}
    probe = entry.architecture(**{**(entry.card.arguments if entry.card else {}), **kept})
    found: dict[str, int] = {}
    if "num_classes" in overrides and hasattr(probe, "get_classifier"):
        classifier = probe.get_classifier()  # type: ignore[operator]
        weight = _weight(state, next((name for name, module in probe.named_modules() if module is classifier), None))
        if weight is not None:
            found["num_classes"] = weight.shape[0]
    if "in_chans" in overrides:
        weight = _weight(state, next(iter(getattr(probe, "input_layers", ())), None))
        if weight is not None:
            found["in_chans"] = weight.shape[1]
    return found


def _weight(state: Mapping[str, Tensor], layer: str | None) -> Tensor | None:
    # The plain name, then where torch's parametrizations keep the weight itself (weight norm's length comes first).
    names = (
        f"{layer}.weight",
        f"{layer}.parametrizations.weight.original1",
        f"{layer}.parametrizations.weight.original",
    )
    return next((state[name] for name in names if name in state), None)


def save_pretrained(model: nn.Module, directory: str | Path, *, tag: str = "local", **fields: Any) -> Card:
    """Write a model to a folder, from which `create_model("local-dir:DIR", pretrained=True)` gives it back.

    Args:
        model: built by `create_model`.
        directory: made where it does not exist; `model.safetensors` and `card.json` in it are replaced.
        tag: the second half of the card's name.
        **fields: further fields of the `Card`: data, input, labels, metrics, seed, command. Where it is not given,
            `input` is taken over from the card that the model started from if it still has the same channels, and
            `labels` if it still has the same number of classes.

    Raises:
        CheckpointError: the model was not built by `create_model`, or was changed since so that its arguments no
            longer rebuild it.
        CardError: a field or argument that a card cannot hold.
        OSError: the folder cannot be written.
    """
    blueprint = getattr(model, "blueprint", None)
    if not isinstance(blueprint, Blueprint):
        raise CheckpointError(
            f"{type(model).__name__} was not built by create_model, so nothing says how to rebuild it."
        )
    folder = Path(directory).expanduser()
    architecture = architectures()[blueprint.architecture]
    arguments = dict(blueprint.arguments)
    if "num_classes" in architecture.options and hasattr(model, "num_classes"):
        # The user may have called reset_classifier.
        arguments["num_classes"] = model.num_classes
    _check_rebuilds(model, architecture, arguments)
    inherited = {} if blueprint.card is None else _inherited(blueprint.card, arguments)
    content, weights = pack_weights(model, LOCAL_WEIGHTS)
    card = Card(
        name=f"{architecture.name}.{tag}",
        architecture=architecture.name,
        arguments=arguments,
        task=architecture.task,
        weights=weights,
        parameters=sum(p.numel() for p in model.parameters()),
        torch=torch.__version__,
        **{**inherited, **fields},
    )
    # A card that cannot be written must not leave weights behind that belong to none.
    card.to_json()
    write_atomically(folder / LOCAL_WEIGHTS, content)
    card.save(folder / LOCAL_CARD)
    return card


def _inherited(card: Card, arguments: Mapping[str, Any]) -> dict[str, Any]:
    same = {key: card.arguments.get(key) == arguments.get(key) for key in ("in_chans", "num_classes")}
    return ({"input": card.input} if same["in_chans"] else {}) | (
        {"labels": card.labels} if same["num_classes"] else {}
    )


def _check_rebuilds(model: nn.Module, architecture: Architecture, arguments: Mapping[str, Any]) -> None:
    with torch.random.fork_rng(devices=[]):
        rebuilt = architecture(**arguments)
    ours, theirs = _shapes(model), _shapes(rebuilt)
    if ours != theirs:
        differing = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
        raise CheckpointError(
            f"{architecture.name} with the arguments {arguments} does not rebuild this model, which was changed since "
            f"create_model; these tensors differ: {', '.join(differing[:8])}."
        )
