"""Data-parallel training in two processes computes what one process does."""

import pathlib
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.solvers.adjoint.distributed import CASES, Model, batch, gradients

PROGRAMME = pathlib.Path(__file__).with_name("distributed.py")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    command = [sys.executable, "-W", "ignore", str(PROGRAMME)]
    files = [str(folder / "store"), str(folder / "out")]
    ranks = [subprocess.Popen([*command, str(r), *files], stderr=subprocess.PIPE, text=True) for r in range(2)]
    try:
        errors = [process.communicate(timeout=300)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert all(process.returncode == 0 for process in ranks), "\n".join(error[-2000:] for error in errors)
    return load_file(folder / "out")


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(results, case):
    """Though one of them needs more steps, and each its own number."""
    expected = gradients(Model(case), batch())
    got = {key.removeprefix(f"{case}/"): grad for key, grad in results.items() if key.startswith(f"{case}/")}
    assert got.keys() == expected.keys()
    assert "first.bias" not in expected
    tolerance = 1e-4 if case in ("reversible", "phantom") else 1e-8
    for key, grad in expected.items():
        torch.testing.assert_close(got[key], grad, rtol=tolerance, atol=tolerance)
