"""Distributions over structures: what is most probable, how probable is a part, and how both change."""

from .alignment import Alignment
from .chain import ChainMarginals, HiddenMarkov, LinearChain
from .constituency import Constituency
from .dependency import DependencyTree
from .distribution import Structured
from .elimination import AssignmentMarginals, Assignments
from .exponential import Bernoulli, Categorical, Dirichlet, ExponentialFamily, Gamma, Gaussian, Poisson
from .graph import FactorGraph
from .message_passing import Beliefs, belief_propagation, mean_field
from .semi_markov import Segmentation, SegmentMarginals, SemiMarkov
from .sparsemap import SparseMarginals, sparse_map

__all__ = [
    "Alignment",
    "AssignmentMarginals",
    "Assignments",
    "Beliefs",
    "Bernoulli",
    "Categorical",
    "ChainMarginals",
    "Constituency",
    "DependencyTree",
    "Dirichlet",
    "ExponentialFamily",
    "FactorGraph",
    "Gamma",
    "Gaussian",
    "HiddenMarkov",
    "LinearChain",
    "Poisson",
    "SegmentMarginals",
    "Segmentation",
    "SemiMarkov",
    "SparseMarginals",
    "Structured",
    "belief_propagation",
    "mean_field",
    "sparse_map",
]
