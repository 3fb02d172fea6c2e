"""torch.compile around a solve and inside it."""

import json
import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow
PROGRAMME = pathlib.Path(__file__).with_name("compiled.py")


@pytest.fixture(scope="module")
def results():
    done = subprocess.run([sys.executable, str(PROGRAMME)], capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("which", ["first", "defaults", "newton", "second order", "unrolled"])
def test_a_model_with_a_solve_inside(results, which):
    """The layers before and after are a graph each, with the solve between them, and the numbers are the same."""
    assert results[which]["error"] < 1e-6
    assert results[which]["graphs"] == 2
    # Counted once where it is skipped and once where it is called; more only while the marks are being set.
    assert results[which]["breaks"] <= (4 if which == "first" else 2)


def test_an_equilibrium_layer(results):
    assert results["layer"]["error"] < 1e-6
    assert results["layer"]["graphs"] == 2
    assert results["layer"]["breaks"] <= 4


def test_statistics_inside_of_compiled_code(results):
    assert results["converged"] == [True] * 5


def test_a_compiled_function_inside_a_solve(results):
    """The finished samples are taken out, and each size of the batch is compiled once."""
    assert results["cell"]["error"] < 1e-6
    assert results["cell"]["breaks"] == 0
    assert 1 <= results["cell"]["graphs"] <= 5


def test_both(results):
    """What is compiled by itself stays so inside of a solve that is left alone."""
    assert results["both"]["error"] < 1e-6
    assert results["both"]["graphs"] > 2
    assert results["both"]["breaks"] <= 2


def test_inductor(results):
    assert results["inductor"]["error"] < 1e-5
    assert results["inductor"]["breaks"] == 0


def test_root(results):
    assert results["root"]["error"] < 1e-5
