"""Every test runs with shapes and types checked, one thread, and fixed seeds."""

import os

# Before torch is imported, and for the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
# What the user of this machine keeps at home is not under test.
os.environ["RESTPOINT_HOME"] = f"{__file__}.has-no-home"

import sys
import types

import beartype
from jaxtyping import install_import_hook

# Before restpoint is imported: from here on the types and shapes in its signatures are checked at every call. The
# checker has to have a name that can be imported; an int is a float to it, as it is to mypy.
checker = types.ModuleType("restpoint_type_checker")
checker.check = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))
sys.modules[checker.__name__] = checker
install_import_hook("restpoint", f"{checker.__name__}.check")

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
