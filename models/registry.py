"""Architectures by name: one decorator above the function that builds a model makes it known to the zoo."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable
from typing import Any, Protocol, TypeVar, runtime_checkable

from torch import Tensor, nn

from ..solvers.options import suggest

B = TypeVar("B", bound=Callable[..., nn.Module])

ARCHITECTURES: dict[str, Architecture] = {}


@runtime_checkable
class ImageClassifier(Protocol):
    """What every model of the task "image-classification" offers, after timm.

    Attributes:
        num_classes: length of the last dimension of what `forward` returns; 0 for a model without a classifier.
        num_features: length of the features that the classifier reads.
        input_layers: names of the convolutions or linear layers that read the image's channels, so that pretrained
            weights can be adapted to another `in_chans`.
    """

    num_classes: int
    num_features: int
    input_layers: tuple[str, ...]

    def forward_features(self, images: Tensor) -> Tensor:
        """Features before pooling, of images (batch, channels, height, width)."""

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (batch, num_classes) of features, or with `pre_logits` what the classifier would read."""

    def get_classifier(self) -> nn.Module:
        """The last layer."""

    def reset_classifier(self, num_classes: int) -> None:
        """Put a freshly initialised last layer in place; with 0 classes the model returns pooled features."""


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A registered builder.

    Attributes:
        name: `family_size`, the builder's own name.
        family: such as "deq" or "odenet".
        task: such as "image-classification".
        build: returns the module; keyword arguments only.
        options: every keyword that `build` takes.
    """

    name: str
    family: str
    task: str
    build: Callable[..., nn.Module]
    options: tuple[str, ...]

    @property
    def summary(self) -> str:
        """The first paragraph of the builder's docstring on one line."""
        return " ".join((inspect.getdoc(self.build) or "").split("\n\n")[0].split())

    def __call__(self, **arguments: Any) -> nn.Module:
        """Build the model.

        Raises:
            TypeError: an argument that the builder does not take; the message suggests and lists those that it does.
        """
        for name in arguments:
            if name not in self.options:
                raise TypeError(
                    f"{self.name} has no option {name!r}.{suggest(name, list(self.options))} "
                    f"Its options: {', '.join(self.options) or 'none'}."
                )
        return self.build(**arguments)


def register_model(*, family: str, task: str, accepts: Callable[..., Any] | None = None) -> Callable[[B], B]:
    """Register the decorated builder under its own name.

    Args:
        family: the group that `list_models(family=)` selects.
        task: what the model does, in words joined by hyphens: "image-classification", "density-estimation".
        accepts: where the builder passes `**arguments` on, the class or function that receives them: its parameters
            are the builder's options too.

    Raises:
        ValueError: the name is taken by another builder, or is not lower-case letters, digits and underscores.
        TypeError: the builder has positional-only arguments or `*args`, or `**arguments` without `accepts`.

    Example:
        >>> @register_model(family="deq", task="image-classification", accepts=ConvolutionalDEQ)
        ... def deq_small(**arguments):
        ...     \"\"\"A convolutional equilibrium classifier of 48 channels.\"\"\"
        ...     return ConvolutionalDEQ(**{"channels": 48, **arguments})
    """

    def register(builder: B) -> B:
        name = builder.__name__
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise ValueError(f"A model's name is made of lower-case letters, digits and underscores; got {name!r}.")
        known = ARCHITECTURES.get(name)
        if known is not None and _origin(known.build) != _origin(builder):
            raise ValueError(
                f"The model {name!r} of {_origin(builder)} is already registered by {_origin(known.build)}."
            )
        ARCHITECTURES[name] = Architecture(name, family, task, builder, _options(builder, accepts))
        return builder

    return register


def _origin(builder: Callable[..., Any]) -> str:
    return f"{builder.__module__}.{builder.__qualname__}"


def _options(builder: Callable[..., Any], accepts: Callable[..., Any] | None) -> tuple[str, ...]:
    names: dict[str, None] = {}
    for parameter in inspect.signature(builder).parameters.values():
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL):
            raise TypeError(f"{_origin(builder)}: a builder takes keyword arguments only, and has {parameter}.")
        if parameter.kind is not parameter.VAR_KEYWORD:
            names[parameter.name] = None
        elif accepts is None:
            raise TypeError(f"{_origin(builder)}: name what receives {parameter} by register_model(accepts=...).")
        else:
            names |= dict.fromkeys(_options(accepts, None))
    return tuple(names)
