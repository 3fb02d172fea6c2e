"""Data sets, augmentation, and batches whose order is a function of the seed."""

from .augment import Affine
from .batches import Batches
from .conllu import SentenceBatches, TaggedSet, TaggedSource, ud_english_ewt
from .density import PlaneDensity, PointBatches, PointSource
from .digits import digits
from .mnist import mnist
from .source import DATASETS, DataError, ImageSet, Source, load_data, register_data

__all__ = [
    "DATASETS",
    "Affine",
    "Batches",
    "DataError",
    "ImageSet",
    "PlaneDensity",
    "PointBatches",
    "PointSource",
    "SentenceBatches",
    "Source",
    "TaggedSet",
    "TaggedSource",
    "digits",
    "load_data",
    "mnist",
    "register_data",
    "ud_english_ewt",
]
