"""The package `restpoint` is this folder: `restpoint.solvers` is `solvers/`, and so on."""

import ast
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
ROOMS = ("solvers", "models", "zoo", "train")

REQUIREMENTS = [
    "torch>=2.11",
    "torchvision>=0.26",
    "torchdiffeq>=0.2.3",
    "einops>=0.7",
    "jaxtyping>=0.2.34",
    "jsonargparse>=4.50",
    "matplotlib>=3.8",
    "numpy>=1.26",
    "pillow>=10.0",
    "pyyaml>=6.0",
    "safetensors>=0.4.3",
    "scikit-learn>=1.4",
    "scipy>=1.11",
    "tensorboard>=2.15",
    "timm>=1.0.9",
    "tqdm>=4.65",
]
EXTRAS = {
    "dev": [
        "beartype>=0.18",
        "hypothesis>=6.100",
        "mypy>=1.11",
        "pytest>=8.2",
        "pytest-xdist>=3.5",
        "ruff>=0.6",
        "setuptools>=77",
        "types-pyyaml",
        "types-tqdm",
    ],
    "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.5", "mkdocstrings[python]>=0.27"],
    # qpth belongs here as well, but asks for numpy below 2, which the others' newest releases do not take: the Makefile
    # installs it by itself.
    "bench": [
        "cvxpylayers>=1.0",
        "diffrax>=0.6",
        "entmax>=1.3",
        "jax>=0.4.30",
        "proxsuite>=0.7",
        "torch-struct>=0.5",
        "torchdeq>=0.1",
        "torchdyn>=1.0.6",
        "torchode>=1.0",
    ],
}


def version() -> str:
    """`__version__` as restpoint/__init__.py assigns it, read without importing the package."""
    for statement in ast.parse((HERE / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__version__":
            return str(ast.literal_eval(statement.value))
    raise RuntimeError("__init__.py assigns no __version__")


def packages() -> list[str]:
    """`restpoint` and every folder of the rooms that holds an __init__.py, by name."""
    inner = [p.parent.relative_to(HERE) for room in ROOMS for p in (HERE / room).rglob("__init__.py")]
    return ["restpoint", *sorted("restpoint." + ".".join(folder.parts) for folder in inner)]


setup(
    name="restpoint",
    version=version(),
    description="Implicit deep learning in PyTorch: solvers, adjoints, and a zoo of equilibrium models and neural ODEs",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The restpoint authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["deep equilibrium models", "neural ODE", "implicit layers", "implicit differentiation", "pytorch"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    # Installers run this file under another name, by which setuptools would take it for a module of the package.
    script_name="setup.py",
    package_dir={"restpoint": "."},
    packages=packages(),
    # What MANIFEST.in adds to the source distribution (tests/, docs/) lies inside the package's folder, which is the
    # root: it must not count as the package's data.
    include_package_data=False,
    package_data={
        "restpoint": ["py.typed", "checkpoints/*.safetensors", "checkpoints/*.json", "checkpoints/*.png"],
        "restpoint.train": ["recipes/*.yaml"],
    },
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": [
            "restpoint = restpoint.zoo.cli:main",
            "restpoint-train = restpoint.train.cli:main",
        ]
    },
)
