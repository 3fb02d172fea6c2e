"""restpoint: implicit deep learning in PyTorch.

A zoo of models whose layers are defined by what they solve, and the solvers under it:

- `restpoint.create_model(name, pretrained=True)` loads a model; `restpoint.list_models()` gives the names.
- `restpoint-train --config recipe.yaml` trains or fine-tunes one.
- `from restpoint.solvers import fixed_point, solve_ode` puts a solver into an architecture of your own.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import models, solvers, train, zoo
    from .zoo import create_model, list_models, load_card, save_pretrained

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "create_model",
    "list_models",
    "load_card",
    "models",
    "save_pretrained",
    "solvers",
    "train",
    "zoo",
]


def __getattr__(name: str) -> Any:
    # Lazy, so that `import restpoint.solvers` pays for torch alone, and `import restpoint` for nothing.
    if name in ("models", "solvers", "train", "zoo"):
        return importlib.import_module(f".{name}", __name__)
    if name in __all__:
        return getattr(importlib.import_module(".zoo", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
