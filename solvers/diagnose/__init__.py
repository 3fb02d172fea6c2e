"""Is this gradient to be trusted, and what does it cost? Everything here looks, and changes nothing."""

from .certificate import Certificate, certificate
from .comparison import Comparison, compare_adjoints
from .correction import correction_indices, correction_loss, correction_weights, intermediate_states
from .jacobian import jacobian_penalty, spectral_radius
from .memory import peak_memory

__all__ = [
    "Certificate",
    "Comparison",
    "certificate",
    "compare_adjoints",
    "correction_indices",
    "correction_loss",
    "correction_weights",
    "intermediate_states",
    "jacobian_penalty",
    "peak_memory",
    "spectral_radius",
]
