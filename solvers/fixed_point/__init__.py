"""Fixed points z = f(z) and roots F(x) = 0: one driver, one method a file."""

# The methods come before the problem functions, which import the adjoints, which import the methods.
from .anderson import Anderson
from .broyden import Broyden
from .method import FixedPointSolver
from .newton import Newton
from .picard import Picard

from .api import fixed_point, root  # isort: skip

__all__ = ["Anderson", "Broyden", "FixedPointSolver", "Newton", "Picard", "fixed_point", "root"]
