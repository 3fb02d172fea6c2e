"""Irregular time series: neural controlled differential equations, latent ODEs and ODE-RNNs."""

from .cde import CDEField, NeuralCDE, neural_cde_small, test_neural_cde
from .path import ControlPath, observation_path, spline_path

__all__ = [
    "CDEField",
    "ControlPath",
    "NeuralCDE",
    "neural_cde_small",
    "observation_path",
    "spline_path",
    "test_neural_cde",
]
