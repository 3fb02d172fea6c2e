"""Irregular time series: neural controlled differential equations, latent ODEs and ODE-RNNs."""

from .cde import CDEField, NeuralCDE, neural_cde_small, test_neural_cde
from .latent_ode import LatentODE, latent_ode_small, test_latent_ode
from .ode_rnn import ODERNN, ODERNNClassifier, ode_rnn_small, test_ode_rnn
from .path import ControlPath, observation_path, spline_path

__all__ = [
    "ODERNN",
    "CDEField",
    "ControlPath",
    "LatentODE",
    "NeuralCDE",
    "ODERNNClassifier",
    "latent_ode_small",
    "neural_cde_small",
    "observation_path",
    "ode_rnn_small",
    "spline_path",
    "test_latent_ode",
    "test_neural_cde",
    "test_ode_rnn",
]
