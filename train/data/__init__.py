"""Data sets, augmentation, and batches whose order is a function of the seed."""

from .augment import Affine
from .batches import Batches
from .conllu import SentenceBatches, TaggedSet, TaggedSource, ud_english_ewt
from .density import PlaneDensity, PointBatches, PointSource
from .digits import digits
from .folder import FolderBatches, FolderSource, image_folder
from .mix import MixedBatches
from .mnist import mnist
from .source import DATASETS, AnySource, DataError, ImageSet, Source, load_data, register_data

__all__ = [
    "DATASETS",
    "Affine",
    "AnySource",
    "Batches",
    "DataError",
    "FolderBatches",
    "FolderSource",
    "ImageSet",
    "MixedBatches",
    "PlaneDensity",
    "PointBatches",
    "PointSource",
    "SentenceBatches",
    "Source",
    "TaggedSet",
    "TaggedSource",
    "digits",
    "image_folder",
    "load_data",
    "mnist",
    "register_data",
    "ud_english_ewt",
]
