"""The interface of torchdiffeq 0.2.5 over the integrators and adjoints of this library.

- `layout.py`: states without a batch as one row, and norms of errors.
- `methods.py`: methods by name, and their options. `adaptive.py` and `fixed.py` are their drivers, which leave a mesh
  of accepted steps as every driver does.
- `request.py`: arguments, checked, and the solve. `interface.py` and `adjoint.py`: the public functions.
"""

from .adjoint import odeint_adjoint
from .interface import odeint, odeint_event

__all__ = ["odeint", "odeint_adjoint", "odeint_event"]
