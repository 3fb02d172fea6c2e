"""Neural ordinary differential equations."""

from .layer import NeuralODE
from .odenet import ConcatConv2d, ConvField, ODENet, anode_net_small, anode_net_tiny, ode_net_small, ode_net_tiny

__all__ = [
    "ConcatConv2d",
    "ConvField",
    "NeuralODE",
    "ODENet",
    "anode_net_small",
    "anode_net_tiny",
    "ode_net_small",
    "ode_net_tiny",
]
