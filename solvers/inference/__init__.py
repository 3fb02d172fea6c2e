"""Distributions over structures: what is most probable, how probable is a part, and how both change."""

from .alignment import Alignment
from .chain import ChainMarginals, HiddenMarkov, LinearChain
from .constituency import Constituency
from .dependency import DependencyTree
from .distribution import Structured
from .graph import FactorGraph
from .message_passing import Beliefs, belief_propagation, mean_field
from .semi_markov import Segmentation, SegmentMarginals, SemiMarkov

__all__ = [
    "Alignment",
    "Beliefs",
    "ChainMarginals",
    "Constituency",
    "DependencyTree",
    "FactorGraph",
    "HiddenMarkov",
    "LinearChain",
    "SegmentMarginals",
    "Segmentation",
    "SemiMarkov",
    "Structured",
    "belief_propagation",
    "mean_field",
]
