"""The package as it is built, installed and imported."""

import ast
import importlib
import inspect
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import restpoint

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("solvers", "models", "zoo", "train")
SOURCES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
HEAVY = ("einops", "matplotlib", "PIL", "safetensors", "sklearn", "tensorboard", "timm", "torchdiffeq", "torchvision")


def python(code, *, where, path=None):
    """Run `code` in a fresh interpreter in the folder `where` and return what it printed, as JSON."""
    extra = f"import sys; sys.path.insert(0, {str(path)!r})\n" if path else ""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", extra + code], cwd=where, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def build(source, target, kind):
    """Build a "wheel" or an "sdist" of the tree `source` by its own build system, without a network."""
    target.mkdir()
    code = f"import setuptools.build_meta as b; b.build_{kind}({str(target)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = target.iterdir()
    return built


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the sources: a build leaves its traces where it runs, and picks up those of the one before."""
    target = tmp_path_factory.mktemp("source") / "any name"
    unwanted = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "site", "runs", "*.egg-info")
    shutil.copytree(ROOT, target, ignore=unwanted)
    return target


@pytest.fixture(scope="module")
def sdist(tree, tmp_path_factory):
    return build(tree, tmp_path_factory.mktemp("sdist") / "out", "sdist")


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory):
    """The wheel as an installer makes it of the source distribution."""
    folder = tmp_path_factory.mktemp("wheel")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return build(folder / sdist.name.removesuffix(".tar.gz"), folder / "out", "wheel")


def test_the_wheel_holds_the_rooms_and_their_data_and_nothing_else(tree, wheel):
    expected = {"restpoint/__init__.py", "restpoint/py.typed"}
    patterns = [f"{room}/**/*.py" for room in ROOMS]
    patterns += [f"checkpoints/*.{end}" for end in ("safetensors", "json", "png")] + ["train/recipes/*.yaml"]
    for pattern in patterns:
        expected |= {f"restpoint/{path.relative_to(tree).as_posix()}" for path in tree.glob(pattern)}
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if ".dist-info/" not in name} == expected


def test_the_source_distribution_can_be_tested_and_cited(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"setup.py", "pyproject.toml", "Makefile", "README.md", "LICENSE", "CITATION.cff", "CHANGELOG.md"}
    assert wanted | {"tests/conftest.py", "tests/test_package.py", "mkdocs.yml", "docs/index.md"} <= names
    assert not any("__pycache__" in name or name.startswith(".venv") for name in names)


def test_the_wheel_works_where_nothing_else_is(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    # The neighbours that a user's project is likely to have.
    for name in ("models", "train", "zoo", "solvers"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('the user own folder was imported')")
    code = "import json, restpoint; print(json.dumps([restpoint.__file__, restpoint.list_models(pretrained=True)]))"
    file, names = python(code, where=tmp_path, path=tmp_path / "site")
    assert Path(file).is_relative_to(tmp_path)
    assert set(names) >= {path.stem for path in (ROOT / "checkpoints").glob("*.json")}


def test_the_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    (info,) = {name.partition("/")[0] for name in archive.namelist() if ".dist-info/" in name}
    metadata = archive.read(f"{info}/METADATA").decode()
    assert f"\nVersion: {restpoint.__version__}\n" in metadata
    assert "\nRequires-Python: >=3.11\n" in metadata
    requirements = [line.partition(": ")[2] for line in metadata.splitlines() if line.startswith("Requires-Dist: ")]
    assert any(line.startswith("torch>=2.11") for line in requirements)
    # Lower bounds only: a pin here is a conflict in somebody's environment.
    assert not [line for line in requirements if "==" in line.partition(";")[0]]
    assert not [line for line in requirements if "<" in line.partition(";")[0] and "extra" not in line]
    assert "restpoint = restpoint.zoo.cli:main" in archive.read(f"{info}/entry_points.txt").decode()
    assert "restpoint-train = restpoint.train.cli:main" in archive.read(f"{info}/entry_points.txt").decode()
    assert any(name.endswith("/LICENSE") for name in archive.namelist())


def test_one_version_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == restpoint.__version__
    assert citation["license"] == "Apache-2.0"


def test_importing_the_package_imports_nothing(tmp_path):
    loaded = python("import sys, json, restpoint; print(json.dumps(sorted(sys.modules)))", where=tmp_path)
    assert "restpoint" in loaded
    assert not {"torch", "numpy", *HEAVY, *(f"restpoint.{room}" for room in ROOMS)} & set(loaded)


def test_the_solvers_need_torch_and_nothing_heavy(tmp_path):
    code = "import sys, json, jaxtyping, torch; before = set(sys.modules); import restpoint.solvers; "
    code += "print(json.dumps([sorted(before), sorted(set(sys.modules) - before)]))"
    before, added = python(code, where=tmp_path)
    assert not set(HEAVY) & {*before, *added}
    assert {name.partition(".")[0] for name in added} <= {"restpoint", "torch"} | sys.stdlib_module_names
    assert not [name for name in added if name.partition(".")[2].partition(".")[0] in ROOMS[1:]]


def test_the_face_is_lazy_and_complete():
    assert set(restpoint.__all__) <= set(dir(restpoint))
    for name in restpoint.__all__:
        assert getattr(restpoint, name) is not None
    assert restpoint.create_model is restpoint.zoo.create_model
    assert restpoint.solvers is importlib.import_module("restpoint.solvers")
    with pytest.raises(AttributeError, match="module 'restpoint' has no attribute 'creat_model'"):
        restpoint.creat_model


def imports(path):
    """(level, module, name) of everything that a file imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.level, node.module or "", alias.name) for alias in node.names)


def absolute(path, level, module, name):
    """The dotted name, from the root of the package, of a relative import in `path`."""
    base = path.relative_to(ROOT).parent.parts
    return ".".join((*base[: len(base) - level + 1], *filter(None, [module or name]))).split(".")


# Only what a command does when it is called may look to the right.
EXCEPTIONS = {("zoo/cli.py", "train"), ("zoo/demo.py", "train"), ("zoo/demo_flow.py", "train")}

# Only what is handed over to torchdiffeq needs it, when it is called.
PEERS = {"solvers/ode/compat/adjoint.py": {"torchdiffeq"}, "solvers/ode/compat/interface.py": {"torchdiffeq"}}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_go_one_way(path):
    name = path.relative_to(ROOT).as_posix()
    room = ROOMS.index(path.relative_to(ROOT).parts[0])
    for level, module, what in imports(path):
        if level == 0:
            top = module.partition(".")[0]
            assert top != "restpoint", f"{name}: rooms import each other relatively"
            if room == 0:
                known = {"torch", "jaxtyping", "typing_extensions"} | sys.stdlib_module_names | PEERS.get(name, set())
                assert top in known, f"{name}: {module}"
            continue
        target = absolute(path, level, module, what)[0]
        if target in ROOMS and (name, target) not in EXCEPTIONS:
            assert ROOMS.index(target) <= room, f"{name} imports {target}, which lies to its right"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_is_unpickled(path):
    assert not {"pickle", "dill", "joblib", "cloudpickle"} & {module for _, module, _ in imports(path)}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in {"torch.load", "torch.hub.load", "np.load", "eval", "exec"} or (
                # numpy reads plain arrays, and says so itself where a file holds objects.
                ast.unparse(node.func) == "np.load" and "allow_pickle=True" not in ast.unparse(node)
            )


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("restpoint", *parts)).removesuffix(".__init__")


@pytest.mark.parametrize("name", [module_name(path) for path in SOURCES if path.name != "__main__.py"])
def test_everything_public_is_documented(name):
    module = importlib.import_module(name)
    assert module.__doc__, f"{name} has no docstring"
    public = getattr(module, "__all__", None) or [n for n in vars(module) if not n.startswith("_")]
    for attribute in public:
        thing = getattr(module, attribute)
        if not (inspect.isclass(thing) or inspect.isfunction(thing)) or not thing.__module__.startswith("restpoint"):
            continue
        where = f"{thing.__module__}.{thing.__qualname__}"
        own = vars(thing).get("__doc__") if inspect.isclass(thing) else thing.__doc__
        assert own, f"{where} has no docstring"
        # What a dataclass writes for itself says nothing.
        assert "\n" in own or not own.startswith(f"{thing.__name__}("), f"{where} has no docstring"
        for key, method in vars(thing).items() if inspect.isclass(thing) else ():
            if not key.startswith("_") and inspect.isfunction(method):
                assert inspect.getdoc(getattr(thing, key)), f"{where}.{key} has no docstring"
