"""The scripts that draw the pictures of the documentation, and what they print."""

import importlib.util
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "docs" / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_optima(tmp_path, capsys):
    errors = load("optima").main(["--output", str(tmp_path / "optima.png")])
    bounds = {"unit_circle": 1e-13, "softmax": 1e-10, "optnet": 1e-9, "argmin": 1e-8, "schur": 1e-12, "traffic": 1e-8}
    assert errors.keys() == bounds.keys()
    assert all(errors[name] < bound for name, bound in bounds.items()), errors
    assert (tmp_path / "optima.png").stat().st_size > 10_000
    assert len(capsys.readouterr().out.splitlines()) == len(bounds)
