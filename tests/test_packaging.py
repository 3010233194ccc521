"""What is installed and shipped: four packages from this tree, and a wheel with everything they need at run time."""

import importlib
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests.support.source_tree import PACKAGES, ROOT


@pytest.fixture(scope="module")
def wheel_files(tmp_path_factory: pytest.TempPathFactory) -> frozenset[str]:
    """Names in a wheel built from a copy of the tree, so that nothing here is touched."""
    copy = tmp_path_factory.mktemp("tree")
    for folder in PACKAGES:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, copy / name)
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--skip-dependency-check",
        "--outdir",
        str(copy / "dist"),
        str(copy),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (copy / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return frozenset(archive.namelist())


@pytest.mark.parametrize("package", PACKAGES)
def test_each_package_is_imported_from_this_tree(package: str) -> None:
    file = importlib.import_module(package).__file__
    assert file is not None
    assert Path(file).resolve() == ROOT / package / "__init__.py"


@pytest.mark.parametrize("package", PACKAGES)
def test_no_other_distribution_claims_the_name_of_a_package(package: str) -> None:
    assert set(packages_distributions().get(package, [])) <= {"moefleet"}


def test_every_dependency_is_pinned_once_for_the_make_targets() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = config["project"]["dependencies"] + config["project"]["optional-dependencies"]["dev"]
    pins = [
        line.split("==")[0]
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if not line.startswith("#")
    ]
    names = {_distribution_name(requirement) for requirement in wanted}
    assert names - set(pins) == set()
    assert len(pins) == len(set(pins))


def _distribution_name(requirement: str) -> str:
    name = requirement
    for mark in "[<>=!~; ":
        name = name.split(mark)[0]
    return name.lower().replace("_", "-").replace(".", "-")


@pytest.mark.slow
@pytest.mark.side_by_side
def test_wheel_ships_all_code_and_data_and_no_tests(wheel_files: frozenset[str]) -> None:
    data = {".py", ".pyi", ".proto", ".jinja", ".yaml", ".cpp", ".h", ".typed", ".json", ".safetensors"}
    in_tree = {
        str(path.relative_to(ROOT))
        for folder in PACKAGES
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix in data and "__pycache__" not in path.parts
    }
    assert in_tree - wheel_files == set()
    folders = {name.split("/")[0] for name in wheel_files}
    assert {name for name in folders if not name.startswith("moefleet-")} == set(PACKAGES)


@pytest.mark.slow
@pytest.mark.side_by_side
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler")
def test_wheel_ships_the_compiled_kernels(wheel_files: frozenset[str]) -> None:
    assert "shards/kernels/_native.so" in wheel_files
