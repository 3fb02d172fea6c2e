"""Data sets, augmentation, and batches whose order is a function of the seed."""

from .augment import Affine
from .batches import Batches
from .brackets import BracketBatches, BracketSource, brackets
from .cifar10 import cifar10
from .conllu import SentenceBatches, TaggedSet, TaggedSource, ud_english_ewt
from .density import PlaneDensity, PointBatches, PointSource
from .digits import digits
from .folder import FolderBatches, FolderSource, image_folder
from .mix import MixedBatches
from .mnist import mnist
from .physics import TrajectoryBatches, TrajectorySource, pendulum, two_bodies
from .physionet import physionet2012, physionet2012_hourly
from .pixels import PixelBatches, PixelSource
from .planetoid import NodeBatches, NodeSource, citeseer, cora
from .series import Series, SeriesBatches, SeriesSource
from .source import DATASETS, AnySource, DataError, ImageSet, Source, load_data, register_data
from .text import TextBatches, TextSource, text_file, tinyshakespeare
from .trees import ParsedSource, ud_english_ewt_trees
from .uci import TableBatches, TableSource
from .uea import ts_source
from .wnut17 import wnut17

__all__ = [
    "DATASETS",
    "Affine",
    "AnySource",
    "Batches",
    "BracketBatches",
    "BracketSource",
    "DataError",
    "FolderBatches",
    "FolderSource",
    "ImageSet",
    "MixedBatches",
    "NodeBatches",
    "NodeSource",
    "ParsedSource",
    "PixelBatches",
    "PixelSource",
    "PlaneDensity",
    "PointBatches",
    "PointSource",
    "SentenceBatches",
    "Series",
    "SeriesBatches",
    "SeriesSource",
    "Source",
    "TaggedSet",
    "TaggedSource",
    "TableBatches",
    "TableSource",
    "TextBatches",
    "TextSource",
    "TrajectoryBatches",
    "TrajectorySource",
    "brackets",
    "cifar10",
    "citeseer",
    "cora",
    "digits",
    "image_folder",
    "load_data",
    "mnist",
    "pendulum",
    "physionet2012",
    "physionet2012_hourly",
    "register_data",
    "text_file",
    "tinyshakespeare",
    "ts_source",
    "ud_english_ewt",
    "ud_english_ewt_trees",
    "two_bodies",
    "wnut17",
]
