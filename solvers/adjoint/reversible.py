"""The two-state reversible iteration of reversible equilibrium models."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.utils import checkpoint

from ..fixed_point.driver import Carry, advance, settle, start
from ..fixed_point.method import Evaluated, FixedPointSolver, Proposal
from ..fixed_point.picard import NoMemory, Picard
from ..fixed_point.problem import Problem
from ..solution import AdjointWarning
from ..transforms import inside_transform
from ..tree import norms
from .base import Adjoint, Task, wants_derivatives
from .shared import ReversibleAdjoint
