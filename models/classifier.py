"""What image classifiers of one feature map have in common: timm's interface, without timm."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

Images = Float[Tensor, "batch in_chans height width"]


class PooledClassifier(nn.Module):
    """The base of classifiers that are a body, average pooling and one linear layer.

    A subclass sets `num_classes`, `num_features`, `in_chans` and `feature_info`, makes `classifier` by
    `new_classifier`, and defines `forward_levels`.

    Attributes:
        num_classes: length of the logits; 0 for a model without a classifier.
        num_features: channels of the pooled features.
        in_chans: channels of an image.
        input_layers: names of the layers that read the image.
        feature_info: for each of the levels, in timm's words, its channels (`num_chs`), how many pixels of the image
            one of its pixels spans (`reduction`), and the layer that it comes from (`module`).
    """

    num_classes: int
    num_features: int
    in_chans: int
    input_layers: tuple[str, ...]
    feature_info: list[dict[str, Any]]
    classifier: nn.Module

    def forward_levels(self, images: Images) -> Iterator[Float[Tensor, "batch channels h w"]]:
        """The feature maps of `feature_info` one by one, the features that are classified last."""
        raise NotImplementedError

    def new_classifier(self, num_classes: int) -> nn.Module:
        """A freshly initialised last layer; with 0 classes one that returns what it is given."""
        return nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()

    def forward_features(self, images: Images) -> Float[Tensor, "batch channels h w"]:
        """Features before pooling."""
        *_, features = self.forward_levels(images)
        return features

    def forward_head(self, features: Float[Tensor, "batch channels h w"], pre_logits: bool = False) -> Tensor:
        """Logits (batch, num_classes) of features; with `pre_logits` the pooled features (batch, channels)."""
        pooled = features.mean(dim=(2, 3))
        return pooled if pre_logits else self.classifier(pooled)

    def forward(self, images: Images) -> Float[Tensor, "batch num_classes"]:
        """Logits."""
        return self.forward_head(self.forward_features(images))

    def forward_intermediates(
        self,
        images: Images,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Feature maps of several levels, as timm's `features_only` asks for them.

        Args:
            images: a batch.
            indices: of `feature_info`; a number means the last so many, None all.
            norm: must be False: there is no norm that could be applied to every level.
            stop_early: must be False unless `intermediates_only`.
            output_fmt: must be "NCHW".
            intermediates_only: leave the features out of the result. Levels behind the last one that is asked for
                are then not computed.

        Returns:
            The feature maps; without `intermediates_only` the features and these.

        Raises:
            ValueError: an index out of range, or an option that cannot be had.
        """
        if norm or output_fmt != "NCHW" or (stop_early and not intermediates_only):
            raise ValueError(
                f"{type(self).__name__}: norm must be False, output_fmt 'NCHW', and stop_early comes with "
                f"intermediates_only; got norm={norm}, output_fmt={output_fmt!r}, stop_early={stop_early}."
            )
        count = len(self.feature_info)
        chosen = range(count) if indices is None else range(-indices, 0) if isinstance(indices, int) else indices
        if any(not -count <= i < count for i in chosen):
            raise ValueError(f"{type(self).__name__} has {count} levels of features; got the indices {list(chosen)}.")
        wanted = [i % count for i in chosen]
        levels: list[Tensor] = []
        for level in self.forward_levels(images):
            levels.append(level)
            if intermediates_only and len(levels) > max(wanted, default=-1):
                break
        picked = [levels[i] for i in wanted]
        return picked if intermediates_only else (levels[-1], picked)

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.classifier

    def reset_classifier(self, num_classes: int) -> None:
        """Put a freshly initialised classifier in place; with 0 classes `forward` returns the pooled features."""
        weight = next(self.parameters())
        self.num_classes = num_classes
        self.classifier = self.new_classifier(num_classes).to(device=weight.device, dtype=weight.dtype)
        self.classifier.train(self.training)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Which parameters form a layer, by patterns on their names, for a learning rate that decays with depth.

        The layers of the stem come first, one by one or (`coarse`) as one, then everything between, then the
        classifier, which no pattern matches.
        """
        return {"stem": r"^stem" if coarse else r"^stem\.(\d+)", "body": r"^(?!stem|classifier)"}

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters whose size is no complexity: the lengths that weight normalisation splits off."""
        return {name for name, _ in self.named_parameters() if name.endswith("parametrizations.weight.original0")}
