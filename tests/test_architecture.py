"""The picture of the house as a table: who may import whom."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GROUND = {"config", "durable", "errors", "types"}
ROOMS: dict[str, set[str]] = {
    "config": {"errors"},
    "durable": set(),
    "errors": set(),
    "types": set(),
    "imaging": GROUND,
    "models": GROUND,
    "metrics": GROUND,
    "privacy": GROUND,
    "intake": GROUND | {"imaging", "privacy"},
    "training": GROUND | {"imaging", "models", "metrics", "privacy"},
    "federated": GROUND | {"imaging", "models", "metrics", "privacy", "intake", "training"},
    "reporting": GROUND | {"metrics"},
    "experiments": GROUND | {"imaging", "models", "metrics", "privacy", "training", "federated", "intake"},
    "deployment": GROUND | {"imaging", "models", "metrics", "privacy", "training", "federated", "intake"},
    "cli": GROUND
    | {"imaging", "models", "metrics", "privacy", "training", "federated", "reporting", "experiments", "deployment"}
    | {"intake"},
}
OUTSIDE: dict[str, set[str]] = {  # packages that only some rooms may import
    "flwr": {"federated", "deployment", "cli"},
    "ray": {"federated"},
    "opacus": {"training", "privacy"},
    "dp_accounting": {"privacy"},
    "pydicom": {"imaging", "intake"},
    "pynetdicom": {"intake"},
    "dicomweb_client": {"intake"},
    "nibabel": {"imaging"},
    "highdicom": {"imaging"},
    "torch": {"imaging", "models", "training", "federated", "deployment", "cli"},
    "torchvision": {"imaging", "models"},
    "openpyxl": {"intake"},
    "plotly": {"reporting"},
    "jinja2": {"reporting"},
    "tensorboard": {"reporting"},
    "mlflow": {"reporting"},
    "typer": {"cli"},
    "rich": {"cli"},
}
FORBIDDEN = {"pickle", "cPickle", "dill", "shelve", "marshal", "joblib", "cloudpickle"}


def imports(path: Path) -> set[str]:
    """Every module that a file names in an import, `from a import b` as a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def files() -> list[Path]:
    return sorted((ROOT / "fedmed").rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / "fedmed").parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down_and_no_room_imports_its_neighbour(path: Path) -> None:
    room = room_of(path)
    if room in ("__init__", "__main__"):
        return
    assert room in ROOMS, f"{room} is not in the picture"
    for module in imports(path):
        if module.startswith("fedmed."):
            target = module.split(".")[1]
            known = target == room or target in ROOMS[room] or target in ("__version__", "__file__")
            assert known, f"{room} must not import {target}"


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_packages_stay_in_their_rooms_and_nothing_pickles(path: Path) -> None:
    for module in imports(path):
        package = module.split(".")[0]
        assert package not in FORBIDDEN, f"{package} in {path.name}"
        assert package not in ("server", "client", "tests", "simulations", "benchmarks")
        if package in OUTSIDE:
            assert room_of(path) in OUTSIDE[package], f"{package} is not for {room_of(path)}"


def test_every_package_that_is_imported_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    declared = {re.split(r"[^\w.-]", line)[0] for line in wanted}
    declared |= {"ray"} if any(line.startswith("flwr[simulation]") for line in wanted) else set()
    of = packages_distributions()
    for path in files():
        for package in {module.split(".")[0] for module in imports(path)} - {"fedmed"} - sys.stdlib_module_names:
            names = {name.lower().replace("_", "-") for name in of.get(package, [package])}
            assert names & declared, f"{path.name} imports {package}, which pyproject.toml does not declare"


def test_the_flower_apps_are_plain_assignments() -> None:
    for side in ("server", "client"):
        assert (ROOT / side / "__init__.py").read_text() == ""
        tree = ast.parse((ROOT / side / "app.py").read_text())
        assigned = [node.targets[0] for node in tree.body if isinstance(node, ast.Assign)]
        assert [target.id for target in assigned if isinstance(target, ast.Name)] == ["app"]


def test_every_room_says_what_it_is_for() -> None:
    for room in (ROOT / "fedmed").iterdir():
        if (room / "__init__.py").exists():
            assert ast.get_docstring(ast.parse((room / "__init__.py").read_text())), f"{room.name} has no docstring"


@pytest.mark.parametrize("room", sorted({path.parent.name for path in (ROOT / "fedmed").glob("*/__init__.py")}))
def test_the_map_of_a_room_names_what_is_there_and_all_of_it(room: str) -> None:
    folder = ROOT / "fedmed" / room
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
    named = set(re.findall(r"`(\w+)`", text))
    there = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    there |= {path.parent.name for path in folder.glob("*/__init__.py")}
    assert not named - there, "the docstring of __init__.py names what is not there"
    assert not there - named, "the docstring of __init__.py lacks a module: add it to the line that it belongs to"


def test_a_run_without_privacy_imports_nothing_that_only_privacy_needs() -> None:
    code = "import fedmed.federated.simulation, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert not {"opacus", "dp_accounting", "scipy.optimize", "sympy"} & set(done.stdout.split())
