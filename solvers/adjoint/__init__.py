"""Ways to differentiate a solution."""

# First the fixed points, whose problem functions import the modules below one by one.
from .. import fixed_point as _fixed_point  # noqa: F401
from .base import Adjoint, RestPointAdjoint
from .implicit import ImplicitAdjoint
from .phantom import JacobianFreeAdjoint, PhantomAdjoint
from .shared import CheckpointAdjoint, ReversibleAdjoint
from .taped import UnrollAdjoint

__all__ = [
    "Adjoint",
    "CheckpointAdjoint",
    "ImplicitAdjoint",
    "JacobianFreeAdjoint",
    "PhantomAdjoint",
    "RestPointAdjoint",
    "ReversibleAdjoint",
    "UnrollAdjoint",
]
