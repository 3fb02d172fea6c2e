"""The zoo's image classifiers under timm's roof: importing this module makes their names known to `timm.create_model`.

    import timm
    import restpoint.zoo.timm_bridge

    model = timm.create_model("restpoint_conv_deq_small", pretrained=True, num_classes=10)
    timm.list_models("restpoint*", pretrained=True)

Names are those of the zoo after `restpoint_`, with the same tags; keywords are the architecture's options. What comes
is the zoo's own model, built and loaded by the zoo's own `create_model`: its weights are verified, and head and input
channels adapted, before timm sees it. Weights of one's own come by `checkpoint_path=PATH`, or, with their description,
by `pretrained=True, pretrained_cfg_overlay={"file": PATH}`; both adapt them, too.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from timm.models._features import FeatureGetterNet
from torch import nn

from ..models.registry import Architecture
from .adapt import adapt_channels
from .cards import Card
from .errors import CheckpointError, UnknownModelError
from .factory import create_model
from .files import checkpoint_folders
from .registry import LOCAL_WEIGHTS, architectures, cards, resolve
from .sources import to_url

PREFIX = "restpoint_"
TASK = "image-classification"
# What timm's own scripts pass to every model, at the values that change nothing.
NEUTRAL: dict[str, Any] = {"drop_rate": 0.0, "drop_path_rate": 0.0, "global_pool": "avg"}

__all__: list[str] = []
default_cfgs: dict[str, Any] = {}


def register() -> list[str]:
    """Make every image classifier of the zoo known to timm that is not yet; importing this module calls it.

    Returns:
        The names that are new.
    """
    known = cards()
    new = [a for a in architectures().values() if a.task == TASK and PREFIX + a.name not in default_cfgs]
    for architecture in new:
        own: dict[str, Any] = {
            f"{PREFIX}{card.name}": _describe(card) for card in known.values() if card.architecture == architecture.name
        }
        default_cfgs.update(generate_default_cfgs(own or {PREFIX + architecture.name: {}}))
        # timm puts the name into `__all__`, and the builder belongs beside it.
        globals()[PREFIX + architecture.name] = register_model(_entry(architecture))
    return [PREFIX + architecture.name for architecture in new]


def _describe(card: Card) -> dict[str, Any]:
    """A card in the words of timm's `PretrainedCfg`."""
    weights = card.weights
    here = next((f / weights.file for f in checkpoint_folders() if (f / weights.file).is_file()), None)
    about: dict[str, Any] = {"file": str(here)} if here else {}
    if not here and weights.source:
        about["url"] = to_url(weights.source, weights.file)
    if card.input is not None:
        # As `restpoint predict` does it: the whole image, resized to the shape that was trained on.
        about |= {"input_size": card.input.shape, "mean": card.input.mean, "std": card.input.std}
        about |= {"interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "squash"}
    if card.labels is not None:
        about |= {"num_classes": len(card.labels), "label_names": card.labels}
    if card.data is not None:
        about["license"] = card.data.licence
    return about


def _entry(architecture: Architecture) -> Any:
    def build(
        pretrained: bool = False,
        *,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        cache_dir: str | Path | None = None,
        features_only: bool = False,
        out_indices: int | Sequence[int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        pretrained_model_args: dict[str, Any] | None = None,
        **arguments: Any,
    ) -> nn.Module:
        if cache_dir is not None:
            raise ValueError("The zoo keeps its weights in the folder that the environment's RESTPOINT_HOME names.")
        name, file, about = _source(architecture, pretrained, pretrained_cfg, pretrained_cfg_overlay or {})
        arguments = {
            key: value
            for key, value in arguments.items()
            if key in architecture.options or key not in NEUTRAL or value != NEUTRAL[key]
        }
        if file is not None:
            if isinstance(pretrained_cfg, dict) and "num_classes" in pretrained_cfg:
                arguments.setdefault("num_classes", pretrained_cfg["num_classes"])
            model = create_model(name, checkpoint_path=file, **arguments)
        else:
            model = create_model(name, pretrained=pretrained, **arguments)
        about |= {"classifier": _name_of_classifier(model), "first_conv": next(iter(model.input_layers), None)}  # type: ignore[arg-type]
        model.to(device=device, dtype=dtype)
        # timm loads `checkpoint_path` into the finished model, by `load_state_dict`, which adapts nothing by itself.
        model.register_load_state_dict_pre_hook(_adapt_state)
        if features_only:
            model = _features(model, architecture.name, out_indices)
        model.pretrained_cfg = model.default_cfg = about  # type: ignore[assignment]
        model.pretrained_model_args = pretrained_model_args or {}  # type: ignore[assignment]
        return model

    build.__name__ = build.__qualname__ = PREFIX + architecture.name
    build.__doc__ = architecture.summary
    return build


def _source(
    architecture: Architecture, pretrained: bool, given: Any, overlay: dict[str, Any]
) -> tuple[str, Path | None, dict[str, Any]]:
    """The zoo's name for what is asked for, the file that is to be loaded instead of its own, and timm's description.

    `given` is a tag, a description (`PretrainedCfg` or its dictionary), or None for the architecture's default.
    """
    default = default_cfgs[PREFIX + architecture.name]
    tag = given if isinstance(given, str) else None
    described: dict[str, Any] = {}
    if given is not None and tag is None:
        described = dict(given) if isinstance(given, dict) else given.to_dict()
        tag = described.get("tag") or None
        # A model that timm saved: its own file, the arguments of the tag that it was made from.
        tag = tag if tag in default.cfgs else None
    if tag is None and given is None and pretrained:
        tag = default.tags[0] or None
    name = f"{architecture.name}.{tag}" if tag else architecture.name
    resolve(name)
    registered = default.cfgs.get(tag, default.default if not described else None)
    about = {**(registered.to_dict() if registered else {}), **described, **overlay}
    about |= {"architecture": PREFIX + architecture.name} | ({"tag": tag} if tag else {})
    if not pretrained:
        return name, None, about
    chosen = overlay or described
    for key in ("url", "hf_hub_id", "state_dict"):
        if chosen.get(key) and not chosen.get("file"):
            raise CheckpointError(
                f"{PREFIX}{name}: {key}={chosen[key]!r} cannot be loaded here; fetch the .safetensors file, and give "
                'pretrained_cfg_overlay={"file": PATH}.'
            )
    file = chosen.get("file")
    if file is None or (registered is not None and file == registered.file):
        if tag is None:
            raise UnknownModelError(f"{PREFIX}{architecture.name} has no pretrained weights.")
        return name, None, about
    path = Path(file)
    # A folder that timm saved is described by itself.
    return name, path / LOCAL_WEIGHTS if path.is_dir() else path, about


def _adapt_state(model: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Fit a state dict to another number of classes or channels, with a warning; all else has to fit as it is."""
    ours = {f"{prefix}{key}": value for key, value in model.state_dict().items()}
    head = f"{prefix}{_name_of_classifier(model)}."
    old = [key for key in state if key.startswith(head)]
    # Another number of rows is another number of classes; another number of columns would be another model.
    rows = [key for key in old if key in ours and state[key].shape[1:] == ours[key].shape[1:]]
    if len(rows) == len(old) and any(state[key].shape != ours[key].shape for key in rows):
        warnings.warn(
            f"The checkpoint's classifier is of another number of classes than {model.num_classes}: the model keeps "
            "its own, which has to be trained.",
            stacklevel=2,
        )
        state.update({key: ours[key] for key in old})
    for layer in model.input_layers:  # type: ignore[union-attr]
        key = f"{prefix}{layer}.weight"
        read = key in state and key in ours and state[key].ndim == ours[key].ndim > 2
        if read and state[key].shape[1] != ours[key].shape[1] and state[key].shape[0] == ours[key].shape[0]:
            warnings.warn(
                f"The checkpoint reads {state[key].shape[1]} channels, which are adapted to {ours[key].shape[1]}.",
                stacklevel=2,
            )
            state[key] = adapt_channels(state[key], ours[key].shape[1])


def _name_of_classifier(model: nn.Module) -> str | None:
    classifier = model.get_classifier()  # type: ignore[operator]
    return next((name for name, module in model.named_modules() if module is classifier), None)


def _features(model: nn.Module, name: str, out_indices: int | Sequence[int] | None) -> nn.Module:
    if not hasattr(model, "forward_intermediates"):
        raise ValueError(f"{name} has no forward_intermediates, so features_only cannot be had.")
    model.reset_classifier(0)  # type: ignore[operator]
    count = len(model.feature_info)  # type: ignore[arg-type]
    indices = (
        out_indices if isinstance(out_indices, int) else tuple(range(count) if out_indices is None else out_indices)
    )
    if not (1 <= indices <= count if isinstance(indices, int) else all(-count <= i < count for i in indices)):
        raise ValueError(f"{name} has {count} maps of features; out_indices={indices} asks for others.")
    net: nn.Module = FeatureGetterNet(model, out_indices=indices)
    net.in_chans = model.in_chans
    return net


register()
