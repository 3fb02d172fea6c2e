"""Code that draws from the global generators, made a function of its seed."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch

from .batches import generator_of


@contextlib.contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Inside, Python's, NumPy's and torch's global generators start from `numbers`; after it they are as before."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    seed = generator_of(*numbers).initial_seed() % 2**32
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - timm draws from it
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.set_rng_state(before[2])
