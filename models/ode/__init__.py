"""Neural ordinary differential equations."""

from .convnext import ConvNeXtField, ODEConvNeXt, ode_convnext_tiny, test_ode_convnext
from .layer import NeuralODE
from .odenet import ConcatConv2d, ConvField, ODENet, anode_net_small, anode_net_tiny, ode_net_small, ode_net_tiny

__all__ = [
    "ConcatConv2d",
    "ConvField",
    "ConvNeXtField",
    "NeuralODE",
    "ODEConvNeXt",
    "ODENet",
    "anode_net_small",
    "anode_net_tiny",
    "ode_convnext_tiny",
    "ode_net_small",
    "ode_net_tiny",
    "test_ode_convnext",
]
