"""Trajectories of physical systems: Hamiltonian networks, second-order ODEs, and one without structure."""

from .hamiltonian import HamiltonianNetwork, hamiltonian_small, test_hamiltonian
from .perceptron import UnstructuredODE, test_unstructured_ode, unstructured_ode_small
from .scalar import ScalarMLP
from .second_order import SecondOrderODE, sonode_small, test_sonode
from .trajectory import TrajectoryModel

__all__ = [
    "HamiltonianNetwork",
    "ScalarMLP",
    "SecondOrderODE",
    "TrajectoryModel",
    "UnstructuredODE",
    "hamiltonian_small",
    "sonode_small",
    "test_hamiltonian",
    "test_sonode",
    "test_unstructured_ode",
    "unstructured_ode_small",
]
