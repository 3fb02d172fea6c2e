"""The package `restpoint` is this folder: `restpoint.solvers` is `solvers/`, and so on."""

from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
ROOMS = ("solvers", "models", "zoo", "train")


def packages() -> list[str]:
    """`restpoint` and every folder of the rooms that holds an __init__.py, by name."""
    inner = [p.parent.relative_to(HERE) for room in ROOMS for p in (HERE / room).rglob("__init__.py")]
    return ["restpoint"] + sorted("restpoint." + ".".join(folder.parts) for folder in inner)


setup(
    name="restpoint",
    version="0.1.0",
    description="Implicit deep learning in PyTorch: solvers, adjoints, and a zoo of equilibrium models and neural ODEs",
    python_requires=">=3.11",
    package_dir={"restpoint": "."},
    packages=packages(),
    install_requires=["torch>=2.11"],
)
