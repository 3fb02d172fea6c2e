"""Every test runs with shapes and types checked, one thread, and fixed seeds."""

import os

# Before torch is imported, and for the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

from jaxtyping import install_import_hook

# Before restpoint is imported: from here on the shapes in its signatures are checked at every call.
install_import_hook("restpoint", "beartype.beartype")

import random

import hypothesis
import numpy as np
import pytest
import torch

torch.set_num_threads(1)

# A suite that passes today passes tomorrow: examples are derived from the test itself, and slowness is no failure.
hypothesis.settings.register_profile("restpoint", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("restpoint")


@pytest.fixture(autouse=True)
def _fixed_state():
    """Seed every generator, and put back what a test changed in torch's global state."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - scikit-learn and torchvision draw from the global generator
    torch.manual_seed(0)
    dtype, grad = torch.get_default_dtype(), torch.is_grad_enabled()
    yield
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(grad)
