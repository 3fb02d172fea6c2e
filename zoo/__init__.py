"""Models by name: the registry, pretrained weights and their cards, and the command line."""

from ..models.registry import Architecture, ImageClassifier, register_model
from .cards import Card, Data, ImageInput, Published, Weights
from .errors import CardError, CardWarning, CheckpointError, UnknownModelError, ZooError
from .factory import Blueprint, create_model, save_pretrained
from .registry import list_models, load_card

__all__ = [
    "Architecture",
    "Blueprint",
    "Card",
    "CardError",
    "CardWarning",
    "CheckpointError",
    "Data",
    "ImageClassifier",
    "ImageInput",
    "Published",
    "UnknownModelError",
    "Weights",
    "ZooError",
    "create_model",
    "list_models",
    "load_card",
    "register_model",
    "save_pretrained",
]
