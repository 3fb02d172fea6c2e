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
from .sudoku import BoardBatches, BoardSet, SudokuSource, sudoku4, sudoku17
from .text import TextBatches, TextSource, text_file, tinyshakespeare
from .traffic import FlowBatches, Network, TrafficSource, traffic_abilene
from .trees import ParsedSource, ud_english_ewt_trees
from .uci import TableBatches, TableSource
from .uea import ts_source
from .wnut17 import wnut17

__all__ = [
    "DATASETS",
    "Affine",
    "AnySource",
    "Batches",
    "BoardBatches",
    "BoardSet",
    "BracketBatches",
    "BracketSource",
    "DataError",
    "FlowBatches",
    "FolderBatches",
    "FolderSource",
    "ImageSet",
    "MixedBatches",
    "Network",
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
    "SudokuSource",
    "TableBatches",
    "TableSource",
    "TaggedSet",
    "TaggedSource",
    "TextBatches",
    "TextSource",
    "TrafficSource",
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
    "sudoku4",
    "sudoku17",
    "text_file",
    "tinyshakespeare",
    "traffic_abilene",
    "ts_source",
    "two_bodies",
    "ud_english_ewt",
    "ud_english_ewt_trees",
    "wnut17",
]
