"""A tiny classifier that exists for one test, and a folder of weights of its own."""

import pytest
import torch
from torch import nn

from restpoint.models import registry
from restpoint.solvers import Picard
from restpoint.zoo import Card, Data, ImageInput
from restpoint.zoo.weights import pack_weights


class Tiny(nn.Module):
    """One convolution, pooling, one linear layer, with the whole interface of an image classifier."""

    input_layers = ("stem",)

    def __init__(self, num_classes=3, in_chans=1, width=4, norm=None, solver=None):
        super().__init__()
        self.num_classes, self.num_features, self.solver = num_classes, width, solver
        self.stem = nn.Conv2d(in_chans, width, 3, padding=1)
        if norm == "weight":
            nn.utils.parametrizations.weight_norm(self.stem)
        elif norm == "spectral":
            nn.utils.parametrizations.spectral_norm(self.stem)
        self.reset_classifier(num_classes)

    def forward_features(self, images):
        return self.stem(images).relu()

    def forward_head(self, features, pre_logits=False):
        pooled = features.mean((2, 3))
        return pooled if pre_logits else self.head(pooled)

    def forward(self, images):
        return self.forward_head(self.forward_features(images))

    def get_classifier(self):
        return self.head

    def reset_classifier(self, num_classes):
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()


def trial_tiny(**arguments):
    """A classifier of one convolution."""
    return Tiny(**arguments)


def trial_bare(*, num_classes: int = 2, in_chans: int = 1):
    """A linear layer that knows nothing of heads."""
    return nn.Linear(in_chans, num_classes)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The user's folder, empty."""
    monkeypatch.setenv("RESTPOINT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def tiny(home, monkeypatch):
    """Two registered architectures, of which `trial_tiny` has the weights `trial_tiny.ones`; returns that model."""
    monkeypatch.setattr(registry, "ARCHITECTURES", registry.ARCHITECTURES)
    registry.register_model(family="trial", task="image-classification", accepts=Tiny)(trial_tiny)
    registry.register_model(family="trial", task="regression")(trial_bare)
    yield publish(home / "checkpoints", "trial_tiny.ones", solver=Picard(damping=0.5))
    del registry.ARCHITECTURES["trial_tiny"], registry.ARCHITECTURES["trial_bare"]


def publish(folder, name, **arguments):
    """Write a model's weights and card to `folder` and return the model."""
    model = Tiny(**arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    content, weights = pack_weights(model, f"{name}.safetensors")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / weights.file).write_bytes(content)
    channels = model.stem.in_channels
    Card(
        name=name,
        architecture=name.partition(".")[0],
        arguments=arguments,
        task="image-classification",
        weights=weights,
        parameters=sum(p.numel() for p in model.parameters()),
        torch=torch.__version__,
        data=Data("noise", "all of it", "CC0-1.0"),
        input=ImageInput((channels, 6, 5), (0.5,) * channels, (0.25,) * channels),
        labels=tuple("abc") if model.num_classes == 3 else None,
        metrics={"accuracy": 0.5},
    ).save(folder / f"{name}.json")
    return model
